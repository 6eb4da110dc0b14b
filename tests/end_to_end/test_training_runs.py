"""Training as real processes: killed and resumed, and with two ranks."""

import csv
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import zarr
from helpers.forked_ranks import Ranks, environments
from helpers.gate import Gate
from helpers.jobs import ENVIRONMENT, PATIENCE_S, flags
from helpers.training_runs import config_of, make_data, rows_by_autograd, settings_of
from safetensors.torch import load_file

from gradproj import ProjectionStore
from gradproj.training import train

RUN = {
    "method": "GradProjLora", "max_steps": 60, "checkpoint_interval": 10, "proj_save_interval": 3,
    "rows_per_shard": 32, "dropout": 0.1, "pack": True, "eval_interval": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    with Ranks(tmp_path_factory.mktemp("ranks")) as started:
        yield started


def start(ranks, world_size=1, gate=None, **settings):
    """Start a run's processes, with the environment that torchrun gives them."""
    command = ["gradproj.__main__", "train", *flags(**settings)]
    for rank, environment in enumerate(environments(world_size)):
        ranks.start(command, rank, environment=environment, gate=gate)


def run(ranks, world_size=1, **settings):
    """Run to the end; return the output of its processes."""
    start(ranks, world_size, **settings)
    ended = ranks.wait_for_all()
    assert [rank.status for rank in ended] == [0] * world_size, "".join(
        rank.output for rank in ended
    )
    return "".join(rank.output for rank in ended)


def end_at(ranks, step, signal_number, folder, world_size=1, **settings):
    """Start a run, signal its processes once they have done a step; return how they ended."""
    gate = Gate(folder / f"gate-{step}", step)
    start(ranks, world_size, str(gate.folder), **settings)
    gate.wait_for(world_size)
    for pid in list(ranks._running):
        os.kill(pid, signal_number)
    return ranks.wait_for_all()


def curve_in(folder):
    with (folder / "loss.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def rows_in(folder):
    """Return rows, steps and ids of a run's store in order, without empty places."""
    with ProjectionStore(folder / "projections") as store:
        there = np.flatnonzero(store.column("status") == 1)
        return store.rows(there), store.array("step")[there], store.array("sample_id")[there]


def assert_same_run(a, b):
    assert curve_in(a) == curve_in(b)
    first, second = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    for x, y in zip(rows_in(a), rows_in(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_run_ended_three_times_and_resumed_equals_an_uninterrupted_one(ranks, data, tmp_path):
    changes = RUN | {"val_shards": str(data / "val")}
    settings = settings_of(data, tmp_path / "killed", **changes)
    for step in (4, 28):  # before the first checkpoint, and between two
        (killed,) = end_at(ranks, step, signal.SIGKILL, tmp_path, **settings, resume=True)
        assert killed.status == -signal.SIGKILL
    (stopped,) = end_at(ranks, 43, signal.SIGTERM, tmp_path, **settings, resume=True)
    assert stopped.status == 128 + signal.SIGTERM
    assert re.search(
        r"SIGTERM: stopped after step 43 of 60, with a checkpoint; the same command",
        stopped.output,
    )
    run(ranks, **settings, resume=True)
    train(config_of(data, tmp_path / "whole", **changes))
    assert len(curve_in(tmp_path / "whole")) == 60
    assert len(rows_in(tmp_path / "whole")[0]) == 180
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_two_ranks_train_one_model_and_fill_one_store(ranks, data, tmp_path):
    """Compare rows, ids and steps with one sample at a time, also after a stop and resume."""
    changes = {
        "method": "GradProjLora",
        "schedule": "constant",
        "proj_dtype": "float32",
        "batch_size": 2,
    }
    whole = settings_of(data, tmp_path / "whole", **changes)
    parts = settings_of(data, tmp_path / "parts", **changes)
    assert run(ranks, 2, **whole).count("Trained on") == 1
    run(ranks, 2, **parts | {"max_steps": 4, "checkpoint_interval": 4})
    run(ranks, 2, **parts | {"checkpoint_interval": 4}, resume=True)
    run(ranks, 2, **settings_of(data, tmp_path / "regular", **changes | {"method": "Regular"}))
    assert (
        curve_in(tmp_path / "parts")
        == curve_in(tmp_path / "whole")
        == curve_in(tmp_path / "regular")
    )
    weights = [
        load_file(tmp_path / name / "model.safetensors") for name in ("regular", "whole", "parts")
    ]
    assert all(torch.equal(weights[0][k], w[k]) for w in weights[1:] for k in weights[0])
    want, steps, ids = rows_by_autograd(config_of(data, tmp_path, **changes), data, world_size=2)
    expected = {
        (step, sample_id): row for row, step, sample_id in zip(want, steps, ids, strict=True)
    }
    for folder in ("whole", "parts"):
        rows, got_steps, got_ids = rows_in(tmp_path / folder)
        names = list(zip(got_steps.tolist(), got_ids.tolist(), strict=True))
        assert sorted(names) == sorted(expected)
        assert len(names) == 24
        for name, row in zip(names, rows, strict=True):
            assert np.linalg.norm(row - expected[name]) < 1e-4 * np.linalg.norm(expected[name])
    with ProjectionStore(tmp_path / "whole" / "projections") as store:
        assert len(store) == 24  # a number of whole steps divides the run: no place stays empty


def test_dot_products_of_two_killed_ranks_equal_an_uninterrupted_run(ranks, data, tmp_path):
    changes = {
        "method": "GradDotProd",
        "val_shards": str(data / "val"),
        "max_steps": 40,
        "checkpoint_interval": 10,
        "proj_save_interval": 3,
        "eval_interval": 20,
    }
    killed = settings_of(data, tmp_path / "killed", **changes, resume=True)
    ended = end_at(ranks, 24, signal.SIGKILL, tmp_path, 2, **killed)
    assert [rank.status for rank in ended] == [-signal.SIGKILL] * 2
    run(ranks, 2, **killed)
    run(ranks, 2, **settings_of(data, tmp_path / "whole", **changes))
    tables = [
        zarr.open_group(tmp_path / name / "grad_dotprod", mode="r") for name in ("killed", "whole")
    ]
    assert tables[0]["step"][...].tolist() == np.repeat(range(1, 41), 6).tolist()
    for name in ("step", "sample_id", "total", "value", "per_parameter"):
        np.testing.assert_array_equal(tables[0][name][...], tables[1][name][...])
    assert curve_in(tmp_path / "killed") == curve_in(tmp_path / "whole")
    values = [(tmp_path / name / "values.md").read_text() for name in ("killed", "whole")]
    assert values[0] == values[1]


def test_torchrun_starts_training_and_an_error_is_printed_once(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    flags = [
        "--shards",
        "x",
        "--tokenizer",
        "x",
        "--result_dir",
        str(tmp_path),
        "--method",
        "Ghost",
    ]
    done = subprocess.run(
        [*launcher, "-m", "gradproj", "train", *flags],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 1
    message = "gradproj: --method is 'Ghost'; choose one of Regular, GradDotProd, GradProjLora"
    assert done.stderr.count(message) == 1
