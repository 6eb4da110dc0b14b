"""Stores written by earlier versions open, verify, answer, export and are continued.

``tests/data/README.md`` describes the archives.
"""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.jobs import run_job

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.training import TrainConfig, train

ARCHIVES = sorted((Path(__file__).parent / "data").glob("format-1.tar.xz"))
DTYPES = ("float16", "bfloat16", "float32")
JOB = {
    "shards": "tars",
    "model": "model",
    "device": "cpu",
    "proj_rank_total": 16,
    "proj_rank_min": 2,
    "max_length": 32,
    "batch_size": 4,
    "rows_per_shard": 16,
    "threads": 1,
}
TRAINING = {
    "method": "GradProjLora",
    "shards": "tars",
    "tokenizer": "model",
    "result_dir": "training",
    "n_layer": 1,
    "n_embd": 16,
    "n_head": 2,
    "max_length": 16,
    "batch_size": 4,
    "max_steps": 8,
    "warmup_steps": 2,
    "learning_rate": 0.01,
    "device": "cpu",
    "proj_rank_total": 16,
    "proj_rank_min": 2,
    "checkpoint_interval": 2,
}
QUERY = "see other there an her two had have word"
RESOLUTION = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 1e-5}
"""Largest relative error of a stored value; of float32, the rounding of another machine."""


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.split(".")[0])
def archive(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(request.param) as tar:
        tar.extractall(folder, filter="data")
    return folder / request.param.name.split(".")[0]


@pytest.fixture
def older(archive, tmp_path, monkeypatch):
    """A copy of the archive's folder, which is the working directory: its paths are relative."""
    folder = shutil.copytree(archive, tmp_path / "older")
    monkeypatch.chdir(folder)
    return folder


def undisturbed_rows(dtype):
    """The rows of all documents as this version computes them, from a new output directory."""
    run_job(output_dir=f"new-{dtype}", proj_dtype=dtype, **JOB)
    return ProjectionStore(f"new-{dtype}").rows(np.arange(80))


def assert_close(rows, expected, dtype):
    """Equal within the storage type's resolution of the row's largest value."""
    scale = np.abs(expected).max(axis=1, keepdims=True)
    np.testing.assert_array_less(np.abs(rows - expected) / scale, 2 * RESOLUTION[dtype])


@pytest.mark.parametrize("name", [*DTYPES, "training"])
def test_older_store_opens_with_the_same_rows_and_columns(older, name):
    expected = np.load(f"{name}-expected.npz")
    store = ProjectionStore("training/projections" if name == "training" else name)
    np.testing.assert_array_equal(store.rows(expected["ids"], missing="nan"), expected["rows"])
    for column in set(expected.files) - {"ids", "rows"}:
        np.testing.assert_array_equal(store.column(column), expected[column])


@pytest.mark.parametrize(("name", "code"), [("float16", 3), ("bfloat16", 3), ("float32", 0)])
def test_older_store_verifies(older, name, code):
    assert main(["verify", name]) == code


def test_older_store_answers_a_query_with_the_same_scores(older, capsys):
    expected = [json.loads(line) for line in Path("query-expected.jsonl").read_text().splitlines()]
    assert len(expected) == 80
    question = ["query", "float32", "--text", QUERY, "--score", "dot", "--device", "cpu"]
    question += ["--reduction", "mean"]  # as its rows are
    assert main([*question, "--top_k", "80", "--bottom_k", "0", "--format", "jsonl"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = {hit["id"]: hit["score"] for hit in hits}
    assert scores.keys() == {hit["id"] for hit in expected}
    largest = max(abs(hit["score"]) for hit in expected)
    for hit in expected:
        assert scores[hit["id"]] == pytest.approx(hit["score"], abs=1e-4 * largest)


def test_older_store_is_exported(older):
    assert main(["export", "float32", "--to", "files"]) == 0
    files = [torch.load(path, weights_only=True) for path in sorted(Path("files").glob("*.pt"))]
    rows, ids = (torch.cat([content[name] for content in files]) for name in ("proj", "batch_idx"))
    expected = np.load("float32-expected.npz")["rows"]
    np.testing.assert_array_equal(rows.numpy(), expected[ids.numpy()])
    assert sorted(ids.tolist()) == list(range(80))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_older_job_is_continued_and_keeps_its_rows(older, dtype):
    before = np.load(f"{dtype}-expected.npz")["rows"]
    committed = ~np.isnan(before).any(axis=1)
    assert 0 < committed.sum() < 80
    # Flags that are not given have the defaults of the store's version.
    run_job(output_dir=dtype, proj_dtype=dtype, dense_rows=False, **JOB)
    store = ProjectionStore(dtype)
    rows = store.rows(np.arange(80))
    np.testing.assert_array_equal(rows[committed], before[committed])
    assert_close(rows, undisturbed_rows(dtype), dtype)
    assert (store.column("status") == 1).all()
    assert main(["verify", dtype]) == 0


def test_older_complete_store_has_nothing_left_to_compute(older):
    shards = {path: path.read_bytes() for path in Path("float32").rglob("c/*") if path.is_file()}
    run_job(output_dir="float32", proj_dtype="float32", dense_rows=False, **JOB)
    assert shards == {path: path.read_bytes() for path in shards}
    assert_close(
        ProjectionStore("float32").rows(np.arange(80)), undisturbed_rows("float32"), "float32"
    )


def test_older_training_run_is_continued_and_keeps_its_rows(older):
    before = np.load("training-expected.npz")["rows"]
    result = train(TrainConfig(**TRAINING, resume=True))
    assert result.n_steps == 8
    rows = ProjectionStore("training/projections").rows(np.arange(32))
    np.testing.assert_array_equal(rows[: len(before)], before)
    train(TrainConfig(**{**TRAINING, "result_dir": "new"}))
    undisturbed = ProjectionStore("new/projections").rows(np.arange(32))
    scale = np.abs(undisturbed).max(axis=1, keepdims=True)
    np.testing.assert_array_less(np.abs(rows - undisturbed) / scale, 1e-3)
