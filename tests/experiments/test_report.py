import base64
import html.parser
import io
import json
import re

import matplotlib.image
import pytest
from rich.console import Console

from experiments import report

ROW = {
    "perplexity": 20.717,
    "kl": 0.0123,
    "top1": 0.951,
    "bytes_allocated": 3_000_000,
    "bytes_used": 2_000_000,
    "bytes_metadata": 100_000,
    "bits_per_value": 4.5,
    "times_smaller": 7.1,
    "prefill_s": 2.5,
    "prefill_s_range": [2.4, 2.6],
    "compile_s": 9.0,
    "decode_tokens_per_s": 31.4,
    "decode_tokens_per_s_range": [30.2, 32.6],
    "decode_vs_full": 0.97,
    "kernel": "quantized_decode / cpu",
    "note": "",
}
META = {
    "command": "python -m experiments.compare --methods '<b>&'",
    "model": "tiny",
    "text": "text.txt",
    "context": 64,
    "score": 32,
    "windows": 2,
    "stream": False,
    "seed": 0,
    "device": "cpu cpu",
    "machine": "x86_64",
    "versions": {"jax": "0.10.2"},
    "text_tokens": 1000,
    "cache_dtype": None,
    "started": "2026-01-01T00:00:00+00:00",
}
ROWS = [
    ROW | {"method": "full", "kl": 0.0, "bits_per_value": 32.0, "times_smaller": 1.0},
    ROW | {"method": "kivi:bits=4"},
    ROW | {"method": "kivi:bits=2", "kl": 0.31, "bits_per_value": 2.9, "perplexity": 25.125},
    ROW | {"method": "h2o:budget=9999", "bits_per_value": 32.1, "times_smaller": 0.99, "note": "no bytes saved"},
]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"meta": META, "rows": ROWS}))
    report.write(tmp_path)
    return tmp_path


class Page(html.parser.HTMLParser):
    """Cells of the table, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.fetched, self._in_cell = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        self._in_cell = tag == "td"
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag != "td"

    def handle_data(self, data):
        if self._in_cell:
            self.rows[-1][-1] += data


def test_the_page_needs_nothing_from_elsewhere(folder):
    text = (folder / "index.html").read_text()
    fetched = Page(text).fetched
    assert len(fetched) == 1
    assert fetched[0].startswith("data:image/png;base64,")
    assert not re.search(r"https?:|@import|url\(|<script|<link", text)


def test_the_picture_in_the_page_is_the_plot(folder):
    (source,) = Page((folder / "index.html").read_text()).fetched
    picture = base64.b64decode(source.partition(",")[2])
    assert picture == (folder / "pareto.png").read_bytes()
    height, width, _ = matplotlib.image.imread(io.BytesIO(picture)).shape
    assert width > height > 400


def test_numbers_in_the_page_are_those_of_the_file(folder):
    results = json.loads((folder / "results.json").read_text())
    shown = [row for row in Page((folder / "index.html").read_text()).rows if row]
    titles = [title for title, _ in report.COLUMNS]
    assert len(shown) == len(results["rows"])
    for cells, row in zip(shown, results["rows"], strict=True):
        cell = dict(zip(titles, cells, strict=True))
        assert cell["method"] == row["method"]
        assert float(cell["bits / value"]) == pytest.approx(row["bits_per_value"], abs=0.005)
        assert float(cell["MB used"]) == pytest.approx(row["bytes_used"] / 1e6, abs=0.05)
        assert float(cell["MB allocated"]) == pytest.approx(row["bytes_allocated"] / 1e6, abs=0.05)
        assert float(cell["perplexity"]) == pytest.approx(row["perplexity"], abs=0.0005)
        assert float(cell["KL"]) == pytest.approx(row["kl"], abs=5e-6)
        assert float(cell["top-1"]) == pytest.approx(row["top1"], abs=0.0005)
        assert float(cell["prefill s"]) == pytest.approx(row["prefill_s"], abs=0.005)
        assert float(cell["decode tok/s"].split()[0]) == pytest.approx(row["decode_tokens_per_s"], abs=0.05)
        assert cell["note"] == row["note"]


def test_the_page_says_how_it_was_made_and_escapes_it(folder):
    text = (folder / "index.html").read_text()
    assert "--methods &#39;&lt;b&gt;&amp;&#39;" in text
    for value in ("0.10.2", "x86_64", "1000 tokens"):
        assert value in text
    assert all(meaning.split("'")[0] in text for _, meaning in report.COLUMNS)


def test_the_printed_table_says_where_nothing_was_saved(folder):
    console = Console(file=io.StringIO(), width=80)
    report.print_table(console, folder)
    lines = [line for line in console.file.getvalue().splitlines() if line.startswith((" full", " kivi", " h2o"))]
    assert [line.split()[0] for line in lines] == [row["method"] for row in ROWS]
    assert ["no bytes saved" in line for line in lines] == [False, False, False, True]
    assert "…" not in console.file.getvalue()


def test_a_single_full_row_can_be_drawn(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({"meta": META, "rows": ROWS[:1]}))
    report.write(tmp_path)
    assert (tmp_path / "pareto.png").stat().st_size > 1000
