"""Engines inside the training loop: rows, their store, and unchanged training."""

import csv
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from helpers.models import ragged_batch, small_model
from helpers.references import relative_error, row_by_autograd, sample_loss
from helpers.training_runs import config_of, index_of, make_data, rows_by_autograd
from safetensors.torch import load_file

from gradproj import GradProjLoraEngine, ProjectionStore, per_sample_loss
from gradproj.__main__ import main
from gradproj.distributed import World
from gradproj.errors import ConfigError, ModelError, StoreError
from gradproj.store.append_store import AppendStore, choose_rows
from gradproj.training import (
    METHODS,
    EngineConfig,
    GhostEngineManager,
    TrainConfig,
    TrainingEngine,
    train,
)
from gradproj.training.data import batches_of
from gradproj.training.loop import load_or_make_model, set_dropout
from gradproj.training.validation import Validation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def weights_in(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights_in(a), weights_in(b)
    assert sorted(a) == sorted(b)
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def by_hand(folder, resume_step=None, **settings):
    """A model, its optimizer and a manager, for a loop written out in a test."""
    model = small_model("gpt2").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = dict(
        method="GradProjLora", result_dir=str(folder), proj_rank_total=16, proj_rank_min=2
    )
    config |= settings
    return model, optimizer, GhostEngineManager(config, model, optimizer, resume_step=resume_step)


def one_step(model, optimizer, manager, step, ids=(0, 1, 2)):
    X, Y = ragged_batch([7, 12, 5], seed=step)
    manager.attach_train_batch(X, Y, step, np.array(ids) + 3 * step)
    inputs, labels = manager.prepare_forward_input(X, Y)
    per_sample_loss(model, {"input_ids": inputs, "labels": labels}).sum().backward()
    manager.prepare_gradients()
    manager.aggregate_and_log()
    manager.clear_gradients()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_rows_match_each_sample_alone_at_its_steps_weights(data, tmp_path, accumulation):
    config = config_of(
        data,
        tmp_path,
        method="GradProjLora",
        grad_accumulation=accumulation,
        clip=0.3,
        proj_dtype="float32",
    )
    train(config)
    want, steps, ids = rows_by_autograd(config, data)
    with ProjectionStore(tmp_path / "projections") as store:
        assert len(store) == len(want) == 18 * accumulation
        got = store.rows(range(len(store)))
        assert store.array("step").tolist() == steps
        assert store.array("sample_id").tolist() == ids
        assert set(store.column("status").tolist()) == {1}
    error = np.linalg.norm(got - want, axis=1) / np.linalg.norm(want, axis=1)
    assert error.max() < 1e-4


def test_row_of_a_shared_weight_has_all_its_uses(tmp_path):
    model = small_model("llama").train()
    first, second = (block.self_attn.q_proj for block in model.model.layers)
    second.weight = first.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = {"method": "GradProjLora", "result_dir": str(tmp_path), "proj_layers": "q_proj"}
    config |= {"proj_kind": "orthonormal", "proj_rank_total": 32 * 32, "proj_dtype": "float32"}
    config |= {"loss_reduction": "sum"}
    with GhostEngineManager(config, model, optimizer) as manager:
        one_step(model, optimizer, manager, step=1)
        manager.save_metrics(1)
    X, _ = ragged_batch([7, 12, 5], seed=1)
    with ProjectionStore(tmp_path / "projections") as store:
        assert [layer.name for layer in store.layers] == ["model.layers.0.self_attn.q_proj"]
        p_i, p_o = map(torch.tensor, store.projection_matrices[store.layers[0].name])
        got = torch.tensor(store.rows([1])[0]).view(32, 32)
    (gradient,) = torch.autograd.grad(sample_loss(model, X[1]), [first.weight])
    torch.testing.assert_close(got, p_o @ gradient @ p_i.T, rtol=1e-4, atol=1e-5)


def test_rows_of_experts_are_those_of_each_sample(tmp_path):
    model = small_model("qwen3_moe").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = {"method": "GradProjLora", "result_dir": str(tmp_path), "proj_layers": "experts,gate"}
    config |= {"proj_dtype": "float32", "loss_reduction": "sum"}
    with GhostEngineManager(config, model, optimizer) as manager:
        one_step(model, optimizer, manager, step=1)
        manager.save_metrics(1)
    X, _ = ragged_batch([7, 12, 5], seed=1)
    want = row_by_autograd(model, GradProjLoraEngine(model, "experts,gate"), X[1])
    with ProjectionStore(tmp_path / "projections") as store:
        got = torch.tensor(store.rows([1])[0])
        assert store.attributes["identity"]["--experts"] == "joint"
    assert relative_error(got, want) < 1e-5


def test_manager_keeps_the_names_of_earlier_code():
    manager = GhostEngineManager({"method": "Regular"}, small_model("gpt2"))
    assert (manager.engine, manager.method) == (manager, "Regular")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dropout": 0.2, "grad_accumulation": 2},
        {"model_dtype": "bfloat16", "pack": True},
        {"gradient_checkpointing": True, "dropout": 0.2},
    ],
    ids=["plain", "dropout", "bfloat16", "checkpointing"],
)
def test_engine_changes_no_bit_of_the_weights(data, tmp_path, changes):
    changes = {"val_shards": str(data / "val"), "eval_interval": 2, "val_batches": 2, **changes}
    for method in ("Regular", "GradProjLora"):
        train(config_of(data, tmp_path / method, method=method, proj_save_interval=1, **changes))
    assert_same_weights(tmp_path / "Regular", tmp_path / "GradProjLora")
    with ProjectionStore(tmp_path / "GradProjLora" / "projections") as store:
        assert np.isfinite(store.rows(range(18))).all()


