"""Jobs of every encoding: killed and resumed by two ranks, damaged and repaired, to equal bits.

Dense rows in the random basis and signs in the eigenbasis are those of the other modules.
"""

import shutil

import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.forked_ranks import Ranks, environments
from helpers.jobs import SMALL_JOB, assert_same_bits, flags, run_job
from helpers.outputs import flip_byte, shard_of

from gradproj.__main__ import main
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.maintenance.recompute import recompute

KINDS = {
    "signs with head rows": {
        "encoding": "signs", "basis": "eigen", "head_rows": "6x8", "long_documents": "windows"
    },
    "int2": {"encoding": "int2", "basis": "random"},
    "int4": {"encoding": "int4", "basis": "eigen"},
    "int8": {"encoding": "int8", "basis": "random"},
    "dense": {"encoding": "dense", "basis": "eigen"},
}  # fmt: skip
N_SAMPLES = 32
SETTINGS = SMALL_JOB | {"rows_per_shard": 16, "proj_save_interval": 1, "device": "cpu"}
SETTINGS |= {"max_length": 24, "pilot_tokens": 300}


@pytest.fixture(scope="module", params=KINDS)
def settings(request, model_dir, tmp_path_factory):
    """The settings of a finished job that was not disturbed."""
    root = tmp_path_factory.mktemp("kind")
    made = {"shards": make_corpus(root / "tars", mixed_documents(N_SAMPLES)), "model": model_dir}
    made |= {"output_dir": root / "out", **SETTINGS, **KINDS[request.param]}
    run_job(**made)
    return made


def test_job_killed_amid_a_unit_is_resumed_by_two_ranks_to_the_same_bits(settings, tmp_path):
    output = tmp_path / "out"
    argv = ["gradproj.run", *flags(**settings | {"output_dir": output})]
    with Ranks(tmp_path) as ranks:
        ranks.start(argv, kill_at="partial published")
        killed = ranks.wait_for_one()
        assert killed.status == -9, killed.output
        assert list((output / "partial").iterdir())
        for rank, environment in enumerate(environments(2)):
            ranks.start(argv, rank, environment=environment)
        assert [rank.status for rank in ranks.wait_for_all()] == [0, 0]
    assert_same_bits(output, settings["output_dir"])


def test_damaged_unit_is_found_repaired_and_computed_again_to_the_same_bits(settings, tmp_path):
    output = shutil.copytree(settings["output_dir"], tmp_path / "out")
    flip_byte(shard_of(output, 1), 100)
    assert main(["verify", str(output), "--repair"]) == 3
    assert not shard_of(output, 1).exists()
    run_job(**settings | {"output_dir": output})
    assert_same_bits(output, settings["output_dir"])


def test_rows_are_those_that_are_computed_again(settings):
    done = recompute(RecordedRunArgs(output=str(settings["output_dir"]), device="cpu"), 12, 0)
    assert (done.n_rows, done.wrong) == (12, [])
