"""Files that a query writes: all scores, and the cached second moment."""

import errno
import json
import os
import shutil
import signal

import numpy as np
import pytest
from helpers.corpora import mixed_documents
from helpers.outputs import EMPTY, N_SAMPLES, ONE_TOKEN, copy_of, cut, shard_of, uncommit
from helpers.query_command import TEXT, ask, ok_ids, write_queries

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, ranking, score, score_file
from gradproj.coordinator.merge import merge
from gradproj.job.recorded import config_from, job_command
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import QueryProjector, read_queries

assert ask


@pytest.fixture
def queries(tmp_path):
    texts = [d["text"] for d in mixed_documents(30, seed=3) if 1 < len(d["text"].split()) < 9]
    return write_queries(tmp_path / "q.jsonl", *({"text": text} for text in texts[:3]))


def rows_of(output, queries):
    run = config_from(RecordedRunArgs(output=str(output)))
    with ProjectionStore(output) as store:
        return QueryProjector(store, run, "cpu").rows(read_queries(queries)).rows


def test_rows_of_queries_do_not_depend_on_a_recorded_batch_tokens_auto(output, queries):
    expected = rows_of(output, queries)
    path = output / "run_config.json"
    recorded = json.loads(path.read_text())
    path.write_text(json.dumps({**recorded, "batch_tokens": "auto"}))
    np.testing.assert_allclose(rows_of(output, queries), expected, rtol=1e-5, atol=1e-6)
    assert "--batch_tokens auto" in job_command(output)


# --- all scores in a file ---


@pytest.mark.parametrize("kind", ["kfac", "relatif", "cosine"])
def test_file_holds_every_score_and_nan_without_a_row(job, queries, tmp_path, ask, kind):
    path = tmp_path / "scores.npy"
    flags = ("--queries", queries, "--score", kind, "--top_k", 7, "--bottom_k", 5)
    lines, errors = ask(job.output, *flags, "--save_scores", path)
    got = np.load(path)
    with ProjectionStore(job.output) as store:
        wanted = score(rows_of(job.output, queries), store, score=kind)
    assert got.dtype == np.float32
    assert got.shape == (3, N_SAMPLES)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert np.flatnonzero(np.isnan(got).any(axis=0)).tolist() == [EMPTY, ONE_TOKEN]
    assert f"{path} will hold 3 x 70 scores, 840 B" in errors
    assert lines == ask(job.output, *flags)[0]  # the same ends as without it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.jsonl", "scores.npy"]


def test_other_domains_are_nan_in_the_file(job, queries, tmp_path, ask):
    path = tmp_path / "scores.npy"
    ask(job.output, "--queries", queries, "--save_scores", path, "--domains", "ArXiv")
    with ProjectionStore(job.output) as store:
        of_arxiv = store.column("domain") == store.domains.index("ArXiv")
        score_blocks = of_arxiv & np.isin(np.arange(N_SAMPLES), ok_ids(store))
    assert 0 < score_blocks.sum() < N_SAMPLES - 2
    assert (np.isnan(np.load(path)) == ~score_blocks).all()


def test_file_is_written_in_small_chunks_and_query_parts(job, queries, tmp_path, ask, monkeypatch):
    want, got = tmp_path / "want.npy", tmp_path / "got.npy"
    flags = ("--queries", queries, "--top_k", 7, "--save_scores")
    lines = ask(job.output, *flags, want)[0]
    with ProjectionStore(job.output) as store:
        monkeypatch.setattr(ranking, "_QUERY_BYTES_PER_SCAN", 2 * 8 * store.dim)
    monkeypatch.setattr(score_file, "_CHUNK_BYTES", 100)
    assert ask(job.output, *flags, got)[0] == lines
    np.testing.assert_allclose(np.load(got), np.load(want), rtol=1e-5, atol=1e-6)
    assert ask(job.output, *flags[:-1])[0] == lines