def test_evaluation_changes_no_row(data, tmp_path):
    changes = {"method": "GradProjLora", "dropout": 0.2}
    train(config_of(data, tmp_path / "without", **changes))
    evaluated = {"val_shards": str(data / "val"), "eval_interval": 1, **changes}
    train(config_of(data, tmp_path / "with", **evaluated))
    assert_same_weights(tmp_path / "with", tmp_path / "without")
    with (
        ProjectionStore(tmp_path / "with/projections") as a,
        ProjectionStore(tmp_path / "without/projections") as b,
    ):
        assert len(a) == len(b) == 18
        np.testing.assert_array_equal(a.rows(range(18)), b.rows(range(18)))


def test_interval_writes_new_rows_and_cleanup_writes_the_rest(tmp_path):
    model, optimizer, manager = by_hand(tmp_path, proj_save_interval=3)
    on_disk = []
    for step in range(8):
        one_step(model, optimizer, manager, step)
        if manager.should_save_metrics(step):
            manager.save_metrics(step)
        on_disk.append(written(tmp_path))
    assert on_disk == [0, 0, 9, 9, 9, 18, 18, 18]
    manager.cleanup()
    manager.cleanup()
    with ProjectionStore(tmp_path / "projections") as store:
        assert store.array("step").tolist() == np.repeat(range(8), 3).tolist()
        assert store.array("sample_id").tolist() == list(range(24))
        assert np.isfinite(store.rows(range(24))).all()
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("command", ["status", "verify", "merge"])
def test_commands_about_units_reject_a_training_store(tmp_path, capsys, command):
    model, optimizer, manager = by_hand(tmp_path)
    with manager:
        one_step(model, optimizer, manager, 1)
    assert main([command, str(tmp_path / "projections")]) == 2
    assert "is a training run's store" in capsys.readouterr().err


def written(result_dir):
    """Return the number of rows that a reader sees."""
    if not (result_dir / "projections" / "projections.zarr").exists():
        return 0
    with ProjectionStore(result_dir / "projections") as store:
        return int((store.column("status") == 1).sum())


def test_rows_are_written_after_an_exception(tmp_path):
    model, optimizer, manager = by_hand(tmp_path, proj_save_interval=0)

    def loop():
        with manager:
            for step in range(5):
                one_step(model, optimizer, manager, step)
            X, Y = ragged_batch([4, 4])
            manager.attach_train_batch(X, Y, 5)
            per_sample_loss(model, {"input_ids": X, "labels": Y}).sum().backward()
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        loop()
    assert written(tmp_path) == 15


def test_rows_are_written_when_an_evaluation_fails(tmp_path):
    model, optimizer, manager = by_hand(tmp_path, proj_save_interval=0)
    one_step(model, optimizer, manager, 0)
    manager.detach_for_evaluation()
    manager.cleanup()
    assert written(tmp_path) == 3


