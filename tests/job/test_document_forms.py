"""Rows of documents of every form equal plain autograd of their masked loss, in the job."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.chat import (
    LLAMA_3,
    TEMPLATES,
    chat_tokenizer,
    conversation,
    parts_of,
    tokens_of,
)
from helpers.corpora import make_corpus, words
from helpers.jobs import assert_same_bits, flags, run_job
from helpers.killed_jobs import run_killed_and_resumed
from helpers.models import make_model
from helpers.outputs import uncommit
from transformers import AutoModelForCausalLM

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.analysis import score
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.selection import find_layers
from gradproj.query import Query, QueryProjector
from gradproj.store.layout import STATUS

BETA = 0.3
SETTINGS = {
    "proj_rank_total": 16, "proj_rank_min": 4, "proj_dtype": "float32", "max_length": 256,
    "batch_size": 6, "rows_per_shard": 16, "preference_beta": BETA,
}  # fmt: skip
A, B, C, D = (words(n, n) for n in (5, 6, 7, 8))
CHAT = conversation(A, B, C, D)
TURN = {"role": "assistant", "content": D}


def documents_and_parts(family):
    """Return each document's fields and its sequences, written by hand.

    A sequence is ``(factor, parts)``, the targets among the parts in lists; parts of numbers are
    token ids.
    """
    half = BETA / 2
    first = parts_of(family, CHAT[:3])
    answers = [parts_of(family, conversation(A, text)) for text in (B, D)]
    return [
        ({"text": A}, [(1, [[A]])]),
        ({"text": A, "weight": -2.5}, [(-2.5, [[A]])]),
        ({"prompt": f"{A}\n", "completion": B}, [(1, [f"{A}\n", [B]])]),
        ({"prompt": f"{A}\n", "completion": B, "weight": 0.5}, [(0.5, [f"{A}\n", [B]])]),
        ({"prompt": "", "completion": B}, [(1, [[B]])]),
        ({"messages": CHAT}, [(1, parts_of(family, CHAT))]),
        ({"messages": CHAT, "weight": 3}, [(3, parts_of(family, CHAT))]),
        (
            {"conversations": [{"from": "human", "value": A}, {"from": "gpt", "value": B}]},
            [(1, answers[0])],
        ),
        (
            {"prompt": CHAT[:3], "completion": [TURN]},
            [(1, ["".join(map("".join, first)), *parts_of(family, CHAT)[len(first) :]])],
        ),
        (
            {"prompt": f"{A}\n", "chosen": B, "rejected": C},
            [(half, [f"{A}\n", [B]]), (-half, [f"{A}\n", [C]])],
        ),
        (
            {"chosen": conversation(A, B), "rejected": conversation(A, D), "weight": 2},
            [(2 * half, answers[0]), (-2 * half, answers[1])],
        ),
        ({"prompt": A, "chosen": [{"role": "assistant", "content": B}], "rejected": [TURN]},
         [(half, answers[0]), (-half, answers[1])]),
        ({"input_ids": [9, 8, 7, 6], "labels": [-100, 8, -100, 6]}, [(1, [9, [8], 7, [6]])]),
        ({"input_ids": [9, 8, 7, 6], "weight": 4}, [(4, [[9], [8], [7], [6]])]),
        ({"text": A, "weight": 0}, [(0, [[A]])]),
        ({"messages": conversation(A)}, []),
        ({"messages": []}, "empty"),
        ({"messages": [{"role": "user", "content": 5}]}, "bad_input"),
        ({"messages": CHAT, "weight": "2"}, "bad_input"),
        ({"input_ids": [5, 6], "labels": [6, -100]}, "bad_input"),
        ({"prompt": words(300, 1), "completion": B}, []),
        ({"text": B}, [(1, [[B]])]),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Family -> a small model and its tokenizer with the family's template."""
    made = {}
    for family in TEMPLATES:
        folder = tmp_path_factory.mktemp(family)
        tokenizer = chat_tokenizer(family)
        make_model(folder, vocab_size=len(tokenizer), max_position_embeddings=256)
        chat_tokenizer(family, folder)
        made[family] = folder
    return made


@pytest.fixture(scope="module")
def jobs(models, tmp_path_factory):
    """Family -> the settings of a finished job with every form of documents."""
    made = {}
    for family, model in models.items():
        root = tmp_path_factory.mktemp("forms")
        documents = [fields for fields, _ in documents_and_parts(family)]
        made[family] = {
            **SETTINGS, "shards": make_corpus(root / "tars", documents), "model": model,
            "output_dir": root / "out", "loss_reduction": "mean" if family == "qwen" else "sum",
        }  # fmt: skip
        run_job(**made[family])
    return made