def test_unusable_path_is_rejected_before_anything_is_computed(
    job, queries, tmp_path, ask, monkeypatch
):
    monkeypatch.setattr("gradproj.cli.query.session.QueryProjector", None)
    (tmp_path / "there.npy").write_text("precious")
    flags = (job.output, "--queries", queries, "--save_scores")
    assert "there.npy exists: remove it, or give another name" in ask.mistake(
        *flags, tmp_path / "there.npy"
    )
    assert f"there is no directory {tmp_path / 'none'}; make it first" in ask.mistake(
        *flags, tmp_path / "none" / "s.npy"
    )
    assert (tmp_path / "there.npy").read_text() == "precious"


def test_full_disk_is_one_line_and_leaves_no_file(job, queries, tmp_path, ask, monkeypatch):
    def full(descriptor, offset, n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = ask(job.output, "--queries", queries, "--save_scores", tmp_path / "s.npy", code=2)[1]
    assert "s.npy: no room for 3 x 70 scores, 840 bytes: No space left on device" in message
    monkeypatch.undo()
    monkeypatch.setattr(os, "pwrite", lambda descriptor, data, at: len(data) // 2)
    message = ask(job.output, "--queries", queries, "--save_scores", tmp_path / "s.npy", code=2)[1]
    assert "s.npy: No space left on device" in message
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]


def test_unwritable_path_is_not_reported_as_full(job, queries, ask):
    message = ask(job.output, "--queries", queries, "--save_scores", "/proc/x.npy", code=2)[1]
    assert "/proc/x.npy" in message
    assert "no room" not in message
    assert "cannot be written" in message


def test_file_system_without_fallocate_is_written(job, queries, tmp_path, ask, monkeypatch):
    def unable(descriptor, offset, n_bytes):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    ask(job.output, "--queries", queries, "--save_scores", tmp_path / "want.npy")
    monkeypatch.setattr(os, "posix_fallocate", unable)
    ask(job.output, "--queries", queries, "--save_scores", tmp_path / "s.npy")
    assert (tmp_path / "s.npy").read_bytes() == (tmp_path / "want.npy").read_bytes()


def test_file_created_meanwhile_is_not_overwritten(job, queries, tmp_path, ask, monkeypatch):
    publish = score_file.publish_exclusively

    def late(unfinished, path):
        path.write_text("another's")
        return publish(unfinished, path)

    monkeypatch.setattr(score_file, "publish_exclusively", late)
    message = ask(job.output, "--queries", queries, "--save_scores", tmp_path / "s.npy", code=2)[1]
    assert "s.npy exists" in message
    assert (tmp_path / "s.npy").read_text() == "another's"


def test_sigterm_leaves_no_unfinished_file(job, queries, tmp_path, ask, monkeypatch):
    finish, before = score_file.ScoresFile.finish, signal.getsignal(signal.SIGTERM)

    def interrupted(self):
        assert len(list(tmp_path.glob(".s.npy*"))) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        finish(self)

    monkeypatch.setattr(score_file.ScoresFile, "finish", interrupted)
    _, errors = ask(job.output, "--queries", queries, "--save_scores", tmp_path / "s.npy", code=130)
    assert errors.endswith("gradproj: stopped\n")
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]
    assert signal.getsignal(signal.SIGTERM) == before


# --- the cached second moment ---


@pytest.fixture
def fits(monkeypatch):
    """Return the list of kinds fitted from now on."""
    kinds = []
    fit = Preconditioner.fit.__func__

    def counted(cls, store, kind="kfac", *args, **options):
        kinds.append(kind)
        return fit(cls, store, kind, *args, **options)

    monkeypatch.setattr(Preconditioner, "fit", classmethod(counted))
    return kinds


def cached_files(output):
    return list((output / "preconditioners").glob("*"))


def preconditioned_answers(ask, output, *more):
    return ask.objects(output, "--text", TEXT, "--score", "preconditioned", "--top_k", 5, *more)


