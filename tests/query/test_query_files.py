"""Laws of what a query leaves behind: a file of all scores, and the second moment kept beside the store."""

import errno
import os
import shutil
import signal

import numpy as np
import pytest
from helpers.corpora import mixed_documents
from helpers.outputs import EMPTY, N_SAMPLES, ONE_TOKEN, copy_of, cut, shard_of, uncommit
from helpers.query_command import TEXT, ask, ok_ids, write_queries

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, score
from gradproj.analysis import ranking as ends_module
from gradproj.analysis import score_file as saved
from gradproj.coordinator.merge import merge
from gradproj.job.recorded import config_from
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


# ---- All scores in a file


@pytest.mark.parametrize("kind", ["kfac", "relatif", "cosine"])
def test_the_file_has_every_document_s_score_and_nan_where_there_is_no_row(
    job, queries, tmp_path, ask, kind
):
    path = tmp_path / "scores.npy"
    flags = ("--queries", queries, "--score", kind, "--top_k", 7, "--bottom_k", 5)
    lines, said = ask(job.output, *flags, "--save_scores", path)
    got = np.load(path)
    with ProjectionStore(job.output) as store:
        wanted = score(rows_of(job.output, queries), store, score=kind)
    assert got.dtype == np.float32
    assert got.shape == (3, N_SAMPLES)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    assert np.flatnonzero(np.isnan(got).any(axis=0)).tolist() == [EMPTY, ONE_TOKEN]
    assert f"{path} will hold 3 x 70 scores, 840 B" in said
    assert lines == ask(job.output, *flags)[0]  # the same ends as without it
    assert sorted(p.name for p in tmp_path.iterdir()) == ["q.jsonl", "scores.npy"]


def test_documents_of_other_domains_are_nan_in_the_file(job, queries, tmp_path, ask):
    path = tmp_path / "scores.npy"
    ask(job.output, "--queries", queries, "--save_scores", path, "--domains", "ArXiv")
    with ProjectionStore(job.output) as store:
        of_arxiv = store.column("domain") == store.domains.index("ArXiv")
        score_blocks = of_arxiv & np.isin(np.arange(N_SAMPLES), ok_ids(store))
    assert 0 < score_blocks.sum() < N_SAMPLES - 2
    assert (np.isnan(np.load(path)) == ~score_blocks).all()


def test_it_is_written_in_small_parts_and_for_few_queries_at_a_time(
    job, queries, tmp_path, ask, monkeypatch
):
    want, got = tmp_path / "want.npy", tmp_path / "got.npy"
    flags = ("--queries", queries, "--top_k", 7, "--save_scores")
    lines = ask(job.output, *flags, want)[0]
    with ProjectionStore(job.output) as store:
        monkeypatch.setattr(ends_module, "_QUERY_BYTES_PER_SCAN", 2 * 8 * store.dim)
    monkeypatch.setattr(saved, "_BYTES_AT_ONCE", 100)
    assert ask(job.output, *flags, got)[0] == lines
    np.testing.assert_allclose(np.load(got), np.load(want), rtol=1e-5, atol=1e-6)
    assert ask(job.output, *flags[:-1])[0] == lines


def test_a_name_that_cannot_be_taken_is_refused_before_anything_is_computed(
    job, queries, tmp_path, ask, monkeypatch
):
    monkeypatch.setattr("gradproj.cli.query.QueryProjector", None)
    (tmp_path / "there.npy").write_text("precious")
    flags = (job.output, "--queries", queries, "--save_scores")
    assert "there.npy is there already: remove it, or give another name" in ask.mistake(
        *flags, tmp_path / "there.npy"
    )
    assert f"there is no folder {tmp_path / 'none'}; make it first" in ask.mistake(
        *flags, tmp_path / "none" / "s.npy"
    )
    assert (tmp_path / "there.npy").read_text() == "precious"


def test_a_full_disk_is_one_line_and_leaves_nothing(job, queries, tmp_path, ask, monkeypatch):
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


def test_a_place_where_no_file_can_be_is_not_said_to_be_full(job, queries, ask):
    message = ask(job.output, "--queries", queries, "--save_scores", "/proc/x.npy", code=2)[1]
    assert "/proc/x.npy" in message
    assert "no room" not in message
    assert "cannot be written" in message


def test_a_disk_that_cannot_reserve_is_written_all_the_same(
    job, queries, tmp_path, ask, monkeypatch
):
    def unable(descriptor, offset, n_bytes):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    ask(job.output, "--queries", queries, "--save_scores", tmp_path / "want.npy")
    monkeypatch.setattr(os, "posix_fallocate", unable)
    ask(job.output, "--queries", queries, "--save_scores", tmp_path / "s.npy")
    assert (tmp_path / "s.npy").read_bytes() == (tmp_path / "want.npy").read_bytes()


def test_somebody_who_took_the_name_meanwhile_keeps_it(job, queries, tmp_path, ask, monkeypatch):
    publish = saved.publish_exclusively

    def late(unfinished, path):
        path.write_text("another's")
        return publish(unfinished, path)

    monkeypatch.setattr(saved, "publish_exclusively", late)
    message = ask(job.output, "--queries", queries, "--save_scores", tmp_path / "s.npy", code=2)[1]
    assert "is there already" in message
    assert (tmp_path / "s.npy").read_text() == "another's"


