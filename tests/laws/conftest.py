"""Tests of one method run in one worker, where they share compiled programs."""

import pytest


def pytest_collection_modifyitems(items):
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if "text" in params:
            item.add_marker(pytest.mark.xdist_group(params["text"]))