def test_dot_products_are_written_when_an_evaluation_fails(tmp_path):
    settings = {"method": "GradDotProd", "result_dir": str(tmp_path), "proj_save_interval": 0}
    model = small_model("gpt2").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    manager = GhostEngineManager(
        settings, model, optimizer, val_data=ragged_batch([6, 4]), loss="sum"
    )
    one_step(model, optimizer, manager, 0)
    manager.detach_for_evaluation()
    manager.cleanup()
    assert zarr.open_group(tmp_path / "grad_dotprod", mode="r")["sample_id"][...].tolist() == [
        0,
        1,
        2,
    ]


def test_full_shard_is_written_at_once_and_units_are_consecutive(tmp_path):
    model, optimizer, manager = by_hand(tmp_path, proj_save_interval=2, rows_per_shard=4)
    for step in range(7):
        one_step(model, optimizer, manager, step)
        if manager.should_save_metrics(step):
            manager.save_metrics(step)
    manager.cleanup()
    with ProjectionStore(tmp_path / "projections") as store:
        assert len(store) == 21
        assert store.layout.n_units == 6
        assert store.array("sample_id").tolist() == list(range(21))
        cut = store.rows(range(21))
    group = zarr.open_group(tmp_path / "projections" / "projections.zarr", mode="r")
    np.testing.assert_array_equal(group["projections"][...] * group["row_scale"][...][:, None], cut)
    assert group["step"].dtype == group["sample_id"].dtype == np.int64
    assert {array.shape[0] for name, array in group.arrays() if name != "projection_matrices"} == {
        21
    }
    model, optimizer, manager = by_hand(tmp_path / "whole", proj_save_interval=2)
    for step in range(7):
        one_step(model, optimizer, manager, step)
    manager.cleanup()
    with ProjectionStore(tmp_path / "whole" / "projections") as store:
        np.testing.assert_array_equal(store.rows(range(21)), cut)


@pytest.mark.parametrize(
    ("kept", "encoding"),
    [(0, "dense"), (4, "dense"), (6, "dense"), (21, "dense"), (6, "signs"), (6, "int8")],
)
def test_rows_after_a_checkpoint_are_cut_and_replaced(tmp_path, kept, encoding):
    settings = {"rows_per_shard": 4, "encoding": encoding}
    model, optimizer, manager = by_hand(tmp_path, **settings)
    for step in range(7):
        one_step(model, optimizer, manager, step)
    manager.cleanup()
    with ProjectionStore(tmp_path / "projections") as store:
        before = store.rows(range(21))
    model, optimizer, manager = by_hand(tmp_path, 1, **settings)
    manager.load_state_dict({"n_rows": kept})
    assert written(tmp_path) == kept
    for step in range(100, 102):
        one_step(model, optimizer, manager, step)
    manager.cleanup()
    with ProjectionStore(tmp_path / "projections") as store:
        assert len(store) == kept + 6
        np.testing.assert_array_equal(store.rows(range(kept)), before[:kept])
        assert store.array("step")[kept:].tolist() == [100] * 3 + [101] * 3
        assert np.isfinite(store.rows(range(kept + 6))).all()


def test_export_writes_the_originals_files_with_sample_ids(tmp_path):
    model, optimizer, manager = by_hand(tmp_path, rows_per_shard=4)
    for step in range(3):
        one_step(model, optimizer, manager, step, ids=(7, 5, 7))
    manager.cleanup()
    main(
        [
            "export",
            str(tmp_path / "projections"),
            "--to",
            str(tmp_path / "pt"),
            "--rows_per_file",
            "5",
        ]
    )
    files = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "pt").glob("*.pt"))]
    assert torch.cat([file["batch_idx"] for file in files]).tolist() == [
        7,
        5,
        7,
        10,
        8,
        10,
        13,
        11,
        13,
    ]
    with ProjectionStore(tmp_path / "projections") as store:
        np.testing.assert_array_equal(
            torch.cat([file["proj"] for file in files]).numpy(), store.rows(range(9))
        )


