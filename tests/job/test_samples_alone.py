"""A model whose samples cannot be separated in a batch: refused at the start, exact alone."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.corpora import make_corpus
from helpers.jobs import flags
from helpers.models import Experts, make_model
from helpers.references import relative_error

import gradproj.run
from gradproj import ProjectionStore
from gradproj.coordinator.heartbeats import Heartbeat, RankProgress
from gradproj.coordinator.process_id import Owner
from gradproj.coordinator.units import UnitQueue
from gradproj.distributed import Process, Rendezvous
from gradproj.engine import row_check
from gradproj.errors import ModelError, ReportedError
from gradproj.job import lockstep, plan
from gradproj.job.config import run_config
from gradproj.job.shutdown import StopRequest
from gradproj.job.startup import start_job


def with_experts(make, device):
    """Make the model and replace its MLPs by experts."""

    def made(*args):
        model = make(*args)
        torch.manual_seed(1)
        for block in model.model.layers:
            with torch.device(device):
                block.mlp = Experts(32)
        return model.eval()

    return made


def compute(settings):
    process = Process.from_environment()
    with Rendezvous(process) as ranks:
        job = start_job(run_config(flags(**settings), "test"), process, ranks)
    queue = UnitQueue(
        job.plan.output, job.plan.layout, job.plan.identity_hash, job.plan.wanted, job.owner
    )
    gradproj.run.compute(job, queue, torch.device("cpu"), StopRequest(), RankProgress())


def test_job_prints_why_rows_are_unchecked(tmp_path, monkeypatch, capsys):
    def refuse(*args):
        raise ValueError("give\npixels")

    monkeypatch.setattr(row_check, "short_samples", refuse)
    compute(
        {
            "shards": make_corpus(tmp_path / "tars", [{"input_ids": [3, 5, 9]}]),
            "model": make_model(tmp_path / "model"),
            "output_dir": tmp_path / "out",
            "device": "cpu",
        }
    )
    (line,) = [each for each in capsys.readouterr().out.splitlines() if "not checked" in each]
    assert line == r"rows          not checked: ValueError('give\npixels')"


def test_experts_are_refused_in_batches_and_exact_alone(tmp_path, monkeypatch, capsys):
    documents = [
        {"input_ids": [3 + 7 * n % 90, 5, 9 + n, 4, 8, 30 + n][: 4 + n % 3]} for n in range(6)
    ]
    settings = {
        "shards": make_corpus(tmp_path / "tars", documents),
        "model": make_model(tmp_path / "model"),
        "output_dir": tmp_path / "out",
        "proj_layers": "experts",
        "proj_dtype": "float32",
        "loss_reduction": "sum",
        "device": "cpu",
    }
    models = []
    load = with_experts(lockstep.load_model, "cpu")
    monkeypatch.setattr(plan, "model_skeleton", with_experts(plan.model_skeleton, "meta"))
    monkeypatch.setattr(
        lockstep, "load_model", lambda *args: models.append(load(*args)) or models[-1]
    )
    with pytest.raises(ModelError, match=r"mlp\.experts\.0.*another order.*--batch_size 1"):
        compute(settings)
    # The refused start left a store without a row, which other settings replace once nobody works
    # on it.
    (settings["output_dir"] / "batch.json").write_text("{}")
    elsewhere = replace(Owner.this_process("other", 0, 0), host="elsewhere")
    with Heartbeat(settings["output_dir"] / "heartbeats", elsewhere, RankProgress()):
        with pytest.raises(ReportedError):
            compute({**settings, "proj_seed": 1, "batch_size": 1})
        assert "has no row: process" in capsys.readouterr().err
    compute({**settings, "proj_seed": 1, "batch_size": 1, "batch_tokens": "auto"})
    with pytest.raises(ReportedError):
        compute({**settings, "proj_layers": "attn"})
    assert "made with other settings" in capsys.readouterr().err
    model = copy.deepcopy(models[-1]).double().requires_grad_(True)
    with ProjectionStore(tmp_path / "out") as store:
        for n, document in enumerate(documents):
            model.zero_grad()
            tokens = torch.tensor(document["input_ids"])
            logits = model(input_ids=tokens[None], use_cache=False).logits[0]
            F.cross_entropy(logits[:-1], tokens[1:], reduction="sum").backward()
            row = torch.tensor(store.rows([n])[0]).double()
            for layer in store.layers:
                p_i, p_o = (torch.tensor(p).double() for p in store.projection_matrices[layer.name])
                want = p_o @ model.get_submodule(layer.name).weight.grad @ p_i.T
                got = row[layer.slice_start : layer.slice_end]
                assert relative_error(got, want.flatten()) < 1e-5
