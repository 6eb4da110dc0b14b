"""GradDotProd's laws: every inner product is that of explicit gradients, and training goes on as without the engine."""

import gc
import json
import weakref
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import zarr
from models import ragged_batch, small_model
from torch import nn
from torch.optim import AdamW

from gradproj.errors import ConfigError, ModelError, StoreError
from gradproj.training import dotproducts
from gradproj.training.dotproducts import Dense
from gradproj.training.graddotprod import GradDotProdEngine
from gradproj.training.values import value_table

LENGTHS, VAL_LENGTHS = [9, 21, 4, 14], [7, 25]
IDS = [30, 10, 40, 20]
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def loss_of(model, ids, labels):
    return model(input_ids=ids, labels=labels, use_cache=False).loss


def run_batch(engine, model, ids, labels, step=0, sample_ids=None, scale=1.0):
    """What a loop does between two optimizer steps."""
    engine.attach_train_batch(ids, labels, step, IDS if sample_ids is None else sample_ids)
    joined = engine.prepare_forward_input(ids, labels)
    (loss_of(model, *joined) * scale).backward()
    engine.prepare_gradients()
    return engine.aggregate_and_log()


def explicit(model, ids, labels, validation):
    """Float64, one sample at a time, plain autograd: ``(dots (B, P), |g_i| |g_v| (B, P))``."""
    before = model.state_dict()
    dtype = next(model.parameters()).dtype
    model.double()
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(loss_of(model, *validation), parameters)
    n_targets = (labels[:, 1:] != -100).sum()
    dots, sizes = [], []
    for x, y in zip(ids, labels, strict=True):
        length = int((y != -100).sum())
        own = loss_of(model, x[None, :length], y[None, :length]) * (length - 1) / n_targets
        gradients = torch.autograd.grad(own, parameters)
        dots.append(torch.stack([(a * b).sum() for a, b in zip(gradients, wanted, strict=True)]))
        sizes.append(torch.stack([a.norm() * b.norm() for a, b in zip(gradients, wanted, strict=True)]))
    model.to(dtype).load_state_dict(before)
    return torch.stack(dots), torch.stack(sizes)


def assert_close(got, want, sizes, tolerance=1e-4):
    """Relative, with the rounding of float32 allowed where a product is nearly orthogonal."""
    floor = sizes * 1e-2 + sizes.max(dim=0).values * 1e-4 + 1e-12
    assert ((got - want).abs() / torch.maximum(want.abs(), floor)).max() < tolerance


def gradients_of(model):
    return [p.grad.clone() for p in model.parameters()]


def assert_same_gradients(model, wanted, tolerance=1e-5):
    for (name, p), want in zip(model.named_parameters(), wanted, strict=True):
        assert (p.grad - want).norm() <= tolerance * want.norm() + 1e-9, name


CASES = {
    "gpt2": ("gpt2", {}),  # tied, Conv1D, positions looked up once for all samples
    "gpt2_untied": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),  # RMS norms, grouped queries, untied, a padding row
    "llama_tied": ("llama_tied", {}),  # biases in attention
    "gpt_neox": ("gpt_neox", {}),  # biases everywhere
    "qwen3": ("qwen3", {}),  # norms of queries and keys
    "gemma3": ("gemma3", {}),  # a scaled embedding, norms of 1 + weight
}


