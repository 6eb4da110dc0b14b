"""Stores of packed rows of format 2 open, verify, answer, export and are continued.

``tests/data/README.md`` describes the archives. That of format 2 holds only stores; the tars and
the model are those of format 1.
"""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.jobs import run_job

from gradproj import ProjectionStore
from gradproj.__main__ import main

DATA = Path(__file__).parent / "data"
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
    "loss_reduction": "sum",
}
JOBS = {
    "signs": {**JOB, "encoding": "signs", "basis": "eigen", "pilot_tokens": 500},
    "int8": {**JOB, "encoding": "int8", "basis": "random"},
}
"""``signs`` was stopped after three of five units; ``int8`` is complete."""
QUERY = "see other there an her two had have word"


@pytest.fixture
def older(tmp_path, monkeypatch):
    """The stores beside their tars and model, in the working directory: paths are relative."""
    with tarfile.open(DATA / "format-1.tar.xz") as tar:
        members = [m for m in tar if m.name.split("/")[1:2] in (["tars"], ["model"])]
        tar.extractall(tmp_path, members, filter="data")
    with tarfile.open(DATA / "format-2.tar.xz") as tar:
        tar.extractall(tmp_path / "format-1", filter="data")
    monkeypatch.chdir(tmp_path / "format-1")
    return tmp_path / "format-1"


@pytest.mark.parametrize("name", JOBS)
def test_packed_store_opens_with_the_same_rows_and_columns(older, name):
    expected = np.load(f"{name}-expected.npz")
    store = ProjectionStore(name)
    np.testing.assert_array_equal(store.rows(expected["ids"], missing="nan"), expected["rows"])
    for column in set(expected.files) - {"ids", "rows"}:
        np.testing.assert_array_equal(store.column(column), expected[column])
    assert store.layout.encoding == name
    assert (store.basis is None) == (name == "int8")


def test_packed_stores_verify(older):
    assert [main(["verify", name]) for name in JOBS] == [3, 0]


def test_packed_store_answers_a_query_with_the_same_scores(older, capsys):
    expected = [json.loads(line) for line in Path("query-expected.jsonl").read_text().splitlines()]
    question = ["query", "int8", "--text", QUERY, "--score", "dot", "--device", "cpu"]
    assert main([*question, "--top_k", "80", "--bottom_k", "0", "--format", "jsonl"]) == 0
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    scores = {hit["id"]: hit["score"] for hit in hits}
    assert len(scores) == len(expected) == 80
    largest = max(abs(hit["score"]) for hit in expected)
    for hit in expected:
        assert scores[hit["id"]] == pytest.approx(hit["score"], abs=1e-3 * largest)


def test_packed_store_is_exported(older):
    assert main(["export", "int8", "--to", "files"]) == 0
    files = [torch.load(path, weights_only=True) for path in sorted(Path("files").glob("*.pt"))]
    rows, ids = (torch.cat([content[name] for content in files]) for name in ("proj", "batch_idx"))
    assert ids.tolist() == list(range(80))
    expected = np.load("int8-expected.npz")
    np.testing.assert_array_equal(rows.numpy()[expected["ids"]], expected["rows"])


def test_packed_job_is_continued_in_the_basis_of_its_store(older):
    before = np.load("signs-expected.npz")["rows"]
    committed = ~np.isnan(before).any(axis=1)
    assert committed.sum() == 48
    run_job(output_dir="signs", **JOBS["signs"])
    rows = ProjectionStore("signs").rows(range(80))
    np.testing.assert_array_equal(rows[committed], before[committed])
    assert np.isfinite(rows).all()
    recomputed = ["--recompute", "40", "--device", "cpu", "--shards", "tars"]
    assert main(["verify", "signs", *recomputed]) == 0