def test_ranks_at_different_steps_show_all_their_rows(tmp_path):
    """Use two writers of one store in one process, one of them ahead."""
    by_hand(tmp_path, rows_per_shard=4)[2].cleanup()
    writers = [AppendStore(tmp_path / "projections", rank, 2) for rank in range(2)]
    dim = writers[0].layout.dim
    for writer, n, rank in ((writers[1], 11, 1), (writers[0], 6, 0)):
        columns = {
            "status": np.ones(n),
            "loss": np.zeros(n),
            "n_tokens": np.ones(n),
            "grad_norm": np.ones(n),
            "step": np.arange(n),
            "sample_id": 100 * rank + np.arange(n),
        }
        writer.add(np.full((n, dim), rank + 1.0, np.float32), columns)
        writer.close()
    with ProjectionStore(tmp_path / "projections") as store:
        assert len(store) == 24
        status, ids = store.column("status"), store.array("sample_id")
        assert ids[status == 1].tolist() == [0, 1, 2, 3, 100, 101, 102, 103, 4, 5, *range(104, 111)]
        assert sorted(set(status.tolist())) == [0, 1, 4]
    for rank, writer in enumerate(
        [AppendStore(tmp_path / "projections", rank, 2) for rank in range(2)]
    ):
        writer.cut(3 + rank)
        writer.extend()
    with ProjectionStore(tmp_path / "projections") as store:
        assert store.array("sample_id")[store.column("status") == 1].tolist() == [
            0,
            1,
            2,
            100,
            101,
            102,
            103,
        ]


def test_configured_dropout_replaces_the_checkpoints():
    for family in ("gpt2", "llama", "opt", "gpt_neox"):
        model = small_model(family).train()
        ids = torch.arange(3, 15)[None]
        set_dropout(model, 0.5)
        assert not torch.equal(model(ids).logits, model(ids).logits)
        set_dropout(model, 0.0)
        assert torch.equal(model(ids).logits, model(ids).logits)
        rates = {k: v for k, v in vars(model.config).items() if k.endswith(("pdrop", "dropout"))}
        assert {k for k, v in rates.items() if v} <= {"summary_first_dropout", "classifier_dropout"}


def test_transformers_mean_loss_gives_equal_rows(tmp_path):
    rows = []
    for name in ("own", "theirs"):
        model, _, manager = by_hand(tmp_path / name, proj_dtype="float32")
        X, Y = ragged_batch([7, 12, 5])
        manager.attach_train_batch(X, Y, 0)
        loss = (
            per_sample_loss(model, {"input_ids": X, "labels": Y}).sum() if name == "own" else None
        )
        (model(input_ids=X, labels=Y).loss if loss is None else loss).backward()
        manager.aggregate_and_log()
        manager.cleanup()
        with ProjectionStore(tmp_path / name / "projections") as store:
            rows.append(store.rows(range(3)))
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("encoding", ["dense", "int4"])
def test_status_marks_samples_without_target_and_non_finite_rows(tmp_path, encoding):
    model, _, manager = by_hand(tmp_path, encoding=encoding)
    X, Y = ragged_batch([7, 1, 5])
    manager.attach_train_batch(X, Y, 0)
    losses = per_sample_loss(model, {"input_ids": X, "labels": Y})
    (losses * torch.tensor([1.0, 1.0, 1.0])).sum().backward()
    losses = losses.detach()
    manager._engine._capture.parts[0][2] = float("inf")
    manager.aggregate_and_log(losses)
    manager.cleanup()
    with ProjectionStore(tmp_path / "projections") as store:
        assert store.column("status").tolist() == [1, 3, 5]
        rows = store.rows(range(3))
        assert np.isfinite(rows[0]).all()
        assert not rows[1].any()
        assert np.isnan(rows[2]).all()
        assert store.column("n_tokens").tolist() == [6, 0, 4]
        np.testing.assert_allclose(store.column("loss")[0], losses[0].item() / 6, rtol=1e-6)


def test_manager_has_the_originals_defaults_and_takes_any_config():
    defaults = EngineConfig.of(SimpleNamespace())
    assert (defaults.proj_layers, defaults.proj_rank_total) == ("mlp,attn", 256)
    assert (defaults.proj_rank_min, defaults.proj_seed) == (8, 42)
    assert EngineConfig.of({"proj_layers": ["mlp", "attn"], "unknown": 1}).proj_layers == "mlp,attn"


def test_manager_rejects_an_unknown_method_with_the_known_ones(tmp_path):
    with pytest.raises(
        ConfigError, match="'Ghost'; choose one of Regular, GradDotProd, GradProjLora"
    ):
        GhostEngineManager({"method": "Ghost"}, small_model("gpt2"))


def test_unregistered_method_is_refused_where_it_is_configured():
    message = "--method is 'nonsense'; choose one of Regular, GradDotProd, GradProjLora"
    with pytest.raises(ConfigError, match=message):
        EngineConfig(method="nonsense")
    with pytest.raises(ConfigError, match=message):
        TrainConfig(method="nonsense", shards="x", tokenizer="x")
    (method,) = (field for field in fields(TrainConfig) if field.name == "method")
    assert method.metadata["metavar"] == "|".join(METHODS)


