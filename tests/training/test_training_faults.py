"""Faults of a training run: lost checkpoints, full disks, torn files, runs started twice."""

import fcntl
import resource
import shutil
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from helpers.crash_disk import Disk, put
from helpers.models import ragged_batch, small_model
from helpers.references import projected_gradient_by_autograd
from helpers.training_runs import config_of, make_data, settings_of

from gradproj import GradProjLoraEngine, ProjectionStore
from gradproj.__main__ import main
from gradproj.corpus.index_file import open_corpus
from gradproj.distributed import World
from gradproj.errors import ConfigError, CorpusError, StoreError
from gradproj.store.append_store import AppendStore
from gradproj.store.append_table import AppendTable
from gradproj.store.layout import STATUS
from gradproj.training import GhostEngineManager, checkpoints, train
from gradproj.training.data import batches_of

SETTINGS = {"proj_rank_total": 16, "proj_rank_min": 2, "proj_dtype": "float32"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def steps_in(folder, method):
    if method == "GradDotProd":
        return zarr.open_group(folder / "grad_dotprod", mode="r")["step"][...].tolist()
    with ProjectionStore(folder / "projections") as store:
        return store.array("step").tolist()


# --- a folder that is not empty ---


@pytest.mark.parametrize("method", ["GradProjLora", "GradDotProd"])
def test_run_with_lost_checkpoints_is_not_restarted(data, tmp_path, method):
    changes = {"method": method, "val_shards": str(data / "val"), "checkpoint_interval": 2}
    train(config_of(data, tmp_path, **changes))
    shutil.rmtree(tmp_path / "checkpoints")
    before = steps_in(tmp_path, method)
    with pytest.raises(
        StoreError, match=r"holds a model .model.safetensors. and no checkpoint to continue from"
    ):
        train(config_of(data, tmp_path, resume=True, **changes))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(
        StoreError, match="holds 6 steps of a run and no checkpoint, though one is made every 2"
    ):
        train(config_of(data, tmp_path, resume=True, **changes))
    assert steps_in(tmp_path, method) == before


def test_run_stopped_before_its_first_checkpoint_reports_a_restart(data, tmp_path, capsys):
    (tmp_path / "loss.csv").write_text("step,loss\n1,5\n2,5\n")
    train(config_of(data, tmp_path, resume=True, checkpoint_interval=3))
    assert "starting from the beginning; the 2 steps there are repeated" in capsys.readouterr().err


def test_another_model_in_the_folder_is_kept(data, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"years of work")
    with pytest.raises(StoreError, match=r"it would be overwritten\. Give a new folder"):
        train(config_of(data, tmp_path))
    assert (tmp_path / "model.safetensors").read_bytes() == b"years of work"


def test_second_run_in_a_folder_is_rejected(data, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LOCK_PATIENCE_S", 0.1)
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="another run is training into --result_dir"):
            train(config_of(data, tmp_path))
    train(config_of(data, tmp_path))


# --- lost results before a checkpoint ---


def test_moved_documents_resume_and_other_documents_are_rejected(data, tmp_path):
    tars = tmp_path / "tars"
    shutil.copytree(data / "tars", tars)
    changes = {"checkpoint_interval": 3}
    train(config_of(data, tmp_path / "run", shards=str(data / "tars"), max_steps=3, **changes))
    train(config_of(data, tmp_path / "run", shards=str(tars), max_steps=4, resume=True, **changes))
    shutil.copy(next((data / "val").glob("*.tar")), tars / "later.tar")
    with pytest.raises(
        ConfigError, match=r"--shards: checkpoint '[0-9a-f]{32}', this run '[0-9a-f]{32}'"
    ):
        train(
            config_of(data, tmp_path / "run", shards=str(tars), max_steps=5, resume=True, **changes)
        )


def loop(folder, method, steps, resume_step=None, cleanup=True):
    """Run steps of a hand-written loop, which writes rows every four steps."""
    model = small_model("gpt2").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    config = {"method": method, "result_dir": str(folder), "proj_save_interval": 4, **SETTINGS}
    validation = ragged_batch([6, 4])
    manager = GhostEngineManager(
        config, model, optimizer, val_data=validation, resume_step=resume_step
    )
    if resume_step:
        manager.load_state_dict({"step": resume_step})
    for step in steps:
        X, Y = ragged_batch([7, 5], seed=step)
        manager.attach_train_batch(X, Y, step, [2 * step, 2 * step + 1])
        inputs, labels = manager.prepare_forward_input(X, Y)
        model(input_ids=inputs, labels=labels).loss.backward()
        manager.prepare_gradients()
        manager.aggregate_and_log()
        manager.clear_gradients()
        if manager.should_save_metrics(step):
            manager.save_metrics(step)
    if cleanup:
        manager.cleanup()
    return manager


@pytest.mark.parametrize("method", ["GradProjLora", "GradDotProd"])
def test_rows_missing_before_the_resumed_step_are_an_error(tmp_path, method):
    loop(tmp_path, method, range(1, 8), cleanup=False)  # killed: steps 5 to 7 were not written
    with pytest.raises(
        StoreError, match=r"ends with step 4, so the rows up to step 7.*engine\.state_dict\(\)"
    ):
        loop(tmp_path, method, range(8, 10), resume_step=7)
    loop(tmp_path, method, range(5, 7), resume_step=4, cleanup=False).state_dict()
    loop(tmp_path, method, range(7, 9), resume_step=6)
    assert steps_in(tmp_path, method) == np.repeat(range(1, 9), 2).tolist()


def test_lost_table_is_an_error(data, tmp_path):
    changes = {"method": "GradDotProd", "val_shards": str(data / "val"), "checkpoint_interval": 3}
    train(config_of(data, tmp_path, **changes))
    shutil.rmtree(tmp_path / "grad_dotprod")
    with pytest.raises(StoreError, match="has no row, so the rows up to step 6"):
        train(config_of(data, tmp_path, resume=True, **changes | {"max_steps": 8}))


@pytest.mark.parametrize("name", ["training_state.pt", "rank-00000.pt", "model.safetensors"])
@pytest.mark.parametrize("harm", ["torn", "gone"])
def test_damaged_checkpoint_is_named(data, tmp_path, name, harm, capsys):
    train(config_of(data, tmp_path, checkpoint_interval=3))
    path = tmp_path / "checkpoints" / "step-00000006" / name
    content = path.read_bytes()
    path.unlink()
    if harm == "torn":
        path.write_bytes(content[: len(content) // 2])
    flags = [
        "--shards",
        str(data / "tars"),
        "--tokenizer",
        str(data / "tok"),
        "--result_dir",
        str(tmp_path),
    ]
    shape = {
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "max_length": 16,
        "batch_size": 3,
        "max_steps": 6,
    }
    shape |= {"warmup_steps": 2, "learning_rate": 0.01, "proj_rank_total": 16, "proj_rank_min": 2}
    flags += [word for key, value in shape.items() for word in (f"--{key}", str(value))]
    capsys.readouterr()
    assert main(["train", *flags, "--device", "cpu", "--resume"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "step-00000006" in line


@contextmanager
def files_of_at_most(n_bytes):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("n_bytes", [3_000, 20_000, 60_000])
def test_full_disk_at_a_checkpoint_is_one_line_and_keeps_the_last_one(data, tmp_path, n_bytes):
    changes = {"checkpoint_interval": 3}
    train(config_of(data, tmp_path, max_steps=3, **changes))
    with files_of_at_most(n_bytes), pytest.raises(StoreError, match="cannot write"):
        train(config_of(data, tmp_path, resume=True, **changes))
    train(config_of(data, tmp_path, resume=True, **changes))
    train(config_of(data, tmp_path / "whole", **changes))
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


# --- loss of power ---


def columns_of(start, stop):
    n = stop - start
    return {
        "status": np.full(n, STATUS["ok"], np.uint8),
        "loss": np.zeros(n),
        "n_tokens": np.ones(n),
        "grad_norm": np.ones(n),
        "step": np.arange(start, stop),
        "sample_id": np.arange(start, stop),
    }


def test_power_loss_keeps_rows_that_a_checkpoint_counts_on(tmp_path):
    loop(tmp_path / "run", "GradProjLora", [], cleanup=False)
    folder = tmp_path / "run" / "projections"
    store = AppendStore(folder, 0, 1)
    dim = store.layout.dim

    def add(start, stop):
        rows = np.arange(start, stop, dtype=np.float32)[:, None] * np.ones((1, dim), np.float32)
        store.add(rows, columns_of(start, stop))
        store.flush()

    add(0, 5)
    store.fsync()
    disk = Disk(folder, one_by_one=True).keep()
    with disk.recording():
        add(5, 9)
    assert len(disk.states) > 50
    for crash, state in disk.states.items():
        again = tmp_path / "again"
        again.mkdir()
        put(state.tree, again)
        AppendStore(again, 0, 1).cut(5)
        with ProjectionStore(again) as store:
            assert store.rows(range(5))[:, 0].tolist() == [0, 1, 2, 3, 4], crash
            assert store.array("step")[:5].tolist() == [0, 1, 2, 3, 4], crash
        shutil.rmtree(again)


def test_power_loss_keeps_appended_table_rows(tmp_path):
    columns = {"step": (np.dtype("i8"), None), "values": (np.dtype("f4"), 3)}

    def append(table, start, stop):
        steps = np.arange(start, stop)
        table.append({"step": steps, "values": np.repeat(steps[:, None], 3, 1).astype("f4")})

    append(AppendTable(tmp_path / "run" / "table", columns, {}), 0, 1022)
    disk = Disk(tmp_path / "run", one_by_one=True).keep()
    with disk.recording():
        append(AppendTable(tmp_path / "run" / "table", columns, {}), 1022, 1030)
    counts = set()
    for crash, state in disk.states.items():
        put(state.tree, tmp_path / "again")
        table = AppendTable(tmp_path / "again" / "table", columns, {})
        counts.add(table.n_rows)
        assert table.read("step").tolist() == list(range(table.n_rows)), crash
        assert table.read("values")[:, 2].tolist() == list(range(table.n_rows)), crash
        shutil.rmtree(tmp_path / "again")
    assert counts == {1022, 1030}
    assert table.n_rows == 1030


# --- errors of a loop ---


def test_mean_loss_divided_by_accumulation_gives_whole_rows(tmp_path):
    model = small_model("gpt2")
    config = {
        "method": "GradProjLora",
        "result_dir": str(tmp_path),
        "grad_accumulation": 2,
        **SETTINGS,
    }
    batches = [ragged_batch([7, 5], seed=seed) for seed in (1, 2)]
    with GhostEngineManager(config, model, torch.optim.SGD(model.parameters(), lr=0.1)) as manager:
        for number, (X, Y) in enumerate(batches):
            manager.attach_train_batch(X, Y, 1, [2 * number, 2 * number + 1])
            (model(input_ids=X, labels=Y).loss / 2).backward()
            manager.prepare_gradients()
            manager.aggregate_and_log()
            manager.clear_gradients()
    model.requires_grad_(True)
    projection = GradProjLoraEngine(model, proj_rank_total=16, proj_rank_min=2)
    alone = [x[:length] for X, _ in batches for x, length in zip(X, [7, 5], strict=True)]
    want = [
        projected_gradient_by_autograd(model, projection, ids) / (len(ids) - 1) for ids in alone
    ]
    with ProjectionStore(tmp_path / "projections") as store:
        np.testing.assert_allclose(
            store.rows(range(4)), torch.stack(want).numpy(), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"result_dir": ""}, "--result_dir is empty; give a folder"),
        ({"seed": -1}, r"--seed must be at least 0 and less than 4,294,967,296, got -1"),
        ({"seed": 10**22}, r"--seed must be at least 0 and less than 4,294,967,296"),
        (
            {"learning_rate": float("inf")},
            "--learning_rate must be more than 0 and finite, got inf",
        ),
    ],
)
def test_impossible_run_setting_is_named(data, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        replace(config_of(data, tmp_path), **changes)


def test_missing_validation_documents_name_their_flag(data, tmp_path):
    with pytest.raises(CorpusError, match="--val_shards"):
        train(config_of(data, tmp_path, val_shards=str(tmp_path / "nothing")))


def test_fewer_documents_than_ranks_are_rejected_by_every_rank(data, tmp_path):
    index = open_corpus(str(data / "tars"))
    config = config_of(data, tmp_path)
    for rank in (0, index.n_samples):
        with pytest.raises(CorpusError, match=r"70 document.s. for 71 ranks; start fewer"):
            next(batches_of(config, index, None, World(rank, 71)))


def test_timeout_of_a_collective_in_training_is_one_line(data, tmp_path, monkeypatch, capsys):
    def time_out(*_):
        raise RuntimeError("[gloo/transport/tcp/buffer.cc:81] Timed out waiting 1800000ms")

    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    meeting = "gradproj.distributed.rendezvous.Rendezvous"
    monkeypatch.setattr(meeting, lambda _: SimpleNamespace(store=None))
    monkeypatch.setattr("gradproj.training.loop.lock_result_dir", lambda *_: nullcontext())
    monkeypatch.setattr("gradproj.training.loop._Run", time_out)
    settings = settings_of(data, tmp_path / "out")
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["train", *flags]) != 0
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "gradproj:" in line)
    assert "Timed out waiting 1800000ms" in line
