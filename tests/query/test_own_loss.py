"""Rows of losses of the caller's own against float64 autograd, one query at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.corpora import words
from helpers.jobs import run_job
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import ProjectionStore, per_sample_loss
from gradproj.analysis import top_and_bottom
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.selection import find_layers
from gradproj.errors import ConfigError
from gradproj.query import Query, QueryProjector

QUERIES = [
    Query.of("a", text=words(9, 5)),
    Query.of("b", text=words(14, 6)),
    Query.of("c", prompt=words(5, 7), completion=" " + words(6, 8)),
]
PROBE = torch.linspace(-1, 1, 32)


@pytest.fixture(scope="module")
def made(job, tmp_path_factory):
    """A store with a basis, whose jobs would divide rows by tokens, and its model in float64."""
    output = tmp_path_factory.mktemp("own_loss") / "out"
    settings = {"proj_rank_total": 16, "proj_rank_min": 4, "max_samples": 20, "pilot_tokens": 200}
    run_job(
        shards=job.corpus, model=job.model, output_dir=output, basis="eigen", encoding="signs",
        max_length=40, **settings,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float64).eval()
    with ProjectionStore(output) as store:
        yield store, model, AutoTokenizer.from_pretrained(job.model)


@pytest.fixture(scope="module")
def projector(made):
    return QueryProjector(made[0], device="cpu")


def last(inputs):
    return torch.arange(len(inputs["input_ids"])), inputs["attention_mask"].sum(dim=1) - 1


def log_odds(model, inputs):
    logits = model(input_ids=inputs["input_ids"]).logits[last(inputs)]
    return logits[:, 5] - logits[:, 9]


def probe(model, inputs):
    """A probe on the mean hidden state between the two blocks: the second has no gradient."""
    mask = inputs["attention_mask"]
    states = model(**batch(inputs), output_hidden_states=True).hidden_states[1]
    mean = (states * mask[:, :, None]).sum(dim=1) / mask.sum(dim=1, keepdim=True)
    return torch.tanh(mean @ PROBE.to(mean))


def batch(inputs):
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def divergence(model, inputs):
    """The divergence of the model from one that says nothing, over the real tokens."""
    with torch.no_grad():
        other = model(input_ids=inputs["input_ids"]).logits.log_softmax(-1) / 2
    logs = model(**batch(inputs)).logits.log_softmax(dim=-1)
    return ((logs.exp() * (logs - other)).sum(dim=-1) * inputs["attention_mask"]).sum(dim=1)


def less_of_the_completion(model, inputs):
    """A loss made of gradproj's own, with a factor of -2 of which the engine must not know."""
    return -2 * per_sample_loss(model, dict(inputs), causal=False)


def autograd_row(made, loss, query):
    store, model, tokenizer = made
    text, prompt = query.content.plain_text(), getattr(query.content, "prompt", "")
    ids = torch.tensor([tokenizer(text).input_ids])
    labels = ids.clone()
    n_prompt = len(tokenizer(prompt).input_ids) if prompt else 1
    labels[:, :n_prompt] = -100
    model.requires_grad_(True)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    if loss is less_of_the_completion:
        logits = model(input_ids=ids).logits[0]
        value = -2 * F.cross_entropy(logits[:-1], labels[0, 1:], reduction="sum")
    else:
        (value,) = loss(model, inputs)
    targets = find_layers(model, ProjectionConfig().layers.split(","))
    weights = [target.module.weight for target in targets]
    gradients = torch.autograd.grad(value, weights, allow_unused=True)
    row = []
    for target, gradient in zip(targets, gradients, strict=True):
        p_i, p_o = store.projection_matrices[target.name]
        r_i, r_o = store.basis[target.name]
        left, right = (
            torch.tensor(r @ p, dtype=torch.float64) for r, p in ((r_o, p_o), (r_i, p_i))
        )
        gradient = torch.zeros_like(target.module.weight) if gradient is None else gradient
        row.append((left @ gradient @ right.T).flatten())
    return torch.cat(row).detach().numpy(), value.item()


@pytest.mark.parametrize("loss", [log_odds, probe, divergence, less_of_the_completion])
def test_rows_of_a_loss_are_those_of_autograd(made, projector, loss):
    got = projector.rows_of(loss, QUERIES)
    assert got.names == ["a", "b", "c"]
    for number, query in enumerate(QUERIES):
        row, value = autograd_row(made, loss, query)
        assert np.linalg.norm(got.rows[number] - row) < 1e-5 * np.linalg.norm(row)
        assert got.loss[number] == pytest.approx(value, rel=1e-4, abs=1e-5)
    top, _ = top_and_bottom(got.rows, made[0], 3, 0)
    assert top.ids.shape == (3, 3)


def mixed(model, inputs):
    values = log_odds(model, inputs)
    return values - 0.5 * values.mean()


def over_padding(model, inputs):
    return model(**batch(inputs)).logits[:, :, 5].mean(dim=1)


def of_the_batch(model, inputs):
    return log_odds(model, inputs).sum()


def twice(model, inputs):
    return log_odds(model, inputs) + log_odds(model, inputs)


def detached(model, inputs):
    return log_odds(model, inputs).detach()


def of_the_embedding_alone(model, inputs):
    states = model(**batch(inputs), output_hidden_states=True).hidden_states[0]
    return states.sum(dim=(1, 2)) + 0 * log_odds(model, inputs).detach()


def constant(model, inputs):
    return log_odds(model, inputs) * 0


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (mixed, r"rows_of: query 'a' has the loss .* alone .* batch of 3"),
        (over_padding, r"rows_of: query 'a' has the loss .*attention_mask is 0 there"),
        (of_the_batch, r"float32 \(\); return a floating-point tensor \(3,\)"),
        (twice, "more than once with gradients"),
        (detached, "does not depend on the layers"),
        (of_the_embedding_alone, "does not depend on the layers"),
        (constant, "is zero, which ranks no document"),
    ],
)
def test_loss_that_gives_no_right_rows_is_refused_by_name(projector, loss, message):
    with pytest.raises(ConfigError, match=message):
        projector.rows_of(loss, QUERIES)
    assert projector.rows_of(log_odds, QUERIES[:1]).rows.any()  # nothing of it is left


def test_query_of_several_windows_is_refused(projector):
    with pytest.raises(ConfigError, match="tokens"):
        projector.rows_of(log_odds, [Query.of("long", text=words(200, 1))])
