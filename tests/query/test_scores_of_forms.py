"""Weighted, chat and preference documents: relatif, head rows, hidden states, exact curvature."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.chat import chat_tokenizer, conversation, parts_of, tokens_of
from helpers.corpora import make_corpus, words
from helpers.jobs import run_job
from helpers.models import make_model
from helpers.whole_gradients import kfac_scores
from transformers import AutoModelForCausalLM

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, score
from gradproj.curvature.fit import CurvatureConfig, fit_curvature
from gradproj.curvature.folder import CurvatureFolder
from gradproj.curvature.recorded_model import RecordedModel
from gradproj.curvature.rescore import rescore
from gradproj.job.recorded import config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import Query, QueryProjector
from gradproj.store import HiddenStates

A, B, C, D = (words(n, n) for n in (5, 6, 7, 8))
CHAT = conversation(A, B, C, D)
BETA, N_ROWS, K = 0.3, 6, 8
DOCUMENTS = [
    ({"text": A}, [(1, [[A]])]),
    ({"text": A, "weight": -2.5}, [(-2.5, [[A]])]),
    ({"messages": CHAT}, [(1, parts_of("qwen", CHAT))]),
    ({"messages": CHAT, "weight": 3}, [(3, parts_of("qwen", CHAT))]),
    (
        {"prompt": f"{A}\n", "chosen": B, "rejected": C},
        [(BETA / 2, [f"{A}\n", [B]]), (-BETA / 2, [f"{A}\n", [C]])],
    ),
    ({"text": B, "weight": 0}, [(0, [[B]])]),
    ({"text": D}, [(1, [[D]])]),
]
"""Fields, and sequences ``(factor, parts)`` with the targets in lists."""
LAYER = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    tokenizer = chat_tokenizer("qwen")
    make_model(root / "model", vocab_size=len(tokenizer), max_position_embeddings=256)
    chat_tokenizer("qwen", root / "model")
    run_job(
        shards=make_corpus(root / "tars", [fields for fields, _ in DOCUMENTS]),
        model=root / "model", output_dir=root / "out", proj_rank_total=16, proj_rank_min=4,
        encoding="signs", basis="eigen", pilot_tokens=50, loss_reduction="sum", batch_size=4,
        max_length=256, preference_beta=BETA, head_rows=f"{N_ROWS}x{K}", hidden_state="mean",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float64).eval()
    sequences = [
        [(factor, *map(torch.tensor, tokens_of(tokenizer, parts))) for factor, parts in each]
        for _, each in DOCUMENTS
    ]
    with ProjectionStore(root / "out") as store:
        yield SimpleNamespace(output=root / "out", store=store, model=model, sequences=sequences)


def loss_of(model, ids, mask):
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    return F.cross_entropy(logits[:-1][mask[1:]], ids[1:][mask[1:]], reduction="sum")


def gradient(made, number, weight):
    """Return the gradient of a document's weighted loss."""
    return sum(
        factor * torch.autograd.grad(loss_of(made.model, ids, mask), weight)[0]
        for factor, ids, mask in made.sequences[number]
    )


def test_relatif_divides_each_form_by_its_own_influence(made):
    queries = [Query.of("a", messages=CHAT), Query.of("b", text=A)]
    rows = QueryProjector(made.store, device="cpu").rows(queries).rows
    got = score(rows, made.store, score="relatif")
    documents = torch.tensor(made.store.rows(range(len(DOCUMENTS))), dtype=torch.float64)
    solved = Preconditioner.fit(made.store, "kfac").solve(documents)
    own = (documents * solved).sum(dim=1).sqrt()
    want = (torch.tensor(rows, dtype=torch.float64) @ solved.T / own).nan_to_num(0).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())
    # A weight's size cancels, up to the rounding of the layers' scales.
    np.testing.assert_allclose(got[:, [1, 3]], got[:, [0, 2]] * [-1, 1], rtol=0.01)
    assert (got[:, 5] == 0).all()  # weight 0
    assert (got[:, 4] != 0).all()


def test_head_rows_of_each_form_are_those_of_autograd(made):
    store, head = made.store, made.model.get_output_embeddings()
    matrix = torch.tensor(store.array("head_matrix"), dtype=torch.float64).view(K, -1)
    scale = torch.tensor(store.array("head_scale"), dtype=torch.float64)
    untied = torch.nn.Parameter(head.weight.detach().clone())
    head.weight = untied  # the head's own gradient, without that of the embedding
    decoded = store.head.rows(np.arange(len(DOCUMENTS)))
    for number in (0, 1, 2, 3, 4, 6):
        want = scale[:, None] * (gradient(made, number, untied) @ matrix.T)
        largest = want.norm(dim=1).argsort(descending=True)[:N_ROWS]
        assert sorted(decoded.ids[number]) == sorted(largest.tolist())
        signs = decoded.values(K)[number] > 0
        assert (signs == (want[decoded.ids[number]].numpy() >= 0)).mean() > 0.95
    assert not decoded.values(K)[5].any()


def test_hidden_states_are_means_over_the_positions_before_targets(made):
    with HiddenStates(made.output) as hidden:
        got = hidden.rows(range(len(DOCUMENTS)))
    for number, sequences in enumerate(made.sequences):
        with torch.no_grad():
            states = [
                made.model.base_model(ids[None])[0][0, :-1][mask[1:]] for _, ids, mask in sequences
            ]
        want = torch.cat(states).mean(dim=0).numpy()
        assert np.linalg.norm(got[number] - want) < 1e-3 * np.linalg.norm(want)


def test_exact_curvature_counts_targets_and_rescores_each_form(made):
    """Curvature is that of the documents' losses, whatever their weights."""
    config = CurvatureConfig(output=str(made.output), layers=(LAYER,), device="cpu")
    fit_curvature(config, lambda line: None)
    module, seen = made.model.get_submodule(LAYER), {}

    def hook(module, args, output):
        output.retain_grad()
        seen["a"], seen["g"] = args[0], output

    handle, inputs, outputs = module.register_forward_hook(hook), [], []
    for _, ids, mask in (sequence for each in made.sequences for sequence in each):
        loss_of(made.model, ids, mask).backward()
        inputs.append(seen["a"][0, :-1][mask[1:]].detach())
        outputs.append(seen["g"].grad[0, :-1][mask[1:]])
    handle.remove()
    factors = {LAYER: tuple(x.T @ x / len(x) for x in map(torch.cat, (inputs, outputs)))}
    gradients = [{LAYER: gradient(made, n, module.weight)} for n in range(len(DOCUMENTS))]
    want = kfac_scores(factors, gradients[2:5], gradients, 0.03).numpy()
    run = config_from(RecordedRunArgs(output=str(made.output)))
    recorded = RecordedModel(made.store, run, torch.device("cpu"), layers=(LAYER,))
    ids = np.arange(len(DOCUMENTS))
    got = rescore(
        recorded, CurvatureFolder(made.store), [LAYER], recorded.sequences(ids[2:5]),
        recorded.sequences(ids), kind="kfac", damping=0.03, budget=2**40,
    ).scores  # fmt: skip
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()