@pytest.mark.parametrize("case", CASES)
def test_inner_products_are_those_of_explicit_gradients_and_grad_is_the_training_batchs(case):
    family, changes = CASES[case]
    model = small_model(family, **changes)
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    loss_of(model, *train).backward()
    wanted = gradients_of(model)
    model.zero_grad()
    dots, sizes = explicit(model, *train, validation)
    with GradDotProdEngine(model, validation) as engine:
        found = run_batch(engine, model, *train)
    assert_same_gradients(model, wanted)
    assert engine.parameter_names == [name for name, _ in model.named_parameters()]
    assert found["sample_id"].tolist() == IDS
    assert_close(found["per_parameter"], dots, sizes)
    torch.testing.assert_close(found["total"].double(), dots.sum(1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("way", ["pairs of tokens", "tiles of one sample", "tiles of oneDNN's"])
def test_both_ways_to_an_inner_product_are_that_of_explicit_gradients(way, monkeypatch):
    monkeypatch.setattr(Dense, "_by_tokens_is_cheaper", lambda *_: way == "pairs of tokens")
    monkeypatch.setitem(dotproducts.TILE_VALUES, "cpu", 23)
    if way == "tiles of oneDNN's":
        monkeypatch.setattr(dotproducts, "LEAST_ONEDNN_FLOPS", 0)
    left, right = torch.randn(5, 7, 13), torch.randn(5, 7, 11)
    each = torch.einsum("nsl,nsr->nlr", left.double(), right.double())
    gradient, dots = Dense(left, right).sums(3, scale=1.7)
    torch.testing.assert_close(gradient.double(), 1.7 * each[:3].sum(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dots.double(), (each[:3] * each[3:].sum(0)).sum((1, 2)), rtol=1e-4, atol=1e-4)


def test_no_tensor_as_large_as_all_samples_gradients_is_made(monkeypatch):
    made = []
    product = dotproducts._product
    monkeypatch.setattr(dotproducts, "_product", lambda *args: made.append(product(*args)) or made[-1])
    monkeypatch.setitem(dotproducts.TILE_VALUES, "cpu", 512)
    monkeypatch.setattr(Dense, "_by_tokens_is_cheaper", lambda *_: False)
    model = small_model("gpt2")
    with GradDotProdEngine(model, ragged_batch(VAL_LENGTHS)) as engine:
        run_batch(engine, model, *ragged_batch(LENGTHS))
    assert made
    assert max(tile.numel() for tile in made) <= 512


def test_a_samples_inner_product_depends_on_its_own_tokens_only():
    model = small_model("llama_tied")
    (ids, labels), validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    with GradDotProdEngine(model, validation, loss_reduction="sum") as engine:

        def dots(rows, width):
            engine.attach_train_batch(ids[rows], labels[rows], 0, rows)
            x, y = engine.prepare_forward_input(ids[rows, :width], labels[rows, :width])
            (loss_of(model, x, y) * (y[:, 1:] != -100).sum()).backward()
            engine.prepare_gradients()
            return engine.aggregate_and_log()["total"]

        together, alone = dots([0, 1, 2, 3], 21), dots([0], 9)
        turned = dots([3, 0], 21)
    torch.testing.assert_close(alone[0], together[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(turned, together[[3, 0]], rtol=1e-4, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_reduction_accumulation_and_a_loss_scale_are_known(reduction):
    model = small_model("gpt2")
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    dots, _ = explicit(model, *train, validation)
    n_targets = (train[1][:, 1:] != -100).sum()
    with GradDotProdEngine(
        model, validation, loss_reduction=reduction, accumulation=4, loss_scale=lambda: 8.0
    ) as engine:
        engine.attach_train_batch(*train, 0, IDS)
        x, y = engine.prepare_forward_input(*train)
        n_joined = (y[:, 1:] != -100).sum() if reduction == "sum" else 1
        (loss_of(model, x, y) * n_joined * 8 / 4).backward()
        engine.prepare_gradients()
        found = engine.aggregate_and_log()
    weight = (n_targets if reduction == "sum" else 1) / 4
    torch.testing.assert_close(found["total"].double(), dots.sum(1) * weight, rtol=1e-4, atol=0)
    got = gradients_of(model)
    model.zero_grad()
    (loss_of(model, *train) * weight * 8).backward()
    assert_same_gradients(model, got)


def trained(with_engine, result_dir=None, n_steps=3, family="gpt2", checkpointing=False):
    """Weights after steps of two micro-batches each, clipped."""
    model = small_model(family, **(NO_DROPOUT if family == "gpt2" else {}))
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    # The bias of keys has no gradient but rounding, of which Adam with a tiny epsilon makes whole steps.
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


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_after_steps_with_accumulation_and_clipping_equal_regular_trainings(family):
    regular, _ = trained(False, family=family)
    watched, _ = trained(True, family=family)
    for (name, want), got in zip(regular.named_parameters(), watched.parameters(), strict=True):
        assert (got - want).norm() < 1e-5 * want.norm(), name


def test_gradient_checkpointing_changes_no_row():
    _, plain = trained(True)
    _, checkpointed = trained(True, checkpointing=True)
    for sample_id, value in plain.shapley_values.items():
        assert checkpointed.shapley_values[sample_id] == pytest.approx(value, rel=1e-4)


def test_a_checkpointed_block_keeps_no_input_of_its_layers():
    model = small_model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    seen = []
    inner = model.model.layers[1].mlp.down_proj
    handle = inner.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with GradDotProdEngine(model, ragged_batch(VAL_LENGTHS)) as engine:
        train = ragged_batch(LENGTHS)
        engine.attach_train_batch(*train, 0, IDS)
        joined = engine.prepare_forward_input(*train)
        loss = loss_of(model, *joined)
        input_of_layer = weakref.ref(seen.pop())
        gc.collect()
        assert input_of_layer() is None
        loss.backward()
        engine.prepare_gradients()
    handle.remove()


def test_under_bfloat16_autocast_gradients_and_inner_products_keep_their_direction():
    model = small_model("gpt2")
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, *train)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    dots, sizes = explicit(model, *train, validation)
    with GradDotProdEngine(model, validation) as engine:
        engine.attach_train_batch(*train, 0, IDS)
        joined = engine.prepare_forward_input(*train)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, *joined)
        loss.backward()
        engine.prepare_gradients()
        found = engine.aggregate_and_log()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert torch.cosine_similarity(got, wanted, dim=0) > 0.999
    assert ((found["total"] - dots.sum(1)).abs() < 0.05 * sizes.sum(1)).all()


def test_layers_called_twice_have_the_sum_of_their_calls():
    model = small_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    dots, sizes = explicit(model, *train, validation)
    with GradDotProdEngine(model, validation) as engine:
        found = run_batch(engine, model, *train)
    assert_close(found["per_parameter"], dots, sizes)


def test_frozen_parameters_take_no_part():
    model = small_model("gpt2")
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    dots, sizes = explicit(model, *train, validation)
    names = [name for name, _ in model.named_parameters()]
    model.transformer.wte.requires_grad_(False)
    model.transformer.h[0].requires_grad_(False)
    model.transformer.h[1].mlp.c_fc.bias.requires_grad_(False)
    with GradDotProdEngine(model, validation) as engine:
        found = run_batch(engine, model, *train)
    kept = [names.index(name) for name in engine.parameter_names]
    assert 0 < len(kept) < len(names) - 10
    assert_close(found["per_parameter"], dots[:, kept], sizes[:, kept])
    assert model.transformer.wte.weight.grad is None
    assert model.transformer.h[1].mlp.c_fc.weight.requires_grad


def hooks_of(model):
    return [
        len(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    ]


def test_nothing_is_left_after_detaching_and_an_evaluation_leaves_no_trace():
    model = small_model("gpt2")
    before = hooks_of(model), [p.requires_grad for p in model.parameters()]
    train, validation = ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS, seed=5)
    engine = GradDotProdEngine(model, validation).attach()
    plain = run_batch(engine, model, *train)["total"]
    engine.attach_train_batch(*train, 0, IDS)
    joined = engine.prepare_forward_input(*train)
    with torch.no_grad():
        loss_of(model, *validation)
    loss_of(model, *joined).backward()
    engine.prepare_gradients()
    engine.detach_for_evaluation()
    assert not engine.is_attached
    assert (hooks_of(model), [p.requires_grad for p in model.parameters()]) == before
    loss_of(model, *train).backward()
    engine.reattach_after_evaluation()
    model.zero_grad()
    torch.testing.assert_close(run_batch(engine, model, *train)["total"], plain, rtol=0, atol=0)
    engine.detach()
    assert (hooks_of(model), [p.requires_grad for p in model.parameters()]) == before


def columns(folder):
    group = zarr.open_group(str(folder / "grad_dotprod"), mode="r")
    assert group.metadata.zarr_format == 3
    return group, {name: group[name][:] for name in ("step", "sample_id", "total", "value", "per_parameter")}


def test_rows_are_written_in_the_order_seen_and_values_are_their_sums(tmp_path):
    model, engine = trained(True, tmp_path)
    group, rows = columns(tmp_path)
    assert group.attrs["parameters"] == engine.parameter_names
    assert rows["step"].tolist() == [step for step in range(3) for _ in range(8)]
    assert rows["sample_id"].tolist() == IDS * 6
    assert rows["per_parameter"].shape == (24, len(list(model.parameters())))
    np.testing.assert_allclose(rows["per_parameter"].sum(1), rows["total"], rtol=1e-4)
    np.testing.assert_allclose(rows["value"], 1e-3 * rows["total"], rtol=1e-5)
    for sample_id, value in engine.shapley_values.items():
        assert value == pytest.approx(float(rows["value"][rows["sample_id"] == sample_id].sum()), rel=1e-5)


def test_a_resumed_run_cuts_the_rows_of_later_steps_and_goes_on(tmp_path):
    _, whole = trained(True, tmp_path / "whole")
    _, wanted = columns(tmp_path / "whole")
    trained(True, tmp_path / "cut")
    model = small_model("gpt2")
    engine = GradDotProdEngine(model, ragged_batch(VAL_LENGTHS), result_dir=tmp_path / "cut", resume_step=1)
    _, rows = columns(tmp_path / "cut")
    for name, values in rows.items():
        np.testing.assert_array_equal(values, wanted[name][:16])
    assert engine.shapley_values[10] == pytest.approx(
        float(wanted["value"][:16][wanted["sample_id"][:16] == 10].sum()), rel=1e-5
    )
    with engine:
        run_batch(engine, model, *ragged_batch(LENGTHS), step=2)
    _, rows = columns(tmp_path / "cut")
    assert rows["step"].tolist() == [0] * 8 + [1] * 8 + [2] * 4
    assert len(whole.shapley_values) == 4


def test_rows_half_written_by_a_killed_run_are_cut(tmp_path):
    trained(True, tmp_path)
    group = zarr.open_group(str(tmp_path / "grad_dotprod"))
    group["step"].resize((30,))
    GradDotProdEngine(small_model("gpt2"), ragged_batch(VAL_LENGTHS), result_dir=tmp_path, resume_step=2)
    _, rows = columns(tmp_path)
    assert {len(values) for values in rows.values()} == {24}


def test_rows_wait_for_the_interval_and_are_written_at_the_end_even_after_an_exception(tmp_path):
    model = small_model("gpt2")
    engine = GradDotProdEngine(model, ragged_batch(VAL_LENGTHS), result_dir=tmp_path, save_interval=2)

    def loop():
        with engine:
            for step in range(3):
                run_batch(engine, model, *ragged_batch(LENGTHS), step)
                due.append(engine.should_save_metrics(step))
                if due[-1]:
                    engine.save_metrics(step)
            raise RuntimeError("the loop broke")

    due = []
    with pytest.raises(RuntimeError, match="the loop broke"):
        loop()
    assert due == [False, True, False]
    assert columns(tmp_path)[1]["step"].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert not engine.is_attached


def test_the_table_shows_every_domains_most_and_least_valuable_documents():
    values = {1: 0.5, 2: -0.25, 3: 0.125, 4: 2.0, 5: 1.0}
    table = value_table(
        values,
        domain_of=lambda i: "books" if i <= 3 else "code|web",
        excerpt_of=lambda i: f"text\nof {i} " + 100 * "x",
        n_shown=1,
    )
    lines = table.splitlines()
    assert lines[2] == "| code\\|web | 2 | +1.500e+00 | +3.000e+00 |"
    assert lines[3] == "| books | 3 | +1.250e-01 | +3.750e-01 |"
    shown = [line.split("|")[2].strip() for line in lines if line.endswith("… |")]
    assert shown == ["4", "5", "1", "2"]


# --- what a user can get wrong ---


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_parameter_that_no_rule_describes_is_named():
    with pytest.raises(
        ModelError, match=r"cannot take the gradient of gain \(Scaled\).*requires_grad_\(False\)"
    ):
        GradDotProdEngine(Scaled(small_model("gpt2")), ragged_batch(VAL_LENGTHS))
    with pytest.raises(ModelError, match="GPT2LMHeadModel has no trainable parameter"):
        GradDotProdEngine(small_model("gpt2").requires_grad_(False), ragged_batch(VAL_LENGTHS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss_reduction": "median"}, "loss_reduction is 'median'; choose mean or sum"),
        ({"save_interval": -1}, "save_interval must be at least 0, got -1"),
        ({"accumulation": 0}, "accumulation must be at least 1, got 0"),
        ({"val_data": "text"}, "val_data is str; give"),
        ({"val_data": (torch.ones(2, 3), torch.ones(2, 4))}, r"of one shape, got \(2, 3\) and \(2, 4\)"),
        ({"val_data": torch.ones(2, 1, dtype=torch.int64)}, "val_data has no target token"),
    ],
)
def test_a_setting_that_cannot_be_used_is_refused_at_the_start(changes, message):
    settings = {"val_data": ragged_batch(VAL_LENGTHS), **changes}
    with pytest.raises(ConfigError, match=message):
        GradDotProdEngine(small_model("gpt2"), **settings)


def test_calls_out_of_order_say_which_is_missing():
    model = small_model("gpt2")
    ids, labels = ragged_batch(LENGTHS)
    engine = GradDotProdEngine(model, ragged_batch(VAL_LENGTHS))
    with pytest.raises(ModelError, match=r"not attached; call attach\(\)"):
        engine.prepare_forward_input(ids, labels)
    engine.attach()
    with pytest.raises(ConfigError, match="call attach_train_batch with these 4 samples first"):
        engine.prepare_forward_input(ids, labels)
    with pytest.raises(ConfigError, match=r"4 samples and batch_idx of shape \(2,\)"):
        engine.attach_train_batch(ids, labels, 0, [1, 2])
    with pytest.raises(ModelError, match="no batch of prepare_forward_input ran backward"):
        engine.prepare_gradients()
    with pytest.raises(ModelError, match=r"call prepare_gradients\(\) first"):
        engine.aggregate_and_log()
    with pytest.raises(ModelError, match="the model got 4 samples and GradDotProd joined 0"):
        loss_of(model, ids, labels)
    engine.attach_train_batch(ids, labels, 0, IDS)
    joined = engine.prepare_forward_input(ids, labels)
    with pytest.raises(ModelError, match="the model got 4 samples and GradDotProd joined 6"):
        loss_of(model, ids, labels)
    loss = loss_of(model, *joined)
    loss.backward(retain_graph=True)
    with pytest.raises(ModelError, match="the batch before was not collected"):
        engine.prepare_forward_input(ids, labels)
    engine.prepare_gradients()
    with pytest.raises(ModelError, match="through a batch before the last one"):
        loss.backward()
    engine.detach()


def test_rows_of_another_run_are_neither_mixed_nor_overwritten(tmp_path):
    trained(True, tmp_path)
    settings = {"val_data": ragged_batch(VAL_LENGTHS), "result_dir": tmp_path}
    with pytest.raises(StoreError, match="has 24 rows of another run: resume that run"):
        GradDotProdEngine(small_model("gpt2"), **settings)
    with pytest.raises(StoreError, match="written by a run of another kind: parameters differ"):
        GradDotProdEngine(small_model("llama"), **settings, resume_step=1)
    other = tmp_path / "other" / "grad_dotprod"
    other.mkdir(parents=True)
    (other / "notes.json").write_text(json.dumps({}))
    with pytest.raises(StoreError, match="is there and is not a Zarr group"):
        GradDotProdEngine(small_model("gpt2"), settings["val_data"], result_dir=tmp_path / "other")
    assert len(columns(tmp_path)[1]["step"]) == 24


# --- several ranks ---


def rank_of_two(rank, folder):
    """One rank's two micro-batches and step under DistributedDataParallel; its gradients and rows go into a file."""
    torch.set_num_threads(1)
    where = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", where, rank=rank, world_size=2, timeout=timedelta(seconds=90))
    model = small_model("llama_tied")
    wrapped = nn.parallel.DistributedDataParallel(model)
    validation = ragged_batch(VAL_LENGTHS, seed=5)
    engine = GradDotProdEngine(
        wrapped if rank == 0 else model, validation, result_dir=folder, accumulation=2, learning_rate=0.5
    )
    with engine:
        for part in range(2):
            train = ragged_batch(LENGTHS, seed=10 * rank + part)
            sample_ids = [100 * rank + 10 * part + i for i in range(4)]
            found = run_batch(engine, wrapped, *train, 7, sample_ids, scale=0.5)
    gradients = gradients_of(model)
    # Afterwards the wrapper's own averaging works again.
    model.zero_grad()
    loss_of(wrapped, *ragged_batch(LENGTHS, seed=10 * rank)).backward()
    torch.save((gradients, found, engine.shapley_values, gradients_of(model)), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_average_the_training_gradients_and_keep_one_table(tmp_path):
    torch.multiprocessing.spawn(rank_of_two, (tmp_path,), nprocs=2)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    model, validation = small_model("llama_tied"), ragged_batch(VAL_LENGTHS, seed=5)
    totals = {}
    for rank in range(2):
        for part in range(2):
            train = ragged_batch(LENGTHS, seed=10 * rank + part)
            for i, dot in enumerate(explicit(model, *train, validation)[0].sum(1) / 4):
                totals[100 * rank + 10 * part + i] = dot.item()
            (loss_of(model, *train) / 4).backward()
    _, rows = columns(tmp_path)
    assert rows["step"].tolist() == [7] * 16
    assert rows["sample_id"].tolist() == [i + j for j in (0, 100, 10, 110) for i in range(4)]
    for sample_id, total in zip(rows["sample_id"].tolist(), rows["total"].tolist(), strict=True):
        assert total == pytest.approx(totals[sample_id], rel=1e-3)
    for gradients, found, values, _ in results:
        assert_same_gradients(model, gradients)
        assert values[112] == pytest.approx(0.5 * totals[112], rel=1e-3)
        assert set(values) == set(totals)
        assert len(found["total"]) == 4
    model.zero_grad()
    for rank in range(2):
        (loss_of(model, *ragged_batch(LENGTHS, seed=10 * rank)) / 2).backward()
    assert_same_gradients(model, results[0][3])
    assert_same_gradients(model, results[1][3])
