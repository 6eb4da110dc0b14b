"""GradDotProd's rows, values and ranks, and its error messages."""

import json
from contextlib import nullcontext
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
import zarr
from helpers.forked_ranks import call_as_two_ranks
from helpers.graddotprod import (
    IDS,
    LENGTHS,
    VAL_LENGTHS,
    assert_same_gradients,
    columns,
    gradients_of,
    loss_of,
    run_batch,
    trained,
)
from helpers.models import ragged_batch, small_model
from helpers.references import dot_products_by_autograd
from torch import nn

from gradproj.errors import ConfigError, ModelError, StoreError
from gradproj.training.graddotprod.engine import GradDotProdEngine
from gradproj.training.graddotprod.shapley import value_table


def test_rows_are_in_the_order_seen_and_values_are_their_sums(tmp_path):
    model, engine = trained(True, tmp_path)
    group, rows = columns(tmp_path)
    assert group.attrs["parameters"] == engine.parameter_names
    assert rows["step"].tolist() == [step for step in range(3) for _ in range(8)]
    assert rows["sample_id"].tolist() == IDS * 6
    assert rows["per_parameter"].shape == (24, len(list(model.parameters())))
    np.testing.assert_allclose(rows["per_parameter"].sum(1), rows["total"], rtol=1e-4)
    np.testing.assert_allclose(rows["value"], 1e-3 * rows["total"], rtol=1e-5)
    for sample_id, value in engine.shapley_values.items():
        assert value == pytest.approx(
            float(rows["value"][rows["sample_id"] == sample_id].sum()), rel=1e-5
        )


def test_values_use_each_parameters_rate_and_need_a_rate_and_an_id():
    model, train, validation = small_model("gpt2"), ragged_batch(LENGTHS), ragged_batch(VAL_LENGTHS)
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3], "lr": 0.5}, {"params": parameters[3:7], "lr": 0.25}]
    by_rate = {}
    for name, rate in {
        "optimizer": torch.optim.SGD(groups),
        "function": lambda: 0.5,
        "none": None,
    }.items():
        with GradDotProdEngine(model, validation, learning_rate=rate) as engine:
            by_rate[name] = run_batch(engine, model, *train)
            engine.attach_train_batch(*train, 1)
            loss_of(model, *engine.prepare_forward_input(*train)).backward()
            engine.prepare_gradients()
            assert engine.aggregate_and_log()["sample_id"].tolist() == [-1] * 4
            assert set(engine.shapley_values) == (set() if name == "none" else set(IDS))
    dots = by_rate["none"]["per_parameter"]
    wanted = 0.5 * dots[:, :3].sum(1) + 0.25 * dots[:, 3:7].sum(1)
    torch.testing.assert_close(by_rate["optimizer"]["value"], wanted)
    torch.testing.assert_close(by_rate["function"]["value"], 0.5 * dots.sum(1))
    assert by_rate["none"]["value"].isnan().all()


def test_resumed_run_cuts_rows_of_later_steps(tmp_path):
    _, whole = trained(True, tmp_path / "whole")
    _, wanted = columns(tmp_path / "whole")
    trained(True, tmp_path / "cut")
    model = small_model("gpt2")
    engine = GradDotProdEngine(
        model, ragged_batch(VAL_LENGTHS), result_dir=tmp_path / "cut", resume_step=1
    )
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


def test_partly_written_rows_of_a_killed_run_are_cut(tmp_path):
    trained(True, tmp_path)
    group = zarr.open_group(str(tmp_path / "grad_dotprod"))
    group["step"].resize((30,))
    GradDotProdEngine(
        small_model("gpt2"), ragged_batch(VAL_LENGTHS), result_dir=tmp_path, resume_step=2
    )
    _, rows = columns(tmp_path)
    assert {len(values) for values in rows.values()} == {24}


def test_rows_are_written_by_interval_and_at_the_end_even_after_an_exception(tmp_path):
    model = small_model("gpt2")
    engine = GradDotProdEngine(
        model, ragged_batch(VAL_LENGTHS), result_dir=tmp_path, save_interval=2
    )

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


def test_value_table_shows_most_and_least_valuable_documents_per_domain():
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


# --- errors ---