def test_second_moment_is_fitted_once_for_any_damping_and_layers(output, ask, fits):
    first = preconditioned_answers(ask, output)
    assert len(cached_files(output)) == 1
    assert preconditioned_answers(ask, output) == first
    for more in (("--damping", "10"), ("--layers", "layers.0")):
        again = preconditioned_answers(ask, output, *more)
        assert again != first
        shutil.move(output / "preconditioners", output / "aside")
        assert preconditioned_answers(ask, output, *more) == again  # equals a fresh fit
        shutil.rmtree(output / "preconditioners")
        shutil.move(output / "aside", output / "preconditioners")
    assert fits == ["second_moment"] * 3


def test_relatif_accepts_either_curvature(output, queries, ask):
    flags = ("--queries", queries, "--score", "relatif", "--top_k", 9, "--bottom_k", 0)
    for kind in ("kfac", "second_moment"):
        with ProjectionStore(output) as store:
            fitted = Preconditioner.fit(store, kind)
            wanted = score(rows_of(output, queries), store, score="relatif", preconditioner=fitted)
        answers = ask.objects(output, *flags, "--curvature", kind)
        for number, values in enumerate(wanted):
            got = answers[9 * number : 9 * number + 9]
            assert [x["id"] for x in got] == np.argsort(-np.nan_to_num(values, nan=-np.inf))[
                :9
            ].tolist()
        assert any(
            line.startswith(f"score    relatif by {kind}: ")
            for line in ask(output, *flags, "--curvature", kind)[0]
        )


def test_token_covariances_are_not_cached(output, ask):
    ask.objects(output, "--text", TEXT, "--score", "kfac")
    assert not (output / "preconditioners").exists()


def test_grown_or_repaired_store_is_fitted_again(job, output, tmp_path, ask, fits):
    records = {p: p.read_bytes() for p in (output / "units").glob("00000002.*")}
    shard = shard_of(output, 2).read_bytes()
    uncommit(output, 2)
    few = preconditioned_answers(ask, output)
    assert preconditioned_answers(ask, output) == few
    assert len(fits) == 1
    # Its last unit is committed now.
    shard_of(output, 2).write_bytes(shard)
    for path, data in records.items():
        path.write_bytes(data)
    merge(output)
    whole = preconditioned_answers(ask, output)
    assert len(fits) == 2
    assert whole == preconditioned_answers(ask, copy_of(job.output, tmp_path / "whole"))
    assert whole != few
    assert len(cached_files(output)) == 1
    # A shard is put in another's place.
    fits.clear()
    preconditioned_answers(ask, output)
    assert fits == []
    shard_of(output, 2).with_suffix(".new").write_bytes(shard)
    shard_of(output, 2).with_suffix(".new").rename(shard_of(output, 2))
    preconditioned_answers(ask, output)
    assert fits == ["second_moment"]


def test_record_after_its_shard_invalidates_the_cache(output, ask, fits):
    record = next((output / "units").glob("00000002.*"))
    data = record.read_bytes()
    shard = shard_of(output, 2).read_bytes()
    uncommit(output, 2)
    shard_of(output, 2).write_bytes(shard)
    preconditioned_answers(ask, output)
    record.write_bytes(data)
    preconditioned_answers(ask, output)
    assert fits == ["second_moment"] * 2


def test_damaged_cache_file_is_replaced(output, ask, fits):
    first = preconditioned_answers(ask, output)
    cut(cached_files(output)[0])
    _, errors = ask(
        output, "--text", TEXT, "--score", "preconditioned", "--top_k", 5, "--format", "jsonl"
    )
    assert "is damaged" in errors
    assert "Fitting it again" in errors
    assert fits == ["second_moment"] * 2
    assert preconditioned_answers(ask, output) == first
    assert len(fits) == 2


def test_read_only_output_is_still_answered(output, ask, monkeypatch):
    def read_only(path, *rest, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    want = preconditioned_answers(ask, output)
    shutil.rmtree(output / "preconditioners")
    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    lines, errors = ask(
        output, "--text", TEXT, "--score", "preconditioned", "--format", "jsonl", "--top_k", 5
    )
    assert "the second moment could not be cached for the next query: cannot write " in errors
    assert len(lines) == len(want)
