"""Times of decode attention are of the work, not of its launch."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import attention, timing
from benchmarks.record import Record


def test_work_is_repeated_until_a_call_lasts_long_enough():
    assert timing.repeats(10**6, 1e9, 5e-3) == 5
    assert timing.repeats(10**6, 1e9, 5.1e-3) == 6
    assert timing.repeats(10**6, 1e9, 0.0) == timing.repeats(10**9, 1e9, 5e-3) == 1


@pytest.mark.parametrize("times", [1, 3])
def test_a_program_attends_to_all_caches_as_often_as_asked(times):
    seen = []

    def attend(q, cache):
        jax.debug.callback(lambda q, cache: seen.append((float(q[0]), float(cache[0]))), q, cache)
        return q * cache

    attention._each(attend)(jnp.ones(1), [jnp.array([1e5]), jnp.array([2e5])], times)()
    jax.effects_barrier()
    assert sorted(cache for _, cache in seen) == [1e5] * times + [2e5] * times
    assert len({q for q, _ in seen}) == times  # each time other queries, which the time before has changed


def test_a_row_is_of_one_cache_attended_to_once(tmp_path):
    record = Record(tmp_path / "cpu.json", 600.0)
    record.add("bandwidth", read_bytes_per_s=1e9)
    shape = attention.Shape(1, 256, heads=2, dim=64, dtype="float32")
    attention.measure(record, shape, ("reference",), 3, 2**17, call_s=1e-3)
    row = next(row for row in record.content["attention"] if row["variant"] == "reference-8-bits")
    assert row["caches"] * row["bytes"] >= 2**17
    assert row["times"] == timing.repeats(row["caches"] * row["bytes"], 1e9, 1e-3) > 1
    assert row["bytes_per_s"] == pytest.approx(row["bytes"] / row["median_s"])
