"""Tests of one method or codec run in one worker and share compiled programs there; FORMS are quick, the rest slow."""

import pytest

from tests.laws.parts import FORMS, METHODS


def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        for name in ("text", "codec"):
            if name in params:
                item.add_marker(pytest.mark.xdist_group(repr(params[name])))
        if params.get("text") in METHODS and params["text"] not in FORMS:
            item.add_marker(pytest.mark.slow)
