"""`--every N`: of each slow test's cases on each backend only every Nth, for a check that is quick."""

import collections


def pytest_addoption(parser):
    parser.addoption("--every", type=int, default=1, help="run every Nth slow case of each kernel test and backend")


def pytest_collection_modifyitems(config, items):
    every = config.getoption("--every", default=1)
    if every < 2:
        return
    seen, kept, left_out = collections.Counter(), [], []
    for item in items:
        slow = item.get_closest_marker("slow") is not None
        params = item.callspec.params if hasattr(item, "callspec") else {}
        kind = (item.function.__module__, item.function.__name__, str(params.get("backend")))
        (left_out if slow and params and seen[kind] % every else kept).append(item)
        seen[kind] += slow
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)
