"""One private cluster, one corpus and one undisturbed run for all tests of the Slurm files."""

import os
from types import SimpleNamespace

import pytest
from cluster import find_daemons, running_cluster
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import run_job
from helpers.models import make_model

N_SAMPLES, ROWS_PER_UNIT = 960, 16
"""60 units. Until a test opens its gate, each start of a rank commits at most three, and the most
disturbed job starts five times with two ranks."""
BATCHES_A_START = 3 * ROWS_PER_UNIT - 1
"""Batches that each start of a rank does before it waits at the gate: two units and a part."""
SETTINGS = {
    "proj_rank_total": 16,
    "proj_rank_min": 2,
    "max_length": 64,
    "batch_size": 1,
    "rows_per_shard": ROWS_PER_UNIT,
    "device": "cpu",
}
"""One document a batch."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    daemons = find_daemons()
    if daemons is None:
        message = (
            "Slurm is not installed: bash launch/test_slurm.sh installs it (slurm-wlm and munge)"
        )
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with running_cluster(tmp_path_factory.mktemp("slurm"), daemons) as running:
        yield running


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """``shards``, ``model`` and ``want``: the output of an undisturbed run of one process."""
    root = tmp_path_factory.mktemp("inputs")
    shards = make_corpus(root / "tars", mixed_documents(N_SAMPLES), per_tar=400)
    model = make_model(root / "model")
    # The batch files are submitted with the job's own defaults: signs in the pilot's eigenbasis.
    settings = {"shards": shards, "model": model, "output_dir": root / "want", **SETTINGS}
    run_job(1, timeout=300, dense_rows=False, **settings)
    return SimpleNamespace(shards=shards, model=model, want=root / "want")
