"""Steps of a loop with GradDotProd, and comparisons of their gradients."""

import torch
import zarr
from helpers.models import ragged_batch, small_model
from helpers.references import loss_of
from torch import nn
from torch.optim import AdamW

from gradproj.training.graddotprod.engine import GradDotProdEngine

LENGTHS, VAL_LENGTHS = [9, 21, 4, 14], [7, 25]
IDS = [30, 10, 40, 20]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def run_batch(engine, model, ids, labels, step=0, sample_ids=None, scale=1.0):
    """Run one micro-batch of a loop; return its inner products."""
    engine.attach_train_batch(ids, labels, step, IDS if sample_ids is None else sample_ids)
    joined = engine.prepare_forward_input(ids, labels)
    (loss_of(model, *joined) * scale).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


def assert_close(got, want, sizes, tolerance=1e-4):
    """Compare relatively, with float32 rounding allowed for nearly orthogonal gradients."""
    floor = sizes * 1e-2 + sizes.max(dim=0).values * 1e-4 + 1e-12
    assert ((got - want).abs() / torch.maximum(want.abs(), floor)).max() < tolerance


def gradients_of(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_same_gradients(model, wanted, tolerance=1e-5):
    for (name, p), want in zip(model.named_parameters(), wanted, strict=True):
        assert (p.grad - want).norm() <= tolerance * want.norm() + 1e-9, name


def trained(with_engine, result_dir=None, n_steps=3, family="gpt2", checkpointing=False):
    """Return model and engine after clipped steps of two micro-batches each."""
    model = small_model(family, **(NO_DROPOUT if family == "gpt2" else {}))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    # The gradient of the keys' bias is rounding only. With a tiny epsilon, Adam would turn it into
    # whole steps.
    optimizer = AdamW(model.parameters(), lr=1e-3, eps=1e-6)
    validation = ragged_batch(VAL_LENGTHS, seed=5)
    engine = GradDotProdEngine(
        model, validation, learning_rate=optimizer, accumulation=2, result_dir=result_dir
    )
    if with_engine:
        engine.attach()
    for step in range(n_steps):
        for part in range(2):
            train = ragged_batch(LENGTHS, seed=10 * step + part)
            if with_engine:
                run_batch(engine, model, *train, step, scale=0.5)
            else:
                (loss_of(model, *train) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        if with_engine and engine.should_save_metrics(step):
            engine.save_metrics(step)
    engine.cleanup()
    return model, engine


def columns(folder):
    group = zarr.open_group(str(folder / "grad_dotprod"), mode="r")
    assert group.metadata.zarr_format == 3
    return group, {
        name: group[name][:] for name in ("step", "sample_id", "total", "value", "per_parameter")
    }