def test_a_query_that_is_told_to_end_leaves_no_unfinished_file(
    job, queries, tmp_path, ask, monkeypatch
):
    finish, before = saved.ScoresFile.finish, signal.getsignal(signal.SIGTERM)

    def told_to_end(self):
        assert len(list(tmp_path.glob(".s.npy*"))) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        finish(self)

    monkeypatch.setattr(saved.ScoresFile, "finish", told_to_end)
    _, said = ask(job.output, "--queries", queries, "--save_scores", tmp_path / "s.npy", code=130)
    assert said.endswith("gradproj: stopped\n")
    assert [p.name for p in tmp_path.iterdir()] == ["q.jsonl"]
    assert signal.getsignal(signal.SIGTERM) == before


# ---- The second moment, kept


@pytest.fixture
def fits(monkeypatch):
    """What was fitted since."""
    found = []
    fit = Preconditioner.fit.__func__

    def counted(cls, store, kind="kfac", *args, **how):
        found.append(kind)
        return fit(cls, store, kind, *args, **how)

    monkeypatch.setattr(Preconditioner, "fit", classmethod(counted))
    return found


def kept(output):
    return list((output / "preconditioners").glob("*"))


def asked(ask, output, *more):
    return ask.objects(output, "--text", TEXT, "--score", "preconditioned", "--top_k", 5, *more)


def test_the_second_moment_is_fitted_once_and_serves_any_damping_and_layers(output, ask, fits):
    first = asked(ask, output)
    assert len(kept(output)) == 1
    assert asked(ask, output) == first
    for more in (("--damping", "10"), ("--layers", "layers.0")):
        again = asked(ask, output, *more)
        assert again != first
        shutil.move(output / "preconditioners", output / "aside")
        assert asked(ask, output, *more) == again  # as one that is fitted for it
        shutil.rmtree(output / "preconditioners")
        shutil.move(output / "aside", output / "preconditioners")
    assert fits == ["second_moment"] * 3


def test_relatif_is_made_with_either_curvature(output, queries, ask):
    flags = ("--queries", queries, "--score", "relatif", "--top_k", 9, "--bottom_k", 0)
    for kind in ("kfac", "second_moment"):
        with ProjectionStore(output) as store:
            fitted = Preconditioner.fit(store, kind)
            wanted = score(rows_of(output, queries), store, score="relatif", preconditioner=fitted)
        found = ask.objects(output, *flags, "--curvature", kind)
        for number, values in enumerate(wanted):
            got = found[9 * number : 9 * number + 9]
            assert [x["id"] for x in got] == np.argsort(-np.nan_to_num(values, nan=-np.inf))[
                :9
            ].tolist()
        assert any(
            line.startswith(f"score    relatif by {kind}: ")
            for line in ask(output, *flags, "--curvature", kind)[0]
        )


def test_token_covariances_are_kept_by_the_store_itself(output, ask):
    ask.objects(output, "--text", TEXT, "--score", "kfac")
    assert not (output / "preconditioners").exists()


def test_a_store_that_has_grown_or_was_mended_is_fitted_anew(job, output, tmp_path, ask, fits):
    records = {p: p.read_bytes() for p in (output / "units").glob("00000002.*")}
    shard = shard_of(output, 2).read_bytes()
    uncommit(output, 2)
    few = asked(ask, output)
    assert asked(ask, output) == few
    assert len(fits) == 1
    # Its last unit is committed now.
    shard_of(output, 2).write_bytes(shard)
    for path, data in records.items():
        path.write_bytes(data)
    merge(output)
    whole = asked(ask, output)
    assert len(fits) == 2
    assert whole == asked(ask, copy_of(job.output, tmp_path / "whole"))
    assert whole != few
    assert len(kept(output)) == 1
    # A shard is put in another's place.
    fits.clear()
    asked(ask, output)
    assert fits == []
    shard_of(output, 2).with_suffix(".new").write_bytes(shard)
    shard_of(output, 2).with_suffix(".new").rename(shard_of(output, 2))
    asked(ask, output)
    assert fits == ["second_moment"]


def test_a_record_that_follows_its_shard_is_noticed(output, ask, fits):
    record = next((output / "units").glob("00000002.*"))
    data = record.read_bytes()
    shard = shard_of(output, 2).read_bytes()
    uncommit(output, 2)
    shard_of(output, 2).write_bytes(shard)
    asked(ask, output)
    record.write_bytes(data)
    asked(ask, output)
    assert fits == ["second_moment"] * 2


def test_a_kept_file_that_is_damaged_is_replaced(output, ask, fits):
    first = asked(ask, output)
    cut(kept(output)[0])
    _, said = ask(
        output, "--text", TEXT, "--score", "preconditioned", "--top_k", 5, "--format", "jsonl"
    )
    assert "is damaged" in said
    assert "Fitting it again" in said
    assert fits == ["second_moment"] * 2
    assert asked(ask, output) == first
    assert len(fits) == 2


def test_an_output_that_cannot_be_written_is_asked_all_the_same(output, ask, monkeypatch):
    def read_only(path, *rest, **more):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    want = asked(ask, output)
    shutil.rmtree(output / "preconditioners")
    monkeypatch.setattr("pathlib.Path.mkdir", read_only)
    lines, said = ask(
        output, "--text", TEXT, "--score", "preconditioned", "--format", "jsonl", "--top_k", 5
    )
    assert "the second moment could not be cached for the next query: cannot write " in said
    assert len(lines) == len(want)
