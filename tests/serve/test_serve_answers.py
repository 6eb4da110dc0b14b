"""The JSON API on a real store: answers, documents, views, and what it refuses."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest

pytest.importorskip("starlette")

from helpers.asgi import Client
from helpers.outputs import copy_of, cut, shard_of, uncommit
from helpers.query_command import TEXT, ask  # noqa: F401
from helpers.report_page import HOSTILE_TEXTS, shared_job

from gradproj.analysis import score
from gradproj.analysis.document_map import document_map
from gradproj.cli.query import Session
from gradproj.cli.serve.command import ServeConfig, explorers_of
from gradproj.errors import ModelError
from gradproj.maintenance.status import read_status
from gradproj.query.tokens import QueryTokenizer
from gradproj.serve.app import Access, Server
from gradproj.serve.scans import ScanQueue
from gradproj.store import STATUS, ProjectionStore


def client_of(*outputs, **flags):
    config = ServeConfig(
        output=str(outputs[0]), others=tuple(map(str, outputs[1:])), device="cpu", **flags
    )
    return Client(Server(explorers_of(config), ScanQueue(2, 8, 600)).app(Access()))


@pytest.fixture(scope="module")
def client(job):
    return client_of(job.output)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({}, []),
        ({"score": "relatif", "bottom_k": 0}, ["--score", "relatif", "--bottom_k", 0]),
        ({"layers": ["mlp"], "damping": "0.3"}, ["--layers", "mlp", "--damping", "0.3"]),
        ({"tokens": True, "top_k": 2}, ["--tokens", "--top_k", 2]),
        ({"show_text": True, "top_k": 1}, ["--show_text", "--top_k", 1]),
    ],
)  # fmt: skip
def test_answers_are_the_lines_of_query(job, client, ask, question, words):  # noqa: F811
    lines, about = ask(job.output, "--text", TEXT, "--format", "jsonl", *words)
    question = {"text": TEXT, **question}
    status, _, body = client.post("/api/query", {**question, "stream": False})
    assert (status, body.decode().splitlines()) == (200, lines)
    events = client.events("/api/query", question)
    assert events[-1]["hits"] == [json.loads(line) for line in lines]
    assert "\n".join(events[-1]["summary"]) in about
    kinds = [event["event"] for event in events]
    assert kinds.index("asked") < kinds.index("partial") < kinds.index("answer")
    partial = next(event for event in reversed(events) if event["event"] == "partial")
    for hit, whole in zip(partial["hits"], events[-1]["hits"], strict=True):
        assert hit.items() <= whole.items()


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"text": "the", "queries": "/etc/passwd"}, "no 'queries'"),
        ({"text": "the", "save_scores": "/tmp/x.npy"}, "no 'save_scores'"),
        ({"text": "the", "query_model": "/tmp"}, "no 'query_model'"),
        ({"text": "the", "score": "best"}, "--score is 'best'"),
        ({"text": "the", "layers": "mlp"}, "layers must be a list"),
        ({"text": "the", "layers": ["nothing"]}, "no layer 'nothing'"),
        ({"text": "the", "domains": ["nowhere"]}, "no domain 'nowhere'"),
        ({"text": "the", "top_k": 10**9}, "top_k must be a number from 0 to 200"),
        ({"text": "the", "top_k": True}, "top_k must be a number"),
        ({"text": "the", "damping": "-1"}, "--damping is '-1'"),
        ({"text": ""}, "it is empty"),
        ({"text": 7}, "text"),
        ({}, "text"),
        ({"text": "the of " * 100}, "shorten it"),
        ({"text": "x" * 5001}, "--max_query_characters"),
        ({"messages": [{"role": "user", "content": "a" * 5001}]}, "--max_query_characters"),
    ],
)  # fmt: skip
def test_a_question_that_cannot_be_answered_names_what_is_wrong(job, question, message):
    asked = client_of(job.output, max_query_characters=5000)
    last = asked.events("/api/query", question)[-1]
    assert last["event"] == "error"
    assert message in last["message"]


def test_a_document_is_shown_in_parts_and_its_beginning_can_be_asked_with(job, client):
    with ProjectionStore(job.output) as store:
        (sample,) = store.samples([3], text=True)
    status, _, body = client.get("/api/outputs/0/documents/3")
    found = json.loads(body)
    assert status == 200
    assert found["text"] == sample.text[:20_000]
    assert (found["key"], found["domain"]) == (sample.key, sample.domain)
    rest = json.loads(client.get("/api/outputs/0/documents/3?start=5")[2])
    assert rest["text"] == sample.text[5:]
    question = found["text"][: found["n_question"]]
    hits = client.events("/api/query", {"text": question, "top_k": 1})[-1]["hits"]
    assert hits[0]["id"] == 3  # by its own gradient, it is the nearest to itself
    longer = found["text"][: found["n_question"] + 1]
    if len(longer) > len(question):
        assert client.events("/api/query", {"text": longer})[-1]["event"] == "error"


def test_a_document_can_be_read_when_the_model_is_gone(job, monkeypatch):
    def gone(*_):
        raise ModelError("the model is gone")

    monkeypatch.setattr(Session, "projector", gone)
    (explorer,) = explorers_of(ServeConfig(output=str(job.output), device="cpu"))
    found = explorer.document(3, 0)
    assert found["text"]
    assert found["n_question"] == 0


def test_the_map_has_the_principal_components_of_unit_rows(job):
    with ProjectionStore(job.output) as store:
        found = document_map(store, score="dot")
        ok = np.flatnonzero(store.column("status") == STATUS["ok"])
        rows = store.rows(ok).astype(np.float64)
        assert score(rows[:1], store, score="dot").shape == (1, len(store))
        few = document_map(store, n=10, score="dot")
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    centred = unit - unit.mean(axis=0)
    _, sizes, directions = np.linalg.svd(centred, full_matrices=False)
    np.testing.assert_array_equal(found.ids, ok)
    for axis in range(2):
        want = centred @ directions[axis]
        sign = np.sign(want @ found.places[:, axis])
        np.testing.assert_allclose(found.places[:, axis], sign * want, atol=1e-5)
    np.testing.assert_allclose(found.explained, (sizes**2 / (sizes**2).sum())[:2], atol=1e-6)
    assert len(few.ids) == 10
    assert set(few.ids) <= set(ok.tolist())


def test_views_of_the_store_and_of_the_job(job, client):
    made = client.events("/api/outputs/0/overview")[-1]["overview"]
    with ProjectionStore(job.output) as store:
        counts, n_domains = store.status_counts(), len(store.domains)
    assert ["ok", f"{counts['ok']:,}", "has a row"] in made["statuses"]
    assert len(made["domains"]["lines"]) == n_domains
    assert sum(made["histograms"][0]["counts"]) == pytest.approx(counts["ok"], rel=0.02)
    assert {len(m["values"]) for m in made["matrices"]} == {len(made["matrices"][0]["names"])}
    assert client.events("/api/outputs/0/overview")[-1]["overview"] == made
    placed = client.events("/api/outputs/0/map")[-1]["map"]
    assert len(placed["ids"]) == len(placed["x"]) == len(placed["domain"]) == counts["ok"]
    status = json.loads(client.get("/api/outputs/0/status")[2])
    assert status == json.loads(json.dumps(asdict(read_status(job.output))))
    (facts,) = json.loads(client.get("/api/outputs")[2])["outputs"]
    assert facts["rows"] == counts["ok"]
    assert facts["is_complete"]


def test_it_is_known_whether_there_is_a_chat_template_once_the_model_is_loaded(job, monkeypatch):
    (explorer,) = explorers_of(ServeConfig(output=str(job.output), device="cpu"))
    assert explorer.facts()["takes_chat"] is None
    explorer.load()
    assert explorer.facts()["takes_chat"] is False
    monkeypatch.setattr(QueryTokenizer, "takes_chat", True)
    explorer.load()
    assert explorer.facts()["takes_chat"] is True


def test_an_unfinished_store_answers_from_the_rows_that_are_there(output):
    uncommit(output, 1)
    asked = client_of(output)
    (facts,) = json.loads(asked.get("/api/outputs")[2])["outputs"]
    assert facts["missing"] == 16
    assert not facts["is_complete"]
    hits = asked.events("/api/query", {"text": TEXT, "top_k": 60})[-1]
    assert hits["event"] == "answer"
    assert not {hit["id"] for hit in hits["hits"]} & set(range(16, 32))
    assert any("cosine" in note for note in hits["notes"])
    assert json.loads(asked.get("/api/outputs/0/status")[2])["n_committed"] == 4


@pytest.mark.parametrize("damage", ["cut", "gone", "replaced"])
def test_a_store_that_is_damaged_or_replaced_under_the_server_is_named(output, damage):
    asked = client_of(output)
    question = {"text": TEXT, "score": "dot"}
    assert asked.events("/api/query", question)[-1]["event"] == "answer"
    if damage == "cut":
        cut(shard_of(output, 1))
    elif damage == "gone":
        shutil.rmtree(output)
    else:
        path = output / "projections.zarr" / "zarr.json"
        content = json.loads(path.read_text())
        content["attributes"]["identity_hash"] = "another"
        path.write_text(json.dumps(content))
    last = asked.events("/api/query", question)[-1]
    assert last["event"] == "error"
    word = {"cut": "damaged", "gone": "no store", "replaced": "was replaced"}[damage]
    assert word in last["message"]
    (facts,) = json.loads(asked.get("/api/outputs")[2])["outputs"]
    assert ("problem" in facts) == (damage != "cut")
    assert asked.get("/")[0] == 200


def test_outputs_are_asked_side_by_side(job, tmp_path):
    other = copy_of(job.output, tmp_path)
    asked = client_of(job.output, other)
    names = [output["title"] for output in json.loads(asked.get("/api/outputs")[2])["outputs"]]
    assert len(set(names)) == 2
    one, two = (asked.events("/api/query", {"text": TEXT, "output": n})[-1] for n in (0, 1))
    assert one["hits"] == two["hits"]


def test_hostile_documents_are_sent_as_strict_json(tmp_path, tmp_path_factory):
    made = shared_job(tmp_path_factory.getbasetemp() / "report")
    asked = client_of(copy_of(made.output, tmp_path))
    for question in ({"show_text": True}, {"tokens": True}, {"text_matches": True}):
        last = asked.events("/api/query", {"text": "the of and", "top_k": 60, **question})[-1]
        assert last["event"] == "answer"
    for number, text in enumerate(HOSTILE_TEXTS):
        status, headers, body = asked.get(f"/api/outputs/0/documents/{number}")
        assert status == 200
        assert headers["content-type"] == "application/json"
        assert len(body) < 2_000_000
        shown = json.loads(body)["text"]
        # Half of a surrogate pair is no text, and its document could not be read.
        assert shown == text[:20_000] or ("\ud800" in text and shown.startswith("("))
    for path in ("overview", "map"):
        assert asked.events(f"/api/outputs/0/{path}")[-1]["event"] == "answer"
