import json
import os

import pytest

from experiments.results import Results, write_atomically

META = {"model": "tiny", "context": 64, "command": "a", "started": "now", "methods": ["full"]}


def test_rows_are_on_disk_at_once_and_found_again(tmp_path):
    first = Results(tmp_path / "results.json", META)
    first.add({"method": "full", "kl": 0.0})
    assert json.loads((tmp_path / "results.json").read_text()) == {
        "meta": META,
        "rows": [{"method": "full", "kl": 0.0}],
    }
    again = Results(tmp_path / "results.json", META | {"command": "b", "started": "later", "methods": ["full", "int8"]})
    assert again.row("full") == {"method": "full", "kl": 0.0}
    assert again.row("int8") is None


@pytest.mark.parametrize("change", [{"context": 128}, {"seed": 1}, {"versions": {"jax": "0"}}], ids=str)
def test_other_settings_are_refused_and_named(tmp_path, change):
    Results(tmp_path / "results.json", META).add({"method": "full"})
    with pytest.raises(ValueError, match=f"{next(iter(change))}=.*choose another --out"):
        Results(tmp_path / "results.json", META | change)


@pytest.mark.parametrize("text", ["", "[1]", '{"rows": []}', '{"meta": {}, "rows": [', "\0"])
def test_a_damaged_file_is_refused(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ValueError, match=r"results\.json is not a results file"):
        Results(tmp_path / "results.json", META)


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    write_atomically(file, "old")

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(file, "new" * 100_000)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["results.json"]


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Results(tmp_path / "file" / "results.json", META)
