"""``query --score hidden`` against cosines of the model's own hidden states in float64."""

import numpy as np
import pytest
import torch
from helpers.corpora import mixed_documents
from helpers.jobs import run_job
from helpers.query_command import ask
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


def test_scores_are_cosines_of_the_models_states(made, ask, tmp_path):
    output, folder = made
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = [document["text"] for document in mixed_documents(N_DOCUMENTS)]
    asked = next(text for text in texts if 10 < len(tokenizer(text).input_ids) < 48)
    words = "--text", asked, "--score", "hidden", "--save_scores", tmp_path / "scores.npy"
    lines = ask.objects(output, *words, "--top_k", 5, "--bottom_k", 2)
    states = np.stack([state(model, tokenizer(text).input_ids[:48]) for text in texts])
    query = state(model, tokenizer(asked).input_ids)
    states, query = states - states.mean(axis=0), query - states.mean(axis=0)
    want = states @ query / np.linalg.norm(states, axis=1) / np.linalg.norm(query)
    np.testing.assert_allclose(np.load(tmp_path / "scores.npy")[0], want, atol=2e-3)
    top = [line["id"] for line in lines if line["end"] == "top"]
    assert top[0] == texts.index(asked)
    np.testing.assert_allclose([line["score"] for line in lines[:5]], want[top], atol=2e-3)
    table = ask(output, *words[:4], "--top_k", 1, "--bottom_k", 0)[0]
    assert any(line.startswith("score    hidden: cosine of the hidden states") for line in table)


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
