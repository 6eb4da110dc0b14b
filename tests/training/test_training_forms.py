"""Masked, weighted and chat documents in training equal plain autograd of their losses."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from helpers.chat import chat_tokenizer, conversation, parts_of, tokens_of
from helpers.corpora import make_corpus, words
from helpers.models import make_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gradproj import GradProjLoraEngine, ProjectionStore
from gradproj.corpus.index_file import open_corpus
from gradproj.errors import CorpusError
from gradproj.training import TrainConfig, train
from gradproj.training.data import batches_of, shuffled_documents

A, B, C, D = (words(n, n) for n in (5, 6, 7, 8))
CHAT = conversation(A, B, C, D)
RATE = 0.5
VALIDATION = [({"text": D}, 1, [[D]]), ({"prompt": A, "completion": C}, 1, [A, [C]])]
DOCUMENTS = [
    ({"text": A}, 1, [[A]]),
    ({"text": A, "weight": -2.5}, -2.5, [[A]]),
    ({"prompt": f"{A}\n", "completion": B, "weight": 0.5}, 0.5, [f"{A}\n", [B]]),
    ({"messages": CHAT}, 1, parts_of("llama3", CHAT)),
    ({"messages": CHAT[:2], "weight": 3}, 3, parts_of("llama3", CHAT[:2])),
    ({"prompt": f"{B}\n", "completion": C}, 1, [f"{B}\n", [C]]),
    ({"text": B, "weight": 0}, 0, [[B]]),
]
"""``(fields, weight, parts)``; the targets among the parts are in lists."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("forms")
    tokenizer = chat_tokenizer("llama3")
    model = make_model(root / "model", vocab_size=len(tokenizer), max_position_embeddings=256)
    chat_tokenizer("llama3", model)
    bad = [{"messages": conversation(A)}, {"messages": "x"}]  # no target; malformed
    make_corpus(root / "tars", [fields for fields, _, _ in DOCUMENTS] + bad)
    make_corpus(root / "val", [fields for fields, _, _ in VALIDATION])
    return SimpleNamespace(root=root, model=model, tokenizer=tokenizer)


def config_of(data, folder, **changes):
    settings = {
        "shards": str(data.root / "tars"), "val_shards": str(data.root / "val"),
        "model": str(data.model), "result_dir": str(folder), "max_length": 256,
        "batch_size": len(DOCUMENTS), "max_steps": 1, "optimizer": "sgd", "learning_rate": RATE,
        "warmup_steps": 0, "schedule": "constant", "weight_decay": 0.0, "clip": 0.0,
        "checkpoint_interval": 0, "device": "cpu", "proj_rank_total": 16, "proj_rank_min": 2,
        "proj_dtype": "float32",
    }  # fmt: skip
    return TrainConfig(**settings | changes)


def loss_of(model, tokenizer, parts):
    """Return the summed loss of the targets, and their number."""
    ids, mask = (torch.tensor(x) for x in tokens_of(tokenizer, parts))
    logits = model(input_ids=ids[None], use_cache=False).logits[0]
    losses = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    return losses[mask[1:]].sum(), int(mask[1:].sum())


@pytest.fixture(scope="module")
def reference(data):
    """Whole gradients of each document's summed loss in float64, by name of the parameter."""
    model = AutoModelForCausalLM.from_pretrained(data.model, dtype=torch.float64).train()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def gradients(documents):
        found = []
        for _, weight, parts in documents:
            loss, n = loss_of(model, data.tokenizer, parts)
            of_loss = torch.autograd.grad(loss, parameters)
            found.append((weight, n, loss.item(), dict(zip(names, of_loss, strict=True))))
        return found

    return SimpleNamespace(
        model=model, documents=gradients(DOCUMENTS), validation=gradients(VALIDATION)
    )


def relative(got, want):
    return (got.double() - want).norm() / want.norm()


def test_rows_and_step_are_those_of_the_masked_and_weighted_losses(data, reference, tmp_path):
    train(config_of(data, tmp_path, method="GradProjLora"))
    model = AutoModelForCausalLM.from_pretrained(data.model)
    engine = GradProjLoraEngine(model, proj_rank_total=16, proj_rank_min=2)
    with ProjectionStore(tmp_path / "projections") as store:
        ids = store.array("sample_id").tolist()
        assert sorted(ids) == list(range(len(DOCUMENTS)))
        rows, losses = store.rows(range(len(ids))), store.column("loss")
        assert set(store.column("status").tolist()) == {1}
    for row, loss, number in zip(rows, losses, ids, strict=True):
        weight, n, summed, gradient = reference.documents[number]
        parts = []
        for target in engine.targets:
            p_i, p_o = (p.double() for p in engine.projection_matrices[target.name])
            parts.append((p_o @ gradient[f"{target.name}.weight"] @ p_i.T).flatten())
        want = weight * torch.cat(parts) / n
        assert relative(torch.from_numpy(row), want) < 1e-5 if weight else not row.any()
        assert loss == pytest.approx(summed / n, rel=1e-5)
    total = sum(n for _, n, _, _ in reference.documents)
    trained = load_file(tmp_path / "model.safetensors")
    for name, before in reference.model.named_parameters():
        step = sum(w * g[name] for w, _, _, g in reference.documents) / total
        if name in trained:
            assert relative(before.detach() - trained[name].double(), RATE * step) < 1e-3


