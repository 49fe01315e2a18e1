import pytest

from tests.experiments import tiny


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    return tiny.write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    return tiny.write_text(tmp_path_factory.mktemp("text") / "text.txt")
