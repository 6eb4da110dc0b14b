"""A query under torchrun prints the answer of one process once, and an error once."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from helpers.forked_ranks import run_forked
from helpers.jobs import ENVIRONMENT, PATIENCE_S
from helpers.outputs import copy_of
from helpers.query_command import TEXT, ask, write_queries

from gradproj.distributed import (
    Process,
    process_group,
    rendezvous,
    report_errors_from_rank_0,
)
from gradproj.distributed.process import LET_RANK_0_SPEAK_S
from gradproj.errors import RanksError, ReportedError, StoreError

assert ask


def start(output, *words):
    """Start ``torchrun --nproc_per_node=2 -m gradproj query`` on the CPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        *launcher,
        "-m",
        "gradproj",
        "query",
        str(output),
        "--device",
        "cpu",
        *map(str, words),
    ]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def result_of(process):
    try:
        out, errors = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    return process.returncode, out, errors


@pytest.fixture
def queries(tmp_path):
    return write_queries(
        tmp_path / "q.jsonl", {"text": TEXT}, {"prompt": "the", "completion": " of and"}
    )


def test_two_ranks_give_the_answer_and_file_of_one_process(output, queries, tmp_path, ask):
    flags = ("--queries", queries, "--score", "preconditioned", "--format", "jsonl", "--top_k", 8)
    question = ["gradproj.__main__", "query", str(output), "--device", "cpu", *map(str, flags)]
    job = run_forked([*question, "--save_scores", str(tmp_path / "two.npy")], ranks=2)
    alone = copy_of(output, tmp_path / "alone")
    want = ask.objects(alone, *flags, "--save_scores", tmp_path / "one.npy")
    assert job.returncode == 0, job.stderr
    got = [json.loads(line) for line in job.stdout.splitlines()]
    for a, b in zip(got, want, strict=True):
        assert a.pop("score") == pytest.approx(b.pop("score"), rel=1e-4)
        assert a == b
    one, two = np.load(tmp_path / "one.npy"), np.load(tmp_path / "two.npy")
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-5)
    assert job.stderr.count("two.npy will hold") == 1
    assert len(list((output / "preconditioners").iterdir())) == 1
    assert not list(tmp_path.glob(".two.npy*"))


def test_error_of_rank_0_is_printed_once(output):
    code, out, errors = result_of(start(output, "--text", "a"))
    assert code == 1  # torchrun's own
    assert out == ""
    assert errors.count("gradproj: --text: no target for a loss") == 1, errors
    assert errors.count("Traceback") == 1, errors  # torchrun's own


def test_error_of_another_rank_is_printed_after_a_pause(monkeypatch, capsys):
    pauses = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with pytest.raises(ReportedError), report_errors_from_rank_0(1):
        raise StoreError("damaged: \x1b[2J")
    assert pauses == [LET_RANK_0_SPEAK_S]
    assert capsys.readouterr().err == "gradproj: rank 1: damaged: �[2J\n"
    with pytest.raises(StoreError), report_errors_from_rank_0(0):
        raise StoreError("damaged")
    with pytest.raises(ReportedError), report_errors_from_rank_0(1):
        raise ReportedError
    with pytest.raises(ReportedError), report_errors_from_rank_0(1, only=True):
        raise StoreError("a flag, wrong on all ranks")
    assert capsys.readouterr().err == ""
    assert len(pauses) == 2


def test_only_a_lost_peer_ends_a_rank_silently(monkeypatch):
    import torch.distributed as torch_dist

    monkeypatch.setattr(torch_dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setattr(rendezvous, "Rendezvous", lambda process: SimpleNamespace(store=None))
    ranks = Process(1, 2, 1, 2, launched=True)
    for lost in ("Connection closed by peer", "Read error: Connection reset by peer"):
        with pytest.raises(ReportedError), process_group(ranks):
            raise RuntimeError(f"[gloo/transport/tcp/pair.cc:553] {lost}")
    with pytest.raises(RanksError, match="has waited 30 min for another"), process_group(ranks):
        raise RuntimeError("[gloo/x.cc:81] Timed out waiting 1800000ms for recv")
    for ours in ("our own", "gloo: 8 vs 4"):
        with pytest.raises(RuntimeError, match=re.escape(ours)), process_group(ranks):
            raise RuntimeError(ours)
