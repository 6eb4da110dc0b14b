"""Ranks that hold one model together: the rows of one rank, whatever happens to one of them."""

import functools
import signal
import time

import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.forked_ranks import ForkedProcess, environments
from helpers.jobs import ORPHAN_S, SMALL_JOB, assert_same_bits, job_command, run_job
from helpers.models import make_model

SETTINGS = {
    "eigen": {
        "dense_rows": False,
        "proj_rank_total": 64,
        "head_rows": "8x16",
        "hidden_state": "mean",
        "pilot_tokens": 500,
        "max_length": 24,
        "long_documents": "windows",
        "batch_size": 3,
        "rows_per_shard": 8,
    },
    # Token covariances with every unit.
    "random": {**SMALL_JOB, "rows_per_shard": 8, "gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    corpus = make_corpus(folder / "tars", mixed_documents(24), per_tar=20)
    return {"shards": corpus, "model": make_model(folder / "model", num_hidden_layers=3)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory, inputs):
    """Returns settings, and the output of one rank with a model of its own, by their name."""

    @functools.cache
    def run(name):
        output = tmp_path_factory.mktemp(name) / "out"
        settings = {**inputs, **SETTINGS[name]}
        run_job(1, output_dir=output, **settings)
        return settings, output

    return run


def start(ranks, ranks_per_model, signals=None, **settings):
    """Start a job's ranks. ``signals``: rank -> the fault point at which it gets a signal."""
    command = job_command(1, ranks_per_model=ranks_per_model, **settings)[2:]
    return [
        ForkedProcess(command, environment=each, **(signals or {}).get(rank, {}))
        for rank, each in enumerate(environments(ranks))
    ]


@pytest.mark.parametrize(
    ("name", "ranks", "ranks_per_model"), [("eigen", 4, 2), ("eigen", 3, 3), ("random", 3, 3)]
)
def test_groups_give_the_bits_of_one_rank(tmp_path, alone, name, ranks, ranks_per_model):
    settings, output = alone(name)
    given = {**settings, "output_dir": tmp_path / "out"}
    run_job(ranks, ranks_per_model=ranks_per_model, **given)
    assert_same_bits(output, tmp_path / "out")


def test_blocks_from_the_host_give_the_bits_of_the_whole_model(tmp_path, alone):
    settings, output = alone("random")
    run_job(1, **{**settings, "output_dir": tmp_path / "out"}, offload=True)
    assert_same_bits(output, tmp_path / "out")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_ends_its_group_and_nothing_is_lost(tmp_path, alone, killed):
    settings, output = alone("random")
    given = {**settings, "output_dir": tmp_path / "out", "proj_save_interval": 2}
    ranks = start(2, 2, {killed: {"kill_at": "batch done"}}, **given)
    assert ranks[killed].wait() == -signal.SIGKILL
    died = time.monotonic()
    assert ranks[1 - killed].wait(ORPHAN_S) == 1, ranks[1 - killed].communicate()
    assert time.monotonic() - died < ORPHAN_S
    run_job(1, **given)
    assert_same_bits(output, tmp_path / "out")


def test_a_stop_of_one_rank_stops_its_group_in_order(tmp_path, alone):
    settings, output = alone("eigen")
    given = {**settings, "output_dir": tmp_path / "out"}
    ranks = start(2, 2, {1: {"stop_at": "batch done"}}, **given)
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.communicate() for rank in ranks]
    assert "Stopped" in ranks[0].communicate()[0]
    assert any((tmp_path / "out" / "partial").iterdir())
    run_job(2, ranks_per_model=2, **given)
    assert_same_bits(output, tmp_path / "out")
