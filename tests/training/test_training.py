"""The tokenizer and the training loop."""

import csv
import math

import numpy as np
import pytest
import torch
from helpers.corpora import make_corpus, mixed_documents
from helpers.models import make_model
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from gradproj.cli.tokenizer import tokenizer_command
from gradproj.cli.train import train_command
from gradproj.corpus.index import build_index
from gradproj.corpus.tar.paths import list_tars
from gradproj.errors import ConfigError, CorpusError, ModelError
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.loading import load_model
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.training import TokenizerConfig, TrainConfig, train, train_tokenizer
from gradproj.training.data import batches_of, shuffled_documents

N_DOCUMENTS = 90


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus in tars and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("training")
    make_corpus(folder / "tars", mixed_documents(N_DOCUMENTS))
    size = train_tokenizer(
        TokenizerConfig(shards=str(folder / "tars"), output_dir=str(folder / "tok"), vocab_size=400)
    )
    assert size == 400
    return folder


def config_of(made, result_dir, **changes):
    settings = dict(
        shards=str(made / "tars"),
        tokenizer=str(made / "tok"),
        result_dir=str(result_dir),
        n_layer=1,
        n_embd=16,
        n_head=2,
        max_length=24,
        batch_size=4,
        max_steps=6,
        warmup_steps=2,
        device="cpu",
    )
    return TrainConfig(**settings | changes)


def weights_in(folder):
    return GPT2LMHeadModel.from_pretrained(folder).state_dict()


def tokenizer_of(folder):
    return load_tokenizer(
        fetch(ModelConfig(architecture="GPT2-Small", init="random", tokenizer=str(folder)))
    )


def corpus_of(made):
    return build_index(list_tars(str(made / "tars")), progress=False)


@pytest.mark.parametrize(
    "text", ["plain words", "Ünïcödé \u2028 \x00 \U0001f600", "\n\t  def f():\r\n", ""]
)
def test_tokenizer_round_trips_any_text_and_adds_nothing(made, text):
    tokenizer = tokenizer_of(made / "tok")
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id not in ids


def test_tokenizer_of_a_corpus_without_text_is_rejected(tmp_path):
    make_corpus(tmp_path / "tars", [{"input_ids": [1, 2, 3]}, b"{torn"])
    with pytest.raises(CorpusError, match="none of the first 2 documents has a text"):
        train_tokenizer(
            TokenizerConfig(shards=str(tmp_path / "tars"), output_dir=str(tmp_path / "tok"))
        )


