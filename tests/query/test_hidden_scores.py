"""``query --score hidden`` against cosines of the model's own hidden states in float64."""

import numpy as np
import pytest
import torch
from helpers.corpora import mixed_documents
from helpers.jobs import run_job
from helpers.outputs import EMPTY, ONE_TOKEN
from helpers.query_command import ask, write_queries
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj.store import HiddenStates

assert ask

N_DOCUMENTS = 24
SETTINGS = {
    "proj_rank_total": 16, "proj_rank_min": 4, "max_samples": N_DOCUMENTS, "max_length": 48,
    "hidden_state": "mean",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(job, tmp_path_factory):
    output = tmp_path_factory.mktemp("hidden_scores") / "out"
    run_job(shards=job.corpus, model=job.model, output_dir=output, **SETTINGS)
    return output, job.model


def state(model, ids):
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids]))[0][0, :-1]
    return hidden.mean(dim=0).numpy()


def job_texts():
    texts = [document["text"] for document in mixed_documents(N_DOCUMENTS)]
    texts[EMPTY], texts[ONE_TOKEN] = "", "t"
    return texts


def states_of(model, tokenizer, texts):
    """Return the documents' states ``(N, d)``, NaN of one without a target."""
    ids = [tokenizer(text).input_ids[:48] for text in texts]
    none = np.full(model.config.hidden_size, np.nan)
    return np.stack([state(model, x) if len(x) > 1 else none for x in ids])


def cosines(states, query):
    mean = np.nanmean(states, axis=0)
    states, query = states - mean, query - mean
    return states @ query / np.linalg.norm(states, axis=1) / np.linalg.norm(query)


def test_scores_are_cosines_of_the_models_states(made, ask, tmp_path):
    output, folder = made
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = job_texts()
    asked = next(text for text in texts if 10 < len(tokenizer(text).input_ids) < 48)
    words = "--text", asked, "--score", "hidden", "--save_scores", tmp_path / "scores.npy"
    lines = ask.objects(output, *words, "--top_k", 5, "--bottom_k", 2)
    states = states_of(model, tokenizer, texts)
    want = cosines(states, state(model, tokenizer(asked).input_ids))
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy")[0], want, atol=2e-3)
    top = [line["id"] for line in lines if line["end"] == "top"]
    assert top[0] == texts.index(asked)
    np.testing.assert_allclose([line["score"] for line in lines[:5]], want[top], atol=2e-3)
    table = ask(output, *words[:4], "--top_k", 1, "--bottom_k", 0)[0]
    assert any(line.startswith("score    hidden: cosine of the hidden states") for line in table)


@pytest.mark.parametrize("aggregate", ["mean", "max"])
def test_sets_less_a_control_set_are_scored(made, ask, tmp_path, aggregate):
    output, folder = made
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = job_texts()
    states = states_of(model, tokenizer, texts)
    asked = [n for n, text in enumerate(texts) if 1 < len(tokenizer(text).input_ids) <= 48][:4]
    queries = [write_queries(tmp_path / f"{n}.jsonl", *({"text": texts[i]} for i in ids))
               for n, ids in enumerate((asked[:3], asked[3:]))]  # fmt: skip
    words = "--queries", queries[0], "--contrast", queries[1], "--aggregate", aggregate
    ask(output, "--score", "hidden", *words, "--save_scores", tmp_path / "scores.npy")
    scores = np.stack([cosines(states, states[i]) for i in asked])
    want = getattr(scores[:3], aggregate)(axis=0) - scores[3]
    got = np.load(tmp_path / "scores.npy")
    np.testing.assert_allclose(got, want[None], atol=2e-3)
    groups = ask.objects(output, "--score", "hidden", *words, "--by", "domain")
    domains = np.array([d["meta"]["pile_set_name"] for d in mixed_documents(N_DOCUMENTS)])
    for group in groups:
        mean = np.nanmean(want[domains == group["group"]])
        assert group["mean"] == pytest.approx(mean, abs=2e-3)


def test_documents_of_a_query_store_are_compared(made, ask):
    output, _ = made
    words = "--query_store", output, "--score", "hidden", "--top_k", 1, "--bottom_k", 0
    for line in ask.objects(output, *words):
        assert line["score"] == pytest.approx(1, abs=1e-3)


def test_store_without_states_is_refused(job, made, ask):
    message = ask.mistake(job.output, "--text", "the of", "--score", "hidden")
    assert "has no hidden states: its job ran without --hidden_state" in message
    words = "--query_store", job.output, "--score", "hidden"
    assert "hidden" in ask.mistake(made[0], *words)
    words = "--text", "the of", "--score", "hidden", "--layers", "mlp"
    assert "uses no gradients" in ask.mistake(made[0], *words)
    assert HiddenStates(made[0]).dim == 32
