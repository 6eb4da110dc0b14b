"""``--matrices``: a job with matrices of one's own; what is checked, recorded and used later."""

import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import flags
from helpers.models import make_model, ragged_batch
from helpers.references import projected_gradient_by_autograd, relative_error
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from gradproj import ProjectionStore
from gradproj.coordinator.process_id import Owner
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.selection import find_layers
from gradproj.errors import ConfigError
from gradproj.job.config import run_config
from gradproj.job.plan import make_plan
from gradproj.job.recorded import recorded_config
from gradproj.job.startup import make_output


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    return {
        "shards": make_corpus(root / "tars", mixed_documents(20)),
        "model": make_model(root / "model"),
        "proj_layers": "attn",
    }


@pytest.fixture(scope="module")
def model(inputs):
    return AutoModelForCausalLM.from_pretrained(inputs["model"]).eval()


@pytest.fixture
def matrices(model):
    """Widths that no setting would choose, one dtype that is not float32."""
    torch.manual_seed(0)
    tensors = {}
    for target in find_layers(model, ["attn"]):
        n_i, n_o = target.widths
        tensors[f"{target.name}.p_i"] = torch.randn(3, n_i, dtype=torch.float64)
        tensors[f"{target.name}.p_o"] = torch.randn(5, n_o)
    return tensors


def plan_of(inputs, tmp_path, tensors, **changes):
    save_file(tensors, tmp_path / "own.safetensors")
    settings = {**inputs, "matrices": tmp_path / "own.safetensors", "output_dir": tmp_path / "out"}
    return make_plan(run_config(flags(**{**settings, **changes}), "plan"), progress=False)


def test_rows_are_projected_by_the_files_matrices_which_the_store_keeps(
    inputs, model, matrices, tmp_path
):
    plan = plan_of(inputs, tmp_path, matrices)
    assert {(layer.k_i, layer.k_o) for layer in plan.layers} == {(3, 5)}
    make_output(plan, Owner.this_process("test", 0, 0))
    (tmp_path / "own.safetensors").unlink()
    projection = recorded_config(tmp_path / "out").projection
    ids, labels = ragged_batch([9, 5])
    with ProjectionStore(tmp_path / "out") as store:
        engine = GradProjLoraEngine.from_config(model, projection, store.projection_matrices)
        assert store.attributes["projection"]["kind"] == "given"
    with engine:
        per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
        rows = engine.collect_batch()
    for name, (p_i, p_o) in engine.projection_matrices.items():
        assert torch.equal(p_i, matrices[f"{name}.p_i"].float())
        assert torch.equal(p_o, matrices[f"{name}.p_o"])
    for n, length in enumerate([9, 5]):
        want = projected_gradient_by_autograd(model, engine, ids[n, :length])
        assert relative_error(rows[n], want) < 1e-5


def test_other_matrices_are_another_identity_and_another_path_is_not(inputs, matrices, tmp_path):
    first = plan_of(inputs, tmp_path, matrices)
    (tmp_path / "own.safetensors").rename(tmp_path / "moved.safetensors")
    moved = plan_of(inputs, tmp_path, matrices, matrices=tmp_path / "moved.safetensors")
    assert moved.identity == first.identity
    scaled = plan_of(inputs, tmp_path, {name: 2 * p for name, p in matrices.items()})
    assert scaled.identity["--matrices"] != first.identity["--matrices"]


def test_layers_of_the_file_that_are_not_chosen_are_named(inputs, matrices, tmp_path):
    assert plan_of(inputs, tmp_path, matrices).notes == ()
    more = {"model.layers.1.self_attn.q_prj.p_i": torch.ones(3, 32)}
    more["model.layers.1.self_attn.q_prj.p_o"] = torch.ones(5, 32)
    assert plan_of(inputs, tmp_path, matrices | more).notes == (
        "matrices      1 layer not chosen, so not used: model.layers.1.self_attn.q_prj",
    )


def without(tensors, name):
    return {key: tensor for key, tensor in tensors.items() if name not in key}


WRONG = [
    (
        lambda t: without(t, "layers.1.self_attn.q_proj"),
        {},
        r"none for layer \S+\.q_proj",
    ),
    (lambda t: without(t, "layers.1.self_attn.q_proj.p_o"), {}, r"holds \S+q_proj\.p_i, but no"),
    (lambda t: {k: p[:, 1:].contiguous() for k, p in t.items()}, {}, r"p_i must be \(k_i, 32\)"),
    (lambda t: {k: p * torch.inf for k, p in t.items()}, {}, "values that are not finite"),
    (lambda t: {k: p[0] for k, p in t.items()}, {}, "it must be a matrix of floating-point"),
    (lambda t: {f"{k}.x": p for k, p in t.items()}, {}, "is not named LAYER.p_i or LAYER.p_o"),
    (lambda t: t, {"matrices": "/nowhere.safetensors"}, "/nowhere.safetensors cannot be read"),
    (lambda t: t, {"proj_seed": 7, "proj_kind": "gaussian"}, "leave out --proj_seed, --proj_kind"),
]


@pytest.mark.parametrize(("change", "flags_", "message"), WRONG, ids=[w[2] for w in WRONG])
def test_wrong_matrices_are_named(inputs, matrices, tmp_path, change, flags_, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(inputs, tmp_path, change(matrices), **flags_)
    assert not (tmp_path / "out").exists()
