"""Tests of one method run in one worker, where they share compiled programs; FORMS are quick, the others slow."""

import pytest

from tests.laws.parts import FORMS, METHODS


def pytest_collection_modifyitems(items):
    for item in items:
        text = item.callspec.params.get("text") if hasattr(item, "callspec") else None
        if text is not None:
            item.add_marker(pytest.mark.xdist_group(text))
        if text in METHODS and text not in FORMS:
            item.add_marker(pytest.mark.slow)
