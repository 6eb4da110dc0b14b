"""Whole gradients of layers equal autograd's of each sample alone, in every family."""

import pytest
import torch
from helpers.models import FAMILIES, ragged_batch, small_model
from helpers.references import relative_error, sample_loss

from gradproj.engine.batching import collate
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.layers import every_layer
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.whole_gradients import WholeGradients
from gradproj.errors import MixedSamplesError
from gradproj.model.sequences import TokenSequence

LENGTHS = [9, 5, 7]


def whole_gradients(model, layers, **options):
    """Return layer -> the batch's whole gradients, by ``WholeGradients``, and the samples."""
    ids, _ = ragged_batch(LENGTHS)
    windows = [TokenSequence.of(row[:n]) for row, n in zip(ids, LENGTHS, strict=True)]
    seen = {}

    def visit(number, batch):
        assert number not in seen
        parts = [batch.gradients(part) for part in batch.parts()]
        seen[number] = torch.cat(parts)
        assert batch.mask.sum() % (sum(LENGTHS) - len(LENGTHS)) == 0

    with WholeGradients(model, layers, **options) as whole:
        whole.run(collate(windows, range(len(windows))), visit)
    return {layers[n].name: g for n, g in seen.items()}, [torch.from_numpy(w.ids) for w in windows]


def by_autograd(model, layer, sample):
    weight = layer.module.weight
    (gradient,) = torch.autograd.grad(sample_loss(model, sample), [weight])
    return gradient if layer.rule.type_name == "Linear" else gradient.T


@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [(family, False) for family in (*sorted(FAMILIES), "zamba", "falcon", "olmo")]
    + [("gpt2", True), ("llama", True)],
)
def test_whole_gradients_equal_those_of_each_sample_alone(family, checkpointing):
    model = small_model(family)
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    # Of tied ends autograd gives the sum; position embeddings are looked up once for all samples.
    left_out = ends if ends[0].weight is ends[1].weight else ()
    layers = [x for x in every_layer(model) if x.module not in left_out and "wpe" not in x.name]
    flags = [p.requires_grad for p in model.parameters()]
    got, samples = whole_gradients(model, layers, gradient_checkpointing=checkpointing)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(module._forward_hooks for module in model.modules())
    reached = [layer for layer in layers if layer.name in got]
    assert len(reached) >= 0.7 * len(layers)
    for layer in reached:
        want = torch.stack([by_autograd(model, layer, sample) for sample in samples])
        assert relative_error(got[layer.name], want) < 1e-4, layer.name


def test_layer_that_mixes_samples_is_refused():
    model = small_model("gpt2")
    positions = [x for x in every_layer(model) if "wpe" in x.name]
    with pytest.raises(MixedSamplesError, match=r"wpe works on \(1, 9\) positions"):
        whole_gradients(model, positions)


def test_rows_of_the_engine_are_projections_of_the_whole_gradients():
    model = small_model("gpt2")
    engine = GradProjLoraEngine(model, freeze_weights=True)
    got, _ = whole_gradients(model, engine.targets)
    ids, labels = ragged_batch(LENGTHS)
    with engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        rows = engine.collect_batch()
    want = [
        (p_o @ got[name] @ p_i.T).flatten(1)
        for name, (p_i, p_o) in engine.projection_matrices.items()
    ]
    assert relative_error(rows, torch.cat(want, dim=1)) < 1e-5
