"""Queries by another checkpoint: rows are those of its own gradients, in the store's matrices."""

import shutil

import numpy as np
import pytest
import torch
from helpers.models import make_model
from helpers.query_command import ask
from helpers.references import projected_gradient_by_autograd, relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import GradProjLoraEngine, ProjectionStore
from gradproj.errors import ModelError
from gradproj.query import Query, QueryProjector

assert ask

TEXT = "the of and to in"


@pytest.fixture(scope="module")
def tuned(job, tmp_path_factory):
    """The job's model with other weights, and its folder, which has no tokenizer."""
    folder = tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(job.model)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model.eval(), folder


@pytest.fixture(scope="module")
def store(job):
    with ProjectionStore(job.output) as opened:
        yield opened


def row_by_autograd(job, store, model):
    """The mean loss's row, as the finished job's."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(job.model)(TEXT).input_ids)
    engine = GradProjLoraEngine(model, matrices=store.projection_matrices)
    return projected_gradient_by_autograd(model, engine, ids) / (len(ids) - 1)


def row_of_query(store, folder):
    projector = QueryProjector(store, device="cpu", query_model=str(folder))
    return torch.from_numpy(projector.rows([Query.of("q", text=TEXT)]).rows[0])


def test_row_is_that_of_the_other_checkpoint(job, store, tuned):
    model, folder = tuned
    got, want = row_of_query(store, folder), row_by_autograd(job, store, model)
    assert relative_error(got, want) < 1e-5
    own = QueryProjector(store, device="cpu").rows([Query.of("q", text=TEXT)]).rows[0]
    assert relative_error(torch.from_numpy(own), want) > 0.01


def test_adapter_of_a_model_without_one_is_merged(job, store, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(job.model)
    base.config._name_or_path = str(job.model)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, config)
    adapted.peft_config["default"].base_model_name_or_path = str(job.model)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    adapted.save_pretrained(tmp_path)
    got = row_of_query(store, tmp_path)
    want = row_by_autograd(job, store, adapted.merge_and_unload().eval())
    assert relative_error(got, want) < 1e-5


def test_answer_names_the_model_of_its_queries(job, tuned, ask):
    words = "--text", TEXT, "--query_model", tuned[1], "--top_k", 2, "--bottom_k", 0
    words = *words, "--score", "cosine"
    assert [line["query_model"] for line in ask.objects(job.output, *words)] == [str(tuned[1])] * 2
    lines = " ".join(line.strip() for line in ask(job.output, *words)[0])
    assert f"models   queries by {tuned[1]}, documents by the job's model" in lines
    message = ask.mistake(job.output, *words[:4], "--score", "text")
    assert "--query_model projects the queries; leave out --score text" in message


def test_other_shapes_layers_and_tokens_are_refused(job, store, tuned, tmp_path):
    wide = make_model(tmp_path / "wide", intermediate_size=56)
    with pytest.raises(ModelError, match=r"--query_model .* its layer .* is 56 x 32, that of"):
        row_of_query(store, wide)
    gpt2 = make_model(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ModelError, match=r"--query_model .*: it has no layer model.layers.0"):
        row_of_query(store, gpt2)
    with pytest.raises(ModelError, match="no such directory"):
        row_of_query(store, tmp_path / "none")
    other = tmp_path / "other"
    shutil.copytree(tuned[1], other)
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    tokens = tokenizer.get_vocab()
    text = tokenizer.backend_tokenizer.to_str()
    a, b = (next(t for t, i in tokens.items() if i == number) for number in (20, 21))
    text = text.replace(f'"{a}":20', f'"{a}":21').replace(f'"{b}":21', f'"{b}":20')
    tokenizer.save_pretrained(other)
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"its tokenizer is another than the store's: token"):
        row_of_query(store, other)
    assert np.isfinite(row_of_query(store, tuned[1]).numpy()).all()
