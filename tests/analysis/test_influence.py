"""Scores of a job's rows equal influence functions of full gradients in float64."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import run_job
from helpers.models import make_model
from helpers.stores import Output
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import GradProjLoraEngine, ProjectionStore
from gradproj.analysis import Preconditioner, score
from gradproj.engine.loss import per_sample_loss
from gradproj.store.layout import STATUS, StoreConfig
from gradproj.store.writer import update_attributes, write_array

N_DOCUMENTS = 40
N_QUERIES = 5
C = 0.05


@dataclass
class Exact:
    """Gradients and factors of one layer from plain autograd, float64."""

    gradients: np.ndarray
    """``(N, O, I)`` of each document's summed loss."""
    a: np.ndarray
    """``(I, I)`` mean over tokens of the layer's inputs' squares."""
    s: np.ndarray
    """``(O, O)`` likewise, of the gradients of a document's summed loss at the layer's output."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run a job with orthonormal square projections, which lose nothing."""
    folder = tmp_path_factory.mktemp("influence")
    make_corpus(folder / "tars", mixed_documents(N_DOCUMENTS))
    make_model(folder / "model", "gpt2", n_embd=8, n_head=2)
    settings = {"shards": folder / "tars", "model": folder / "model", "proj_kind": "orthonormal"}
    settings |= {"proj_layers": "mlp", "proj_dtype": "float32", "proj_rank_min": 1}
    settings["loss_reduction"] = "sum"
    run_job(**settings, output_dir=folder / "full", proj_rank_total=2**20)
    return folder, exact_numbers(folder / "model", texts())


def texts():
    return [document["text"] for document in mixed_documents(N_DOCUMENTS)]


def exact_numbers(model_path, texts):
    """Compute every layer's ``Exact`` from one document at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float64).eval()
    targets = {name: m for name, m in model.named_modules() if ".mlp.c_" in name}
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def watch(name):
        def hook(_, inputs, output):
            output.register_hook(lambda g: seen.__setitem__(name, (inputs[0][0].detach(), g[0])))

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in targets.items()]
    gradients = {name: [] for name in targets}
    sums = {name: [0.0, 0.0] for name in targets}
    n_tokens = 0
    for text in texts:
        tokens = torch.tensor(tokenizer(text).input_ids[:64])
        backward(model, tokens)
        n_tokens += len(tokens) - 1
        for name in targets:
            a, g = (x[:-1] for x in seen[name])  # the last token predicts nothing
            gradients[name].append((g.T @ a).numpy())
            sums[name][0] += (a.T @ a).numpy()
            sums[name][1] += (g.T @ g).numpy()
    for handle in handles:
        handle.remove()
    return {
        name: Exact(np.stack(gradients[name]), sums[name][0] / n_tokens, sums[name][1] / n_tokens)
        for name in targets
    }


def backward(model, tokens):
    """Gradients of the document's summed loss."""
    logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="sum").backward()


def damped(matrix):
    return matrix + C * np.trace(matrix) / len(matrix) * np.eye(len(matrix))


def kfac_influence(exact):
    """``(Q, N)``: sum over layers of ``<G_q, (S + d)^-1 G_n (A + d)^-1>``."""
    total = 0
    for layer in exact.values():
        turned = (
            np.linalg.inv(damped(layer.s))
            @ layer.gradients[:N_QUERIES]
            @ np.linalg.inv(damped(layer.a))
        )
        total = total + np.einsum("qoi,noi->qn", turned, layer.gradients)
    return total


def influence(exact):
    """Return ``(Q, N)``: the sum over layers of ``g_q^T (mean g g^T + d)^-1 g_n``."""
    total = 0
    for layer in exact.values():
        g = layer.gradients.reshape(N_DOCUMENTS, -1)
        total = total + g[:N_QUERIES] @ np.linalg.solve(damped(g.T @ g / N_DOCUMENTS), g.T)
    return total


def error(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


def queries_of(store):
    return store.rows(np.arange(N_QUERIES))


def test_every_document_has_a_gradient(made):
    with ProjectionStore(made[0] / "full") as store:
        assert (store.column("status") == STATUS["ok"]).all()
        assert [layer.name for layer in store.layers] == list(made[1])


def test_preconditioned_equals_the_influence_function_of_full_gradients(made):
    folder, exact = made
    with ProjectionStore(folder / "full") as store:
        got = score(queries_of(store), store, score="preconditioned", damping=C)
    assert error(got, influence(exact)) < 1e-4


def test_kfac_at_full_width_equals_kfac_influence_of_full_gradients(made):
    folder, exact = made
    with ProjectionStore(folder / "full") as store:
        got = score(queries_of(store), store, score="kfac", damping=C)
    assert error(got, kfac_influence(exact)) < 1e-4


def test_relatif_at_full_width_divides_by_self_influence(made):
    folder, exact = made
    with ProjectionStore(folder / "full") as store:
        got = score(queries_of(store), store, score="relatif", damping=C)
    self_scores = 0
    for layer in exact.values():
        turned = np.linalg.inv(damped(layer.s)) @ layer.gradients @ np.linalg.inv(damped(layer.a))
        self_scores = self_scores + np.einsum("noi,noi->n", turned, layer.gradients)
    assert error(got, kfac_influence(exact) / np.sqrt(self_scores)) < 1e-4


def narrow_store(folder, k):
    """Write a store of the same documents with k x k values per layer, by the engine alone."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows, n_tokens = [], 0
    with GradProjLoraEngine(
        model, "mlp", k * k, 1, proj_kind="orthonormal", freeze_weights=True, token_covariances=True
    ) as engine:
        for text in texts():
            tokens = torch.tensor(tokenizer(text).input_ids[:64])
            # The last token predicts nothing; the job never shows it to the model.
            engine.set_token_mask(torch.arange(len(tokens))[None] < len(tokens) - 1)
            per_sample_loss(
                model, {"input_ids": tokens[None], "labels": tokens[None]}
            ).sum().backward()
            n_tokens += len(tokens) - 1
            rows.append(engine.collect_batch()[0])
        sums = engine.take_token_covariances()
    output = Output(
        folder / f"k{k}",
        N_DOCUMENTS,
        ((k, k),) * len(engine.targets),
        StoreConfig(encoding="dense", proj_dtype="float32"),
    )
    output.stored = output.rows = torch.stack(rows).numpy()
    output.row_scale = np.ones(N_DOCUMENTS, np.float32)
    output.fill()
    write_array(output.store_path, "token_covariance_a", sums.a.numpy())
    write_array(output.store_path, "token_covariance_s", sums.s.numpy())
    update_attributes(output.store_path, {"covariance_tokens": n_tokens})


def test_kfac_approaches_full_width_as_k_grows(made):
    folder, exact = made
    want = kfac_influence(exact).ravel()
    agreement = []
    for name in ("k2", "k4", "k8", "full"):
        if name != "full":
            narrow_store(folder, int(name[1:]))
        with ProjectionStore(folder / name) as store:
            got = score(queries_of(store), store, score="kfac", damping=C)
        agreement.append(np.corrcoef(got.ravel(), want)[0, 1])
    assert agreement == sorted(agreement)
    assert agreement[-1] > 0.9999


def test_factors_are_means_over_target_tokens(made):
    with ProjectionStore(made[0] / "full") as store:
        assert Preconditioner.fit(store).n_rows == store.column("n_tokens").sum()
