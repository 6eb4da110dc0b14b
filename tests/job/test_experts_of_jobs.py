"""``--experts`` in a job: its rows, its identity, and stores that were begun before the flag."""

import json

import numpy as np
import pytest
from helpers.corpora import make_corpus, words
from helpers.jobs import SMALL_JOB, flags, run_job
from helpers.models import make_model

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.errors import ModelError, OtherSettingsError
from gradproj.job.config import run_config
from gradproj.job.plan import make_plan
from gradproj.job.recorded import recorded_config
from gradproj.query import Query, QueryProjector

DOCUMENTS = [{"text": words(3 + n % 3, seed=n)} for n in range(12)]
EXPERTS = [
    f"model.layers.{n}.mlp.experts.{x}" for n in (0, 1) for x in ("down_proj", "gate_up_proj")
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    settings = {
        "shards": make_corpus(root / "tars", DOCUMENTS),
        "model": make_model(root / "model", "qwen3_moe"),
        "basis": "eigen",
        "proj_dtype": "float32",
    }
    return SMALL_JOB | settings


@pytest.fixture(scope="module")
def output(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("job") / "out"
    run_job(**inputs, output_dir=output)
    return output


def plan_of(inputs, output, **changes):
    settings = inputs | {"output_dir": output} | changes
    return make_plan(run_config(flags(**settings), "plan"), progress=False)


def test_experts_are_layers_whose_rows_recompute_and_answer_queries(output, capsys):
    with ProjectionStore(output) as store:
        names = list(store.projection_matrices)
        assert sorted(name for name in names if ".experts." in name) == EXPERTS
        assert "model.layers.1.mlp.gate" in names
        query = Query.of("q", text=DOCUMENTS[5]["text"])
        row = QueryProjector(store, device="cpu").rows([query]).rows[0]
        (stored,) = store.rows([5])
    assert np.linalg.norm(row - stored) < 1e-5 * np.linalg.norm(stored)
    assert main(["verify", str(output), "--recompute", "4", "--device", "cpu"]) == 0
    assert "sound and complete" in capsys.readouterr().out


def test_form_of_experts_is_part_of_the_identity(inputs, output):
    assert plan_of(inputs, output).identity["--experts"] == "joint"
    with pytest.raises(OtherSettingsError, match=r"--experts: store 'joint', this run 'separate'"):
        plan_of(inputs, output, experts="separate")


def test_plan_says_what_either_form_costs(inputs, tmp_path):
    for experts, line in (
        ("joint", "joint: 4 layers, 384 B of a row (separate: 16, 1.5 kB)"),
        ("separate", "separate: 16 layers, 1.5 kB of a row (joint: 4, 384 B)"),
    ):
        assert f"experts       {line}" in plan_of(inputs, tmp_path, experts=experts).notes


def test_few_bytes_a_document_keep_the_experts_outputs(inputs, tmp_path):
    few = {"bytes_per_document": 300, "shards": inputs["shards"], "model": inputs["model"]}
    config = run_config(flags(**few, output_dir=tmp_path, max_length=48), "plan")
    layers = make_plan(config, progress=False).layers
    assert [layer.name.partition(".mlp.")[2] for layer in layers] == ["experts.down_proj"] * 2


def test_head_rows_are_planned_for_a_mixture(inputs, tmp_path):
    signs = {"encoding": "signs", "proj_dtype": "float16", "head_rows": "8x8"}
    assert plan_of(inputs, tmp_path, **signs).head is not None


def test_compiling_experts_is_refused_with_the_way_out(inputs, tmp_path):
    with pytest.raises(ModelError, match=r"--compile: experts and routers .* add -mlp"):
        plan_of(inputs, tmp_path, compile=True)


def test_store_that_was_begun_before_the_flag_has_no_experts_and_continues(inputs, tmp_path):
    inputs = inputs | {"model": make_model(tmp_path / "model", "qwen2_moe"), "max_samples": 4}
    output = tmp_path / "out"
    run_job(**inputs, output_dir=output, experts="none")
    # That is how an older version left it.
    path = output / "run_config.json"
    path.write_text(
        json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "experts"})
    )
    plan = plan_of(inputs, output)
    assert "--experts" not in plan.identity
    assert plan.config.projection.experts == recorded_config(output).projection.experts == "none"
    names = [layer.name for layer in plan.layers]
    assert any("shared_expert.up_proj" in name for name in names)
    assert not any("experts" in name or name.endswith("mlp.gate") for name in names)