def test_each_epoch_has_every_document_once_in_its_own_order(made):
    index = corpus_of(made)
    orders = [
        [d.sample_id for d in shuffled_documents(index, seed, epoch)]
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    for order in orders:
        assert sorted(order) == list(range(N_DOCUMENTS))
    assert orders[0] == [d.sample_id for d in shuffled_documents(index, 0, 0)]
    assert len({tuple(order) for order in [*orders, range(N_DOCUMENTS)]}) == 4


@pytest.mark.parametrize("pack", [False, True])
def test_sequences_are_shuffled_documents_cut_or_packed(made, tmp_path, pack):
    config, index, tokenizer = (
        config_of(made, tmp_path, pack=pack),
        corpus_of(made),
        tokenizer_of(made / "tok"),
    )
    tokens = [tokenizer(d.text).input_ids for d in shuffled_documents(index, config.seed, 0)]
    if pack:
        stream = [t for ids in tokens for t in [*ids, tokenizer.eos_token_id]]
        want = [stream[i : i + 24] for i in range(0, len(stream) - 23, 24)]
    else:
        want = [ids[:24] for ids in tokens if len(ids) > 1]
    got = []
    for batch in batches_of(config, index, tokenizer):
        ends = (batch.labels != -100).sum(dim=1)
        got += [ids[:end].tolist() for ids, end in zip(batch.input_ids, ends, strict=True)]
        if len(got) >= len(want):
            break
    assert got[: len(want)] == want


def test_training_equals_a_plain_loop(made, tmp_path):
    """Compare with transformers' loss on one sequence at a time and a schedule written out."""
    config = config_of(
        made, tmp_path / "result", batch_size=1, max_steps=5, learning_rate=3e-3, clip=0.5
    )
    train(config)
    torch.manual_seed(config.seed)
    model = GPT2LMHeadModel(GPT2LMHeadModel.from_pretrained(tmp_path / "result").config).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0}]
    )
    rates = [1 / 3, 2 / 3] + [0.1 + 0.9 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    batches = batches_of(config, corpus_of(made), tokenizer_of(made / "tok"))
    for rate, batch in zip(rates, batches, strict=False):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * rate
        optimizer.zero_grad()
        model(input_ids=batch.input_ids, labels=batch.input_ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    got = weights_in(tmp_path / "result")
    for name, want in model.state_dict().items():
        # The bias of keys has a gradient of exactly 0: AdamW steps along its rounding error.
        torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-5)


def test_batch_loss_is_the_mean_over_real_targets(made, tmp_path):
    config = config_of(made, tmp_path / "result", batch_size=5, max_steps=1)
    result = train(config)
    torch.manual_seed(config.seed)
    model = GPT2LMHeadModel(GPT2LMHeadModel.from_pretrained(tmp_path / "result").config)
    batch = next(batches_of(config, corpus_of(made), tokenizer_of(made / "tok")))
    total, count = 0.0, 0
    for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
        alone = ids[labels != -100][None]
        total += model(input_ids=alone, labels=alone).loss.item() * (alone.shape[1] - 1)
        count += alone.shape[1] - 1
    assert result.loss == pytest.approx(total / count, rel=1e-5)


def test_equal_settings_give_equal_bits_and_another_seed_does_not(made, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        train(config_of(made, tmp_path / name, seed=seed, dropout=0.1))
    a, b, c = (weights_in(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_training_lowers_the_loss_and_the_job_loads_its_model(made, tmp_path, capsys):
    flags = [
        "--shards",
        made / "tars",
        "--tokenizer",
        made / "tok",
        "--result_dir",
        tmp_path / "result",
    ]
    shape = (
        "--n_layer 1 --n_embd 16 --n_head 2 --max_length 24 --batch_size 4 --max_steps 40 "
        "--learning_rate 0.01"
    )
    train_command([*map(str, flags), *shape.split(), "--device", "cpu"])
    with (tmp_path / "result" / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["loss"]) for row in rows]
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.5
    printed = capsys.readouterr()
    assert "step 40 of 40" in printed.err
    assert f"the checkpoint is in {tmp_path / 'result'}" in printed.out
    files = fetch(ModelConfig(model=str(tmp_path / "result")))
    model, tokenizer = load_model(files, torch.device("cpu")), load_tokenizer(files)
    assert tokenizer("the word").input_ids == tokenizer_of(made / "tok")("the word").input_ids
    assert model.config.n_positions == 24
    assert [path.name for path in (tmp_path / "result").glob(".*")] == [".lock"]


def test_training_continues_from_a_checkpoint(made, tmp_path):
    start = make_model(tmp_path / "start", "llama")
    config = TrainConfig(
        shards=str(made / "tars"),
        model=str(start),
        result_dir=str(tmp_path / "result"),
        max_length=16,
        batch_size=2,
        max_steps=1,
        learning_rate=1e-5,
        warmup_steps=0,
        device="cpu",
    )
    train(config)
    device = torch.device("cpu")
    before = load_model(fetch(ModelConfig(model=str(start))), device).state_dict()
    after = load_model(fetch(ModelConfig(model=config.result_dir)), device).state_dict()
    assert all((before[name] - after[name]).abs().max() < 2e-5 for name in before)
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_unknown_method_is_rejected_before_anything_is_written(made, tmp_path):
    message = "--method is 'Ghost'; choose one of Regular, GradDotProd, GradProjLora"
    with pytest.raises(ConfigError, match=message):
        train(config_of(made, tmp_path / "run", method="Ghost"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_steps": 0}, "--max_steps must be at least 1, got 0"),
        ({"max_length": 1}, "--max_length must be at least 2, got 1"),
        ({"n_embd": 30, "n_head": 4}, "--n_embd 30 is not a multiple of --n_head 4"),
        ({"learning_rate": 0.0}, "--learning_rate must be more than 0"),
        ({"weight_decay": -1.0}, "--weight_decay must be at least 0"),
        ({"dropout": 1.0}, "--dropout must be at least 0 and less than 1"),
        ({"tokenizer": ""}, "a new model has no tokenizer of its own: give --tokenizer DIR"),
        ({"model": "x", "architecture": "GPT2-Small"}, "give --model or --architecture, not both"),
        ({"optimizer": "lion"}, "--optimizer is 'lion'; choose one of adamw, sgd"),
        ({"momentum": 0.9}, "--momentum 0.9 is for --optimizer sgd; adamw has its own"),
        ({"device": "tpu"}, "--device is 'tpu'; choose one of auto, cpu, cuda"),
    ],
)
def test_invalid_training_flag_is_named(made, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(made, tmp_path, **changes)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--vocab_size", "100"], "--vocab_size must be at least 257"),
        (["--max_samples", "-1"], "--max_samples must be at least 0"),
        (["--vocab_sise", "300"], "did you mean --vocab_size"),
    ],
)
def test_invalid_tokenizer_flag_is_named(made, flags, message):
    with pytest.raises(ConfigError, match=message):
        tokenizer_command(["--shards", str(made / "tars"), "--output_dir", "x", *flags])


def test_impossible_result_dir_is_rejected_before_any_step(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--result_dir .*file: .*is a file; give another path"):
        train(config_of(made, tmp_path / "file"))
    with pytest.raises(ConfigError, match="is a file; give another path"):
        train(config_of(made, tmp_path / "file" / "below"))


def test_model_with_too_few_positions_is_rejected(made, tmp_path):
    model = make_model(tmp_path / "small", "llama")
    with pytest.raises(ModelError, match="--max_length 65 is more than the model's 64 positions"):
        train(config_of(made, tmp_path / "result", model=str(model), tokenizer="", max_length=65))


@pytest.mark.parametrize("pack", [False, True])
def test_corpus_without_targets_is_rejected(made, tmp_path, pack):
    make_corpus(tmp_path / "tars", [{"text": ""}, b"{torn"])
    config = config_of(made, tmp_path / "result", shards=str(tmp_path / "tars"), pack=pack)
    with pytest.raises(CorpusError, match=r"no document has two tokens.* problem: invalid JSON"):
        train(config)


def test_adapter_is_refused_before_the_first_step(made, tmp_path, capsys):
    peft = pytest.importorskip("peft", reason="the peft extra is not installed")
    base = make_model(tmp_path / "base")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    model = AutoModelForCausalLM.from_pretrained(base)
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter")
    config = config_of(made, tmp_path / "run", tokenizer="", model=str(tmp_path / "adapter"))
    with pytest.raises(ModelError, match=r"is a PEFT adapter, and gradproj train .*merge it first"):
        train(config)
    assert not list((tmp_path / "run").glob("*.csv"))
    assert not capsys.readouterr().out


def test_token_without_an_embedding_names_its_document(made, tmp_path, capsys):
    base = make_model(tmp_path / "base")
    with pytest.raises(CorpusError, match=r"--shards: document \d+ has the token id \d+"):
        train(config_of(made, tmp_path / "run", model=str(base)))
    assert "400 tokens, and the model's vocabulary only 300" in capsys.readouterr().err
