"""Thresholds of the benchmarks: ``pytest -m bench``. A changed threshold states date and reason."""

import pytest
import torch

pytestmark = pytest.mark.bench


@pytest.mark.parametrize("model", ["gpt2", "llama"])
def test_rows_cost_less_than_the_bare_backward_pass(model):
    import bench_engine

    medians = bench_engine.measure_time(model, 2, 3)
    # 2026-11-23: by oneDNN's products, on an AMD processor. With torch's own (MKL) 0.63 and 0.90,
    # Llama 0.72 and 1.00.
    assert medians["engine"] <= 0.66 * medians["plain step"]
    assert medians["engine"] <= 0.84 * medians["frozen backward"]


def test_rows_take_half_the_memory_of_the_bare_backward_pass():
    import bench_engine

    peaks = bench_engine.measure_memory("gpt2", 8)
    assert peaks["engine"] <= 0.5 * peaks["frozen backward"]
    assert peaks["engine, checkpointing"] < peaks["engine"]


def test_the_job_takes_hardly_longer_than_its_engine_alone():
    import bench_job

    assert bench_job.compare("small", 512, 3, cores=2)["wall"] <= 1.05


def test_a_fifth_more_documents_a_cpu_second_than_bergson():
    import bench_bergson

    ratios = bench_bergson.compare("small", 1024, 1)
    if ratios is None:
        pytest.skip("bergson cannot be installed: no registry is reachable")
    assert ratios["gradproj"] >= 1.2
    assert ratios["gradproj without start-up"] >= 1.2


def test_two_ranks_do_nearly_twice_the_work_of_one():
    import bench_scale

    ratios = bench_scale.measure()
    assert ratios["wall" if ratios["share"] >= bench_scale.MIN_SHARE else "cpu"] >= 1.9


def test_coordination_of_512_ranks_costs_less_than_a_hundredth():
    import bench_coordination

    assert bench_coordination.measure(512, 51_000)["all"] < 0.01


def test_the_piles_plan_and_index_are_small(tmp_path):
    import bench_planning

    found = bench_planning.measure(bench_planning.N_DOCUMENTS, 26_000, str(tmp_path))
    for step in ("rank 0", "every rank"):
        assert found[step]["above_bytes"] <= 300e6
        assert found[step]["wall_s"] <= 60


def test_bfloat16_is_fast_where_the_processor_has_it_and_rows_keep_their_direction():
    import bench_bf16

    if not bench_bf16.has_bfloat16():
        pytest.skip("this CPU has no bfloat16 instructions")
    found = bench_bf16.measure()
    assert found["gpt2"] >= 1.6
    assert found["llama"] >= 1.6
    # 2026-11-23: on the same weights. Those of a float32 checkpoint change when they are rounded:
    # 0.987 then.
    assert found["median cosine"] >= 0.999


def test_reading_is_close_to_a_mapped_file_and_far_from_zarr_python():
    import bench_store

    ratios = bench_store.measure()
    for what in ("scan as stored", "scan as float32", "one layer"):
        assert ratios[f"{what} / mapped file"] >= 0.85, what
    for what in ("single random rows", "1,000 random rows"):
        assert ratios[f"{what} / mapped file"] >= 1 / 5, what
        # 2026-11-23: not of scans (3.3 to 4.3; a mapped file itself is 3.4 times as fast as
        # zarr-python) nor of a layer (2.6: zarr-python reads no other bytes either).
        assert ratios[f"{what} / zarr-python"] >= 8, what


def test_compiling_the_blocks_does_not_slow_the_engine():
    import bench_compile

    from gradproj.errors import ConfigError

    try:
        ratios = bench_compile.measure(["gpt2", "llama"], [torch.float32], 3)
    except ConfigError as error:
        pytest.skip(str(error))
    # On an EPYC 0.99 of the time for GPT-2 and 0.93 for a Llama, which is why it is off by default.
    assert all(ratio <= 1.05 for ratio in ratios.values()), ratios


@pytest.mark.parametrize(("model", "most"), [("gpt2", 1.10), ("small", 1.25)])
def test_grad_dot_prod_costs_its_validation_share_and_at_most_a_tenth(model, most):
    import bench_training

    # 2026-11-23: 1.00, and 1.07 to 1.16 for the small one (1.11 on a quiet machine), whose weights
    # are too narrow.
    assert bench_training.measure(model, 3)["GradDotProd"] <= most


@pytest.mark.parametrize("model", ["gpt2", "small"])
def test_a_training_step_with_its_rows_costs_at_most_a_tenth_more(model):
    import bench_training_rows

    ratios = bench_training_rows.measure(model, 3)
    assert all(ratio <= 1.10 for ratio in ratios.values()), ratios


def test_scores_foretell_retraining_and_find_near_copies(tmp_path):
    import bench_lds

    results = bench_lds.measure(tmp_path, quick=True, workers=2)
    kfac, (chance, spread) = results.methods[results.reference], results.chance
    assert kfac.lds.mean > chance + 4 * spread
    assert kfac.duplicates is not None
    assert kfac.duplicates.recall[1] >= 0.95


def test_signs_are_scanned_eight_times_as_fast_as_float16_rows():
    import bench_packed

    ratios = bench_packed.measure(quick=True)
    assert ratios["signs Q=1"] >= 8
    assert ratios["signs Q=16"] >= 8


@pytest.mark.parametrize("proj_dtype", ["float16", "bfloat16", "float32"])
def test_a_question_is_near_what_the_machine_can_do(proj_dtype):
    import bench_query

    ratios = bench_query.measure(proj_dtype=proj_dtype, others=False)
    # 2026-11-23: of scores without a norm of each row, which is work of its own: 0.3 for cosine,
    # 0.07 for relatif.
    for score in ("dot", "kfac"):
        assert ratios[f"{score} Q=1 / conversion"] >= 0.5
        for n_queries in (16, 256):
            assert ratios[f"{score} Q={n_queries} / GEMM"] >= 0.6


def test_two_processes_answer_faster_than_one():
    import bench_query

    assert bench_query.measure_ranks()["cpu"] >= 1.8


def test_a_question_to_a_store_larger_than_its_memory_keeps_below_two_gigabytes():
    import bench_large_store

    found = bench_large_store.measure(4, rounds=1)
    assert max(run["rss"] for run in found.values()) < 2e9


def test_the_demo_s_queries_find_what_holds_them():
    """After ``bash launch/demo.sh``."""
    from pathlib import Path

    import bench_recall

    output = Path(__file__).parents[2] / "demo" / "out"
    if not (output / "projection_stats.json").exists():
        pytest.skip("there is no demo/out: bash launch/demo.sh makes it")
    found = bench_recall.measure(output, part="mlp", quick=True)
    assert found["relatif, precond, auto"][0] >= 0.95
    assert found["relatif, kfac, auto"][0] >= 0.95
