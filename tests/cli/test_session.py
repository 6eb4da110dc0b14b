"""A session answers many questions as `query` answers each, and its scans can be watched."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.outputs import copy_of, uncommit
from helpers.query_command import TEXT, ask  # noqa: F401

from gradproj.analysis.watch import ScanWatch, watching
from gradproj.cli.query import AnswerWatch, QueryConfig, Session, answer
from gradproj.cli.query.json_lines import json_lines
from gradproj.engine import token_parts
from gradproj.errors import GradprojError, StoreError
from gradproj.query import Query
from gradproj.store import ProjectionStore
from gradproj.store.unit_record import record_name

OTHER = "in was a it that"


class Stop(GradprojError):
    """Raised by a watch."""


class Record(AnswerWatch):
    """Keeps what a scan reports, and stops a scan after so many calls of ``advanced``."""

    def __init__(self, n_steps=None):
        self.n_steps, self.steps, self.ends, self.subjects = n_steps, [], [], None

    def asked(self, subjects, damping):
        self.subjects, self.damping = subjects, damping

    def advanced(self, n_done, n_total, what):
        self.steps.append((n_done, n_total))
        if self.n_steps is not None and len(self.steps) >= self.n_steps:
            raise Stop

    def found(self, ends):
        self.ends.append(ends())


def config(output, text=TEXT, **flags):
    return QueryConfig(output=str(output), text=text, device="cpu", **flags)


QUESTIONS = [
    {}, {"score": "kfac", "top_k": 3}, {"score": "relatif"},
    {"score": "cosine", "layers": ("mlp",)},
    {"score": "preconditioned", "damping": "0.1,1"}, {"score": "text"}, {"score": "kfac+text"},
    {"tokens": True, "top_k": 2}, {"text_matches": True, "show_text": True, "domains": ("Github",)},
]  # fmt: skip


def test_answers_of_a_session_are_those_of_query_in_any_order(output, ask):  # noqa: F811
    session = Session(str(output))
    got = {}
    for number in [*range(len(QUESTIONS)), 0, 2, 1]:  # the last ones from what is loaded by now
        watch = Record()
        found = answer(config(output, **QUESTIONS[number]), session, watch=watch)
        lines = list(json_lines(found))
        assert got.setdefault(number, lines) == lines
        assert watch.ends, "what was found was not reported"
        assert watch.steps[-1][0] == watch.steps[-1][1]
    for number, flags in enumerate(QUESTIONS):
        words = []
        for name, value in flags.items():
            value = ",".join(value) if isinstance(value, tuple) else value
            words += [f"--{name}"] if value is True else [f"--{name}", value]
        lines, _ = ask(output, "--text", TEXT, "--format", "jsonl", *words)
        assert got[number] == lines, flags


def test_what_was_found_so_far_is_exact_for_the_rows_so_far_and_at_the_end_the_answer(job):
    with ProjectionStore(job.output) as store:
        watch, session = Record(), Session(str(job.output))
        found = answer(config(job.output, score="dot", top_k=4, bottom_k=2), session, watch=watch)
        assert watch.subjects.names == ["text"]
        assert len(watch.steps) > 1
        assert all(total == len(store) for _, total in watch.steps)
    top, bottom = watch.ends[-1]
    np.testing.assert_array_equal(top.ids, found.rankings[0].top.ids)
    np.testing.assert_array_equal(bottom.scores, found.rankings[0].bottom.scores)


@pytest.mark.parametrize("score", ["kfac", "relatif", "preconditioned", "text", "kfac+text"])
def test_a_scan_can_be_stopped_between_blocks_and_the_session_goes_on(output, score):
    session = Session(str(output))
    with pytest.raises(Stop):
        answer(config(output, score=score), session, watch=Record(n_steps=1))
    temporary = [path for path in output.rglob("*") if path.name.endswith(".tmp")]
    assert temporary == []
    (ranking,) = answer(config(output, score=score), session).rankings
    assert ranking.top.n_scored > 1


def test_watches_are_of_a_block_of_code_alone(job):
    watch = Record()
    with watching(watch), watching(None):
        answer(config(job.output, score="dot"), Session(str(job.output)))
    assert not watch.steps
    assert ScanWatch().advanced(1, 2, "documents") is None


def test_queries_beside_the_flags_are_those_that_are_asked(job):
    session = Session(str(job.output))
    query = Query.of("text", prompt="the of", completion=" and to")
    given = answer(config(job.output, text="(another)"), session, texts=([query], None))
    assert given.queries.names == ["text"]
    assert given.queries.n_tokens[0] < answer(config(job.output), session).queries.n_tokens[0]


def test_rows_that_a_job_adds_count_in_the_next_answer(job, tmp_path):
    output = copy_of(job.output, tmp_path)
    whole = tmp_path / "whole"
    shutil.copytree(output, whole)
    uncommit(output, 1)
    session, flags = Session(str(output)), {"score": "preconditioned", "top_k": 50}
    before = answer(config(output, **flags), session).rankings[0]
    with ProjectionStore(whole) as store:
        shard = store.layout.shard_name(1)
    for name in (shard, record_name(1)):
        shutil.copy(whole / name, output / name)
    after = answer(config(output, **flags), session).rankings[0]
    assert after.top.n_scored > before.top.n_scored
    fresh = answer(config(output, **flags), Session(str(output))).rankings[0]
    np.testing.assert_array_equal(after.top.scores, fresh.top.scores)


def test_a_store_that_was_replaced_is_refused(output):
    session = Session(str(output))
    answer(config(output), session)
    metadata = output / "projections.zarr" / "zarr.json"
    content = json.loads(metadata.read_text())
    content["attributes"]["identity_hash"] = "another"
    metadata.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="was replaced by another store"):
        answer(config(output), session)


def test_the_wait_for_the_model_can_be_stopped(job):
    session, ready, done = Session(str(job.output)), threading.Event(), threading.Event()

    def hold():
        with session.model():
            ready.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    ready.wait(60)
    with pytest.raises(Stop):
        answer(config(job.output, score="dot"), session, watch=Record(n_steps=1))
    done.set()
    holder.join()
    assert answer(config(job.output, score="dot"), session).rankings[0].top.n_scored > 1


def test_a_question_of_scores_is_answered_between_the_texts_of_another(job, monkeypatch):
    """Each pass over a text waits for the model to be used by the other question in between."""
    monkeypatch.setattr(token_parts, "_TOKENS_AT_ONCE", 1)
    session, order = Session(str(job.output)), []
    plain = config(job.output, score="dot")
    answer(plain, session)

    class Other(AnswerWatch):
        def advanced(self, n_done, n_total, what):
            if what == "texts" and "other" not in order:
                with ThreadPoolExecutor(1) as pool:
                    pool.submit(answer, plain, session).result(60)
                order.append("other")
            order.append(what)

    split = answer(config(job.output, tokens=True, top_k=3), session, watch=Other())
    assert "other" in order
    assert order[order.index("other") :].count("texts") > 2
    assert split.tokens.found


def test_threads_share_a_session(job):
    session, flags = Session(str(job.output)), [{"score": "dot"}, {"tokens": True, "top_k": 2}]

    def lines(one):
        return list(json_lines(answer(config(job.output, **one), session)))

    want = [lines(one) for one in flags]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lines, 3 * flags)) == 3 * want


def test_the_store_opens_while_a_model_loads_and_the_wait_for_it_can_be_ended(output):
    session = Session(str(output))
    loads, may_go = threading.Event(), threading.Event()
    assert session._keep(("quick",), lambda: "kept") == "kept"

    def load():
        loads.set()
        assert may_go.wait(60)
        return "loaded"

    with ThreadPoolExecutor(3) as threads:
        try:
            loading = threads.submit(session._keep, ("slow",), load)
            assert loads.wait(60)
            assert len(threads.submit(session.open_store).result(10)) > 0
            assert threads.submit(session._keep, ("quick",), load).result(10) == "kept"
            assert threads.submit(session.index, config(output)).result(60)

            def ask():
                with watching(Record(n_steps=1)):
                    session._keep(("slow",), load)

            with pytest.raises(Stop):
                threads.submit(ask).result(10)
        finally:
            may_go.set()
        assert loading.result(60) == "loaded"
