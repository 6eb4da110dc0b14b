"""Real ranks are killed at every named step of the protocol; the job resumes to the same bits."""

import ast
import json
import shutil
from pathlib import Path

import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.forked_ranks import Ranks
from helpers.jobs import SMALL_JOB, assert_same_bits, run_job
from helpers.launches import Launch

from gradproj.coordinator.fault_points import STEPS
from gradproj.store import ProjectionStore
from gradproj.store.layout import FOLDERS

PACKAGE = Path(__file__).parents[2] / "gradproj"
N_SAMPLES, N_UNITS = 48, 3
SETTINGS = SMALL_JOB | {"rows_per_shard": 16, "proj_save_interval": 1, "device": "cpu"}
SETTINGS |= {"basis": "eigen", "encoding": "signs"}


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    """Three units of several batches each."""
    return make_corpus(
        tmp_path_factory.mktemp("small") / "tars", mixed_documents(N_SAMPLES), per_tar=20
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_corpus, model_dir):
    """The store of a single rank that was not disturbed."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run_job(1, shards=small_corpus, model=model_dir, output_dir=output, **SETTINGS)
    return output


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


@pytest.fixture
def launch(ranks, tmp_path, small_corpus, model_dir):
    settings = SETTINGS | {"shards": small_corpus, "model": model_dir}
    return Launch(ranks, tmp_path / "out", **settings)


def assert_like_undisturbed(output, undisturbed, ranks):
    assert_same_bits(output, undisturbed)
    with ProjectionStore(output) as store:
        assert store.status_counts()["ok"] == N_SAMPLES
        assert store.missing_ranges() == []
        assert [s.key for s in store.samples(range(N_SAMPLES))] == [
            f"{i:012d}" for i in range(N_SAMPLES)
        ]
    assert json.loads((output / "projection_stats.json").read_text())["complete"] is True
    left = {folder: [p.name for p in (output / folder).iterdir()] for folder in FOLDERS}
    assert len(left.pop("units")) == N_UNITS
    assert left.pop("logs")
    assert left == {"claims": [], "heartbeats": [], "partial": [], "tmp": []}
    assert ranks.alive() == []


def die_with_a_dead_owners_claim(launch, undisturbed):
    launch.die_at("batch done", 1)
    launch.die_at("old owner fenced")


def die_merging_a_finished_store(launch, undisturbed):
    shutil.copytree(undisturbed, launch.output)
    launch.die_merging_at("merge reopened")


def die_replacing_an_empty_store(launch, undisturbed):
    launch.ranks.start([*launch.argv, "--proj_seed", "7"], kill_at="metadata published")
    launch.killed_at("metadata published")
    launch.die_at("empty store removed")


REACHED_BY = {
    "empty store removed": die_replacing_an_empty_store,
    "old owner fenced": die_with_a_dead_owners_claim,
    "merge reopened": die_merging_a_finished_store,
}
"""Steps that a job on a new store does not reach -> a function that does."""

WORLD_SIZES = [1, 2, 1, 3]
"""World sizes to resume with, in turn."""


@pytest.mark.parametrize(
    ("step", "world_size"),
    [(step, WORLD_SIZES[i % len(WORLD_SIZES)]) for i, step in enumerate(STEPS)],
)
def test_job_killed_at_any_step_resumes_to_the_same_bits(launch, undisturbed, step, world_size):
    if step in REACHED_BY:
        REACHED_BY[step](launch, undisturbed)
    else:
        launch.die_at(step)
    launch.finish(world_size)
    assert_like_undisturbed(launch.output, undisturbed, launch.ranks)


@pytest.mark.parametrize("step", ["partial published", "claim released", "scratch removed"])
def test_job_killed_at_any_step_of_a_stop_resumes_to_the_same_bits(launch, undisturbed, step):
    launch.die_at(step, 1, stop_at="batch done")
    launch.finish(2)
    assert_like_undisturbed(launch.output, undisturbed, launch.ranks)


def test_job_stopped_in_the_pilot_ends_in_order_and_resumes_to_the_same_bits(launch, undisturbed):
    launch.start(2, stop_at="pilot batch done")
    ended = launch.ranks.wait_for_all()
    # Rank 0 runs the pilot and got the signal; the other one ends because it did.
    assert {rank.rank: rank.status for rank in ended} == {0: 128 + 15, 1: 2}
    assert "stopped by SIGTERM before the first unit" in "".join(rank.output for rank in ended)
    assert not (launch.output / "projections.zarr").exists()
    launch.finish(2)
    assert_like_undisturbed(launch.output, undisturbed, launch.ranks)


@pytest.mark.parametrize(
    "step", ["merge undone", "claim released", "shard published", "block merged"]
)
def test_job_killed_while_recomputing_a_unit_resumes_to_the_same_bits(launch, undisturbed, step):
    shutil.copytree(undisturbed, launch.output)
    (launch.output / "units" / "00000001.safetensors").unlink()
    launch.die_at(step)
    launch.finish(1)
    assert_like_undisturbed(launch.output, undisturbed, launch.ranks)


def test_listed_steps_are_exactly_those_in_the_code():
    reached = {
        node.args[0].value
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "fault_points.reach"
    }
    assert sorted(reached) == sorted(STEPS)


def test_undisturbed_job_reaches_the_steps_of_each_phase_in_order(launch):
    launch.start(1)
    (rank,) = launch.ranks.wait_for_all()
    assert rank.status == 0, rank.output
    for first, last in (("folders made", "metadata published"), ("batch done", "partial removed"),
                        ("block merged", "attributes updated")):  # fmt: skip
        part = STEPS[STEPS.index(first) : STEPS.index(last) + 1]
        assert sorted(part, key=rank.steps.index) == list(part)