def test_new_method_is_one_entry(data, tmp_path, monkeypatch):
    class Counting(TrainingEngine):
        n_samples = 0

        def aggregate_and_log(self, losses=None):
            Counting.n_samples += len(losses)

    monkeypatch.setitem(METHODS, "Counting", Counting)
    train(config_of(data, tmp_path, method="Counting"))
    assert Counting.n_samples == 18


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"result_dir": ""},
            ConfigError,
            "writes rows to result_dir/projections: give a result_dir",
        ),
        ({"proj_layers": "nothing"}, ModelError, "no layer of the model matches 'nothing'"),
        (
            {"proj_rank_total": 1, "proj_rank_min": 8},
            ConfigError,
            "--proj_rank_total 1 cannot hold",
        ),
        ({"proj_dtype": "int8"}, ConfigError, "--proj_dtype is 'int8'"),
        ({"proj_save_interval": -1}, ConfigError, "--proj_save_interval must be at least 0"),
        ({"method": "GradDotProd"}, ConfigError, "give val_data=.input_ids, labels."),
    ],
)
def test_invalid_engine_setting_is_named(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        by_hand(tmp_path, **settings)


def test_rows_of_another_run_are_not_overwritten(tmp_path):
    by_hand(tmp_path, proj_seed=1)[2].cleanup()  # left without a row
    model, optimizer, manager = by_hand(tmp_path)
    one_step(model, optimizer, manager, 0)
    manager.cleanup()
    with pytest.raises(StoreError, match="holds rows of another run: continue it"):
        by_hand(tmp_path)
    with pytest.raises(
        StoreError, match=r"--proj_seed: store 42, this run 1\n.*--proj_dtype: store 'float16'"
    ):
        by_hand(tmp_path, 1, proj_seed=1, proj_dtype="bfloat16")
    assert written(tmp_path) == 3


def test_lost_rows_before_a_checkpoint_are_an_error(tmp_path):
    model, optimizer, manager = by_hand(tmp_path)
    one_step(model, optimizer, manager, 0)
    manager.cleanup()
    _, _, manager = by_hand(tmp_path, 1)
    with pytest.raises(
        StoreError, match="rows 0 to 3, which the checkpoint counts on, are not all there"
    ):
        manager.load_state_dict({"n_rows": 4})


def test_wrong_number_of_sample_ids_is_rejected(tmp_path):
    _, _, manager = by_hand(tmp_path)
    with pytest.raises(ConfigError, match=r"a batch of 2 samples was given \(3,\) ids"):
        manager.attach_train_batch(*ragged_batch([4, 4]), 1, [1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((24576, 2, 100, 1), 651),  # 16 MB
        ((24576, 2, 100, 2), 200),  # the whole run
        ((24576, 2, 1000, 2), 500),  # 250 steps divide the run
        ((24576, 2, 10007, 2), 650),  # a prime: places stay empty at its end
        ((24576, 2, 0, 4), 650),  # unknown length
        ((24576, 0, 0, 2), 651),
        ((10**9, 2, 100, 2), 10),
    ],
)
def test_shard_of_several_ranks_holds_whole_steps_that_divide_the_run(arguments, want):
    assert choose_rows(*arguments) == want


def test_loss_curve_is_a_table_and_a_picture(data, tmp_path):
    train(config_of(data, tmp_path, val_shards=str(data / "val"), eval_interval=2, max_steps=5))
    with (tmp_path / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["val_loss"] != "" for row in rows] == [False, True, False, True, True]
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_sum_without_per_sample_loss_is_rejected():
    model = small_model("gpt2").train()
    X, Y = ragged_batch([5, 6])
    with GhostEngineManager(
        {"method": "GradDotProd"}, model, val_data=(X, Y), loss="sum"
    ) as manager:
        manager.attach_train_batch(X, Y, 0)
        inputs, labels = manager.prepare_forward_input(X, Y)
        model(input_ids=inputs, labels=labels).loss.backward()
        manager.prepare_gradients()
        with pytest.raises(ModelError, match=r"takes per_sample_loss\(model, ...\).sum\(\)"):
            manager.aggregate_and_log()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([0.0] * 4, None),
        ([2.0, 2.0, 2.0, 1.0], "takes losses of one weight, got weights from 1 to 2"),
    ],
)
def test_losses_of_weight_0_give_products_of_0_and_several_weights_are_rejected(weights, expected):
    model = small_model("gpt2").train()
    X, Y = ragged_batch([5, 6])
    with GhostEngineManager(
        {"method": "GradDotProd"}, model, val_data=(X, Y), loss="sum"
    ) as manager:
        manager.attach_train_batch(X, Y, 0)
        inputs, labels = manager.prepare_forward_input(X, Y)
        losses = per_sample_loss(model, {"input_ids": inputs, "labels": labels})
        (losses * torch.tensor(weights)).sum().backward()
        manager.prepare_gradients()
        if expected:
            with pytest.raises(ModelError, match=expected):
                manager.aggregate_and_log()
        else:
            assert manager.aggregate_and_log()["total"].tolist() == [0.0, 0.0]


