"""Laws of the methods in FORMS are quick tests; others, which differ in codecs or options, are slow."""

import pytest

from tests.laws.parts import FORMS, METHODS


def pytest_collection_modifyitems(items):
    for item in items:
        text = item.callspec.params.get("text") if hasattr(item, "callspec") else None
        if text in METHODS and text not in FORMS:
            item.add_marker(pytest.mark.slow)