class Scaled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_parameter_of_an_unknown_layer_type_is_named():
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
        ({"accumulation": 0}, "accumulation must be more than 0, got 0"),
        ({"loss_scale": -1.0}, r"loss_scale must be more than 0, got -1\.0"),
        ({"val_data": "text"}, "val_data is str; give"),
        (
            {"val_data": (torch.ones(2, 3), torch.ones(2, 4))},
            r"of one shape, got \(2, 3\) and \(2, 4\)",
        ),
        ({"val_data": torch.ones(2, 1, dtype=torch.int64)}, "val_data has no target token"),
    ],
)
def test_invalid_setting_is_rejected_by_the_constructor(changes, message):
    settings = {"val_data": ragged_batch(VAL_LENGTHS), **changes}
    with pytest.raises(ConfigError, match=message):
        GradDotProdEngine(small_model("gpt2"), **settings)


def test_call_out_of_order_names_the_missing_one():
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


def test_dot_products_of_another_run_are_not_overwritten(tmp_path):
    trained(True, tmp_path)
    settings = {"val_data": ragged_batch(VAL_LENGTHS), "result_dir": tmp_path}
    with pytest.raises(StoreError, match="has 24 rows of another run: resume that run"):
        GradDotProdEngine(small_model("gpt2"), **settings)
    with pytest.raises(StoreError, match="by a run with other settings\n  parameters: table "):
        GradDotProdEngine(small_model("llama"), **settings, resume_step=1)
    other = tmp_path / "other" / "grad_dotprod"
    other.mkdir(parents=True)
    (other / "notes.json").write_text(json.dumps({}))
    with pytest.raises(StoreError, match="exists and is no Zarr group"):
        GradDotProdEngine(small_model("gpt2"), settings["val_data"], result_dir=tmp_path / "other")
    assert len(columns(tmp_path)[1]["step"]) == 24


# --- several ranks ---


def rank_of_two(rank, folder):
    """Run two micro-batches under DistributedDataParallel; save gradients and rows to a file."""
    torch.set_num_threads(1)
    where = f"file://{folder / 'meeting'}"
    dist.init_process_group("gloo", where, rank=rank, world_size=2, timeout=timedelta(minutes=5))
    model = small_model("llama_tied")
    wrapped = nn.parallel.DistributedDataParallel(model)
    validation = ragged_batch(VAL_LENGTHS, seed=5)
    engine = GradDotProdEngine(
        wrapped if rank == 0 else model,
        validation,
        result_dir=folder,
        accumulation=2,
        learning_rate=0.5,
    )
    with engine:
        for part in range(2):
            train = ragged_batch(LENGTHS, seed=10 * rank + part)
            sample_ids = [100 * rank + 10 * part + i for i in range(4)]
            # Like a loop whose ranks exchange once a step; the engine averages every batch itself.
            with wrapped.no_sync() if part == 0 else nullcontext():
                products = run_batch(engine, wrapped, *train, 7, sample_ids, scale=0.5)
    gradients = gradients_of(model)
    # Afterwards the wrapper's own averaging works again.
    model.zero_grad()
    loss_of(wrapped, *ragged_batch(LENGTHS, seed=10 * rank)).backward()
    torch.save(
        (gradients, products, engine.shapley_values, gradients_of(model)), folder / f"{rank}.pt"
    )
    dist.destroy_process_group()


def test_two_ranks_average_gradients_and_keep_one_table(tmp_path):
    call_as_two_ranks(rank_of_two, tmp_path)
    results = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    model, validation = small_model("llama_tied"), ragged_batch(VAL_LENGTHS, seed=5)
    totals = {}
    for rank in range(2):
        for part in range(2):
            train = ragged_batch(LENGTHS, seed=10 * rank + part)
            for i, dot in enumerate(
                dot_products_by_autograd(model, *train, validation)[0].sum(1) / 4
            ):
                totals[100 * rank + 10 * part + i] = dot.item()
            (loss_of(model, *train) / 4).backward()
    _, rows = columns(tmp_path)
    assert rows["step"].tolist() == [7] * 16
    assert rows["sample_id"].tolist() == [i + j for j in (0, 100, 10, 110) for i in range(4)]
    for sample_id, total in zip(rows["sample_id"].tolist(), rows["total"].tolist(), strict=True):
        assert total == pytest.approx(totals[sample_id], rel=1e-3)
    for gradients, products, values, _ in results:
        assert_same_gradients(model, gradients)
        assert values[112] == pytest.approx(0.5 * totals[112], rel=1e-3)
        assert set(values) == set(totals)
        assert len(products["total"]) == 4
    model.zero_grad()
    for rank in range(2):
        (loss_of(model, *ragged_batch(LENGTHS, seed=10 * rank)) / 2).backward()
    assert_same_gradients(model, results[0][3])
    assert_same_gradients(model, results[1][3])