def test_inner_products_are_those_of_the_masked_and_weighted_losses(data, reference, tmp_path):
    train(config_of(data, tmp_path, method="GradDotProd"))
    group = zarr.open_group(tmp_path / "grad_dotprod", mode="r")
    n_val = sum(n for _, n, _, _ in reference.validation)
    total = sum(n for _, n, _, _ in reference.documents)
    ids = group["sample_id"][...].tolist()
    assert sorted(ids) == list(range(len(DOCUMENTS)))
    want = [
        sum(
            (weight * g / total * sum(other[name] for *_, other in reference.validation)).sum()
            for name, g in gradient.items()
        )
        / n_val
        for weight, _, _, gradient in (reference.documents[i] for i in ids)
    ]
    got = np.asarray(group["total"][...])
    np.testing.assert_allclose(got, torch.stack(want).numpy(), rtol=1e-4, atol=1e-9)


def test_packed_rows_keep_the_targets_of_every_document(data, tmp_path):
    unweighted = [number for number, (_, weight, _) in enumerate(DOCUMENTS) if weight == 1]
    make_corpus(tmp_path / "tars", [DOCUMENTS[number][0] for number in unweighted])
    config = config_of(
        data, tmp_path, shards=str(tmp_path / "tars"), pack=True, max_length=12, batch_size=1
    )
    index, flat, wanted = open_corpus(config.shards), [], []
    for document in shuffled_documents(index, config.seed, 0):
        _, _, parts = DOCUMENTS[unweighted[document.sample_id]]
        ids, mask = tokens_of(data.tokenizer, parts)
        mask[0] = all(mask[1:])  # it follows another document
        flat += [*zip(ids, mask, strict=True), (data.tokenizer.eos_token_id, mask[-1])]
    for start in range(0, len(flat) - 11, 12):
        ids, mask = zip(*flat[start : start + 12], strict=True)
        if any(mask[1:]):
            labels = [t if m else -100 for t, m in zip(ids[1:], mask[1:], strict=True)]
            wanted.append((list(ids), labels))
    first_epoch = itertools.takewhile(
        lambda batch: not batch.position.epoch, batches_of(config, index, data.tokenizer)
    )
    got = [(batch.input_ids[0].tolist(), batch.labels[0, 1:].tolist()) for batch in first_epoch]
    assert got == wanted


def test_packed_documents_of_one_token_are_kept_and_those_without_a_target_are_not(data, tmp_path):
    documents = [
        {"input_ids": [7]}, {"text": A}, {"input_ids": [8], "labels": [-100]},
        {"prompt": A, "completion": ""},
    ]  # fmt: skip
    make_corpus(tmp_path / "tars", documents)
    config = config_of(
        data, tmp_path, shards=str(tmp_path / "tars"), pack=True, max_length=3, batch_size=1
    )
    tokens = {0: [7], 1: tokens_of(data.tokenizer, [[A]])[0], 2: [], 3: []}
    index, flat = open_corpus(config.shards), []
    for document in shuffled_documents(index, config.seed, 0):
        if ids := tokens[document.sample_id]:
            flat += [*ids, data.tokenizer.eos_token_id]
    wanted = [flat[start : start + 3] for start in range(0, len(flat) - 2, 3)]
    batches = list(itertools.islice(batches_of(config, index, data.tokenizer), len(wanted)))
    assert [batch.input_ids[0].tolist() for batch in batches] == wanted
    assert all((batch.labels == batch.input_ids).all() for batch in batches)


@pytest.mark.parametrize(
    ("fields", "pack", "message"),
    [
        ({"prompt": A, "chosen": B, "rejected": C}, False, "document 0 .*no reference model"),
        ({"text": A, "weight": 2}, True, "document 0 .* has the weight 2, and --pack joins"),
        ({"messages": conversation(A)}, False, "no document has two tokens and a target"),
        ({"messages": 5}, False, r"the first problem: .*messages"),
    ],
)
def test_document_that_cannot_be_trained_on_is_refused_by_name(
    data, tmp_path, fields, pack, message
):
    make_corpus(tmp_path / "tars", [fields])
    config = config_of(data, tmp_path, shards=str(tmp_path / "tars"), pack=pack)
    with pytest.raises(CorpusError, match=message):
        next(batches_of(config, open_corpus(config.shards), data.tokenizer))
