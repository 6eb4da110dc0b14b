"""The job from its command line to its store, on GPUs."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import ENVIRONMENT, assert_same_bits, flags, run_job
from helpers.models import make_model

from gradproj.store import ProjectionStore

pytestmark = pytest.mark.gpu

N_DOCUMENTS = 70


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def inputs(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("cuda")
    return {
        "shards": make_corpus(root / "tars", mixed_documents(N_DOCUMENTS)),
        "model": make_model(root / "model", request.param),
        "proj_rank_total": 16, "proj_rank_min": 2, "max_length": 24,
        "rows_per_shard": 16, "proj_dtype": "float32",
    }  # fmt: skip


def torchrun(ranks, **settings):
    """The job on so many GPUs."""
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
    ]
    command = [*launcher, "-m", "gradproj.run", *flags(device="cuda", **settings)]
    environment = {**ENVIRONMENT}
    environment.pop("CUDA_VISIBLE_DEVICES")
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        environment["CUDA_VISIBLE_DEVICES"] = os.environ["CUDA_VISIBLE_DEVICES"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def rows_and_columns(output):
    with ProjectionStore(output) as store:
        ids = np.arange(N_DOCUMENTS)
        return store.rows(ids), store.columns_at(("status", "loss", "n_tokens"), ids)


def test_job_on_a_gpu_has_the_rows_of_the_cpu(inputs, tmp_path):
    torchrun(1, **inputs, output_dir=tmp_path / "gpu")
    run_job(1, **inputs, output_dir=tmp_path / "cpu")
    got, columns = rows_and_columns(tmp_path / "gpu")
    want, wanted_columns = rows_and_columns(tmp_path / "cpu")
    norms = np.linalg.norm(want, axis=1)
    assert (np.linalg.norm(got - want, axis=1) <= 1e-4 * norms).all()
    np.testing.assert_array_equal(columns["status"], wanted_columns["status"])
    np.testing.assert_array_equal(columns["n_tokens"], wanted_columns["n_tokens"])
    np.testing.assert_allclose(columns["loss"], wanted_columns["loss"], rtol=1e-4)


def test_deterministic_job_gives_the_same_bits_twice(inputs, tmp_path):
    for name in ("first", "second"):
        torchrun(1, **inputs, output_dir=tmp_path / name, deterministic=True)
    assert_same_bits(tmp_path / "first", tmp_path / "second")


def test_two_gpus_give_the_bits_of_one(inputs, tmp_path, two_gpus):
    for ranks in (1, 2):
        torchrun(ranks, **inputs, output_dir=tmp_path / str(ranks), deterministic=True)
    assert_same_bits(tmp_path / "1", tmp_path / "2")