def sequence_of(tokenizer, parts):
    """Return ids and labels, -100 for a token without a loss."""
    if isinstance(parts[-1], list) and isinstance(parts[-1][0], int):
        ids = [part[0] if isinstance(part, list) else part for part in parts]
        return ids, [part[0] if isinstance(part, list) else -100 for part in parts]
    ids, mask = tokens_of(tokenizer, parts)
    return ids, [token if is_target else -100 for token, is_target in zip(ids, mask, strict=True)]


def slow_row(model, targets, matrices, tokenizer, sequences, divides):
    """Return ``(row, number of targets, summed loss)`` by float64 autograd, without gradproj."""
    row, n_targets, summed = 0.0, 0, 0.0
    for factor, parts in sequences:
        ids, labels = (torch.tensor(x) for x in sequence_of(tokenizer, parts))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum")
        gradients = torch.autograd.grad(loss, [target.module.weight for target in targets])
        flat = [
            (torch.tensor(p_o, dtype=torch.float64) @ gradient
             @ torch.tensor(p_i, dtype=torch.float64).T).flatten()
            for (p_i, p_o), gradient in zip(matrices, gradients, strict=True)
        ]  # fmt: skip
        row = row + factor * torch.cat(flat)
        n_targets += int((labels[1:] != -100).sum())
        summed += loss.item()
    return (row / n_targets if divides else row).numpy(), n_targets, summed


@pytest.mark.parametrize("family", TEMPLATES)
def test_rows_are_autograds_of_the_masked_and_weighted_loss(jobs, family):
    settings = jobs[family]
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float64).eval()
    targets = find_layers(model, ProjectionConfig().layers.split(","))
    tokenizer = chat_tokenizer(family)
    with ProjectionStore(settings["output_dir"]) as store:
        names = {number: name for name, number in STATUS.items()}
        matrices = [store.projection_matrices[t.name] for t in targets]
        statuses = [names[s] for s in store.column("status")]
        for i, (fields, expected) in enumerate(documents_and_parts(family)):
            sample = store.samples([i])[0]
            if not isinstance(expected, list) or not expected:
                assert statuses[i] == (expected or "no_target"), fields
                assert sample.n_tokens == 0
                continue
            row, n_targets, summed = slow_row(
                model, targets, matrices, tokenizer, expected, settings["loss_reduction"] == "mean"
            )
            got = store.rows([i])[0]
            assert (statuses[i], sample.n_tokens) == ("ok", n_targets), fields
            assert np.linalg.norm(got - row) <= 1e-5 * np.linalg.norm(row), fields
            assert sample.loss == pytest.approx(summed / n_targets, rel=1e-5), fields


@pytest.mark.parametrize("family", TEMPLATES)
def test_query_of_any_form_has_the_row_of_its_document_and_finds_it(jobs, family):
    with ProjectionStore(jobs[family]["output_dir"]) as store:
        ok = np.flatnonzero(store.column("status") == STATUS["ok"])
        forms = documents_and_parts(family)
        asked = {i: forms[i][0] for i in ok.tolist() if forms[i][0].get("weight") != 0}
        queries = [Query.of(str(i), **fields) for i, fields in asked.items()]
        got = QueryProjector(store, device="cpu").rows(queries)
        want, columns = store.rows(list(asked)), store.samples(list(asked))
        cosines = score(got.rows, store, score="cosine")
    for place, i in enumerate(asked):
        assert np.linalg.norm(got.rows[place] - want[place]) <= 1e-5 * np.linalg.norm(want[place])
        assert got.n_tokens[place] == columns[place].n_tokens
        assert got.loss[place] == pytest.approx(columns[place].loss, rel=1e-5)
        assert cosines[place, i] >= np.nanmax(cosines[place]) - 1e-4
    # The conversation is planted twice, beside others and texts of the same words.
    chat = next(place for place, i in enumerate(asked) if "messages" in asked[i])
    best = np.argsort(-np.nan_to_num(cosines[chat], nan=-1))[:2]
    assert all(forms[i][0].get("messages") == CHAT for i in best)


def test_killed_job_continues_with_the_same_bits(jobs, tmp_path, monkeypatch):
    settings = jobs["llama3"]
    again = settings | {"output_dir": tmp_path / "out", "proj_save_interval": 1}
    run_killed_and_resumed(monkeypatch, **again)
    assert_same_bits(again["output_dir"], settings["output_dir"])