def test_dot_products_of_the_loop_match_explicit_gradients(data, tmp_path):
    changes = {
        "val_shards": str(data / "val"),
        "val_batch_size": 2,
        "grad_accumulation": 2,
        "max_steps": 3,
    }
    config = config_of(data, tmp_path / "dots", method="GradDotProd", **changes)
    train(config)
    train(config_of(data, tmp_path / "regular", **changes))
    for name, weight in weights_in(tmp_path / "regular").items():
        torch.testing.assert_close(
            weights_in(tmp_path / "dots")[name], weight, rtol=1e-4, atol=1e-5
        )
    group = zarr.open_group(tmp_path / "dots" / "grad_dotprod", mode="r")
    assert group["step"][...].tolist() == [1] * 6 + [2] * 6 + [3] * 6
    torch.manual_seed(config.seed)
    tokenizer, model = load_or_make_model(config)
    model.requires_grad_(True)

    def gradient(losses):
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(losses, list(model.parameters()))]
        )

    validation = Validation(config, tokenizer, torch.device("cpu"), World()).batches[0]
    batches = batches_of(config, index_of(data), tokenizer)
    first = [next(batches) for _ in range(2)]
    n_targets = sum(batch.n_targets for batch in first)
    inputs = {"input_ids": validation.input_ids, "labels": validation.labels}
    of_validation = gradient(per_sample_loss(model, inputs).sum() / validation.n_targets)
    want = [
        gradient(sample_loss(model, ids[labels != -100]) / n_targets) @ of_validation
        for batch in first
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True)
    ]
    np.testing.assert_allclose(group["total"][:6], torch.stack(want).numpy(), rtol=1e-4, atol=1e-9)
    assert group["sample_id"][:6].tolist() == [int(i) for batch in first for i in batch.sample_ids]
    table = (tmp_path / "dots" / "values.md").read_text()
    assert all(domain in table for domain in ("Github", "ArXiv", "Pile-CC"))


def test_values_sum_to_the_fall_of_the_validation_loss_under_sgd(data, tmp_path):
    config = config_of(
        data,
        tmp_path,
        method="GradDotProd",
        val_shards=str(data / "tars"),
        val_batches=1,
        optimizer="sgd",
        val_batch_size=16,
        learning_rate=0.005,
        warmup_steps=0,
        weight_decay=0.0,
        clip=0.0,
        max_steps=30,
    )
    train(config)
    torch.manual_seed(config.seed)
    tokenizer, model = load_or_make_model(config)
    validation = Validation(config, tokenizer, torch.device("cpu"), World())
    before = validation.loss(model.double())
    model.load_state_dict(weights_in(tmp_path), strict=False)
    fall = before - validation.loss(model)
    values = zarr.open_group(tmp_path / "grad_dotprod", mode="r")["value"][...]
    assert len(values) == config.max_steps * config.batch_size
    assert fall > 0.01
    # To first order: what is left is quadratic in the learning rate.
    assert values.sum() == pytest.approx(fall, rel=0.02)


@pytest.mark.parametrize("method", ["GradProjLora", "GradDotProd"])
def test_adapter_with_virtual_tokens_is_refused(method, tmp_path):
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(small_model("llama"), settings).train()
    batch = ragged_batch([5, 6])
    config = {"method": method, "result_dir": str(tmp_path)}
    with pytest.raises(ModelError, match=f"{method}: the PEFT adapter puts virtual tokens before"):
        GhostEngineManager(config, model, val_data=batch)
    engine = GradProjLoraEngine(model, "attn", 16, 2)
    with pytest.raises(ModelError, match="loss_reduction='mean': the PEFT adapter puts virtual"):
        engine.attach_train_batch(*batch, labels=batch[1], loss_reduction="mean")
