"""What the benchmarks must show: ``pytest -m bench``. A threshold that moves says when and why."""

import pytest

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_rows_cost_less_than_the_bare_backward_pass(model):
    import bench_engine

    medians = bench_engine.measure_time(model, 2, 3)
    assert medians["engine"] <= 0.66 * medians["plain step"]
    assert medians["engine"] <= 0.84 * medians["frozen backward"]


def test_rows_take_half_the_memory_of_the_bare_backward_pass():
    import bench_engine

    peaks = bench_engine.measure_memory("gpt2", 8)
    assert peaks["engine"] <= 0.5 * peaks["frozen backward"]
    assert peaks["engine, checkpointing"] < peaks["engine"]