def test_another_template_is_refused_and_the_kept_one_answers(jobs, tmp_path, capsys):
    settings = jobs["llama3"]
    output = settings["output_dir"]
    assert (output / "chat_template.jinja").read_text() == LLAMA_3
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATES["qwen"])
    done = run_job(expect=None, **settings | {"chat_template": other})
    assert done.returncode == 2
    assert "--chat_template: store '', this run" in done.stderr
    assert main(["verify", str(output), "--recompute", "30", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "differ" not in out


@pytest.mark.parametrize("changed", [LLAMA_3.replace("trim", "upper"), None])
def test_template_of_the_tokenizer_that_changed_is_refused(jobs, changed, tmp_path):
    settings = jobs["llama3"]
    tokenizer = chat_tokenizer("llama3")
    tokenizer.chat_template = changed
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    done = run_job(expect=None, **settings | {"tokenizer": tmp_path / "tokenizer"})
    assert done.returncode == 2
    assert "the tokenizer's chat template is not the one that it was begun with" in done.stderr


def test_job_that_was_begun_without_a_template_is_not_continued_with_one(models, tmp_path):
    """Its conversations are bad input; later units would have rows of theirs."""
    for name, family in (("without", None), ("with", "qwen")):
        chat_tokenizer(family, tmp_path / name)
    settings = SETTINGS | {
        "shards": make_corpus(tmp_path / "tars", [{"text": A}, {"messages": CHAT}, {"text": B}]),
        "model": models["qwen"], "output_dir": tmp_path / "out", "tokenizer": tmp_path / "without",
    }  # fmt: skip
    run_job(**settings)
    done = run_job(expect=None, **settings | {"tokenizer": tmp_path / "with"})
    assert done.returncode == 2
    assert "it was begun without a chat template" in done.stderr


def test_conversations_without_a_template_are_an_error_at_the_start(models, tmp_path):
    corpus = make_corpus(tmp_path / "tars", [{"messages": CHAT}] * 5)
    chat_tokenizer(None, tmp_path / "plain")
    settings = SETTINGS | {
        "shards": corpus, "model": models["qwen"], "output_dir": tmp_path / "out",
        "tokenizer": tmp_path / "plain",
    }  # fmt: skip
    done = run_job(expect=None, **settings)
    assert done.returncode == 2
    assert "no chat template: give one with --chat_template FILE" in done.stderr
    (tmp_path / "chatml.jinja").write_text(TEMPLATES["qwen"])
    run_job(**settings | {"chat_template": tmp_path / "chatml.jinja"})
    with ProjectionStore(tmp_path / "out") as store:
        assert (store.column("status") == STATUS["ok"]).all()


def test_plan_shows_tokens_and_marks_the_targets(jobs, capsys):
    settings = jobs["qwen"] | {"output_dir": "nowhere", "device": "cpu"}
    assert main(["plan", *flags(**settings), "--show", "20"]) == 0
    out = capsys.readouterr().out
    lines = out.split("document 2 (")[1].split("\n\n")[0].splitlines()
    marked = "".join(a for a, b in zip(lines[1], lines[2], strict=False) if b == "^")
    assert marked.replace("·", " ") == B
    assert "its gradient times -0.15" in out
    assert "no row: no target" in out
    assert 'no row: "weight" is not a number but a string' in out


def test_store_of_an_older_version_is_continued_by_its_reading(models, tmp_path):
    """It has no mark of the forms: what has a text is that text alone, as in its other rows."""
    documents = [
        {"text": A, "prompt": B, "completion": C, "weight": 3},
        {"input_ids": [9, 8, 7, 6], "labels": [-100, 8, 7, 6], "text": B},
        {"messages": CHAT},
    ]
    settings = SETTINGS | {
        "shards": make_corpus(tmp_path / "tars", documents), "model": models["qwen"],
        "output_dir": tmp_path / "out", "loss_reduction": "sum",
    }  # fmt: skip
    run_job(**settings)
    metadata = tmp_path / "out" / "projections.zarr" / "zarr.json"
    recorded = json.loads(metadata.read_text())
    assert recorded["attributes"].pop("document_forms")
    metadata.write_text(json.dumps(recorded))
    uncommit(tmp_path / "out", 0)
    run_job(**settings)
    with ProjectionStore(tmp_path / "out") as store:
        names = {number: name for name, number in STATUS.items()}
        assert [names[s] for s in store.column("status")] == ["ok", "ok", "bad_input"]
        queries = [Query.of("a", text=A), Query.of("b", input_ids=[9, 8, 7, 6])]
        want = QueryProjector(store, device="cpu").rows(queries).rows
        np.testing.assert_allclose(store.rows([0, 1]), want, rtol=1e-4, atol=1e-6)
        assert [sample.text for sample in store.samples([0, 1], text=True)] == [A, B]
    assert main(["verify", str(tmp_path / "out"), "--recompute", "3", "--device", "cpu"]) == 0
