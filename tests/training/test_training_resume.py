"""Resuming: position in the data, checkpoints, ranks, and rejected settings."""

import itertools
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zarr
from helpers.training_runs import config_of, index_of, make_data, tokenizer_of
from safetensors.torch import load_file

from gradproj.corpus.index_file import open_corpus, save_index
from gradproj.distributed import World
from gradproj.errors import ConfigError, CorpusError, ModelError, StoreError
from gradproj.training import loop, train
from gradproj.training.checkpoints import Checkpoints, random_state, restore_random_state
from gradproj.training.data import DataPosition, TrainedDocuments, batches_of, shuffled_documents
from gradproj.training.data_parallel import world_of
from gradproj.training.optimizer import rate_at
from gradproj.training.validation import Validation


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))


def same_batch(a, b):
    return torch.equal(a.input_ids, b.input_ids) and a.sample_ids.tolist() == b.sample_ids.tolist()


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_stream_continues_from_any_position(data, tmp_path, pack, world_size):
    config, index, tokenizer = (
        config_of(data, tmp_path, pack=pack),
        index_of(data),
        tokenizer_of(data),
    )
    world = World(world_size - 1, world_size)
    whole = list(itertools.islice(batches_of(config, index, tokenizer, world), 140))
    assert whole[-1].position.epoch > 0
    for stop in (0, 1, 17, 40):
        position = DataPosition.from_dict(whole[stop].position.as_dict())
        again = batches_of(config, index, tokenizer, world, position)
        assert all(same_batch(a, b) for a, b in zip(whole[stop + 1 :], again, strict=False))


def test_ranks_divide_an_epochs_documents(data, tmp_path):
    config, index, tokenizer = (
        config_of(data, tmp_path, batch_size=1),
        index_of(data),
        tokenizer_of(data),
    )
    seen = []
    for rank in range(3):
        for batch in batches_of(config, index, tokenizer, World(rank, 3)):
            if batch.position.epoch > 0:
                break
            seen += batch.sample_ids.tolist()
    alone = itertools.takewhile(
        lambda b: b.position.epoch == 0, batches_of(config, index, tokenizer)
    )
    assert sorted(seen) == sorted(i for batch in alone for i in batch.sample_ids.tolist())
    assert len(seen) == len(set(seen)) > 60


def test_index_beside_the_tars_is_used_and_must_match(data, tmp_path):
    tars = shutil.copytree(data / "tars", tmp_path / "tars")
    made = save_index(open_corpus(str(tars)), tars / "corpus.json")
    assert open_corpus(str(tars)) == open_corpus(str(tars / "corpus.json")) == made
    sorted(tars.glob("*.tar"))[-1].unlink()
    with pytest.raises(CorpusError, match="1 tars, the index has 2"):
        open_corpus(str(tars))


def test_skipped_documents_are_the_first_of_the_order(data):
    index = index_of(data)
    order = [d.sample_id for d in shuffled_documents(index, 5, 2)]
    for first in (0, 1, 30, 69, 70, 100):
        assert [d.sample_id for d in shuffled_documents(index, 5, 2, first)] == order[first:]


def test_labels_are_the_tokens_and_ignored_at_padding(data, tmp_path):
    batch = next(
        batches_of(config_of(data, tmp_path, batch_size=8), index_of(data), tokenizer_of(data))
    )
    tokens = tokenizer_of(data)
    texts = {d.sample_id: d.text for d in shuffled_documents(index_of(data), 0, 0)}
    for ids, labels, sample_id in zip(
        batch.input_ids, batch.labels, batch.sample_ids.tolist(), strict=True
    ):
        want = tokens(texts[sample_id]).input_ids[:16]
        assert labels[: len(want)].tolist() == ids[: len(want)].tolist() == want
        assert set(labels[len(want) :].tolist()) <= {-100}
    assert batch.n_targets == int((batch.labels[:, 1:] != -100).sum())


class Killed(Exception):
    """Raised in place of a kill."""


def train_until_killed(monkeypatch, last, config):
    """Train to the beginning of a step, then raise ``Killed`` in it."""
    real = loop._Run.step

    def step_or_die(self, step):
        if step == last:
            raise Killed
        real(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(loop._Run, "step", step_or_die)
        with pytest.raises(Killed):
            train(config)


@pytest.mark.parametrize(
    "changes",
    [{"dropout": 0.2}, {"pack": True, "grad_accumulation": 2}, {"model_dtype": "bfloat16"}],
    ids=["dropout", "pack", "bfloat16"],
)
def test_resumed_run_ends_in_equal_bits(data, tmp_path, monkeypatch, changes):
    changes = {"max_steps": 9, "checkpoint_interval": 3, **changes}
    train(config_of(data, tmp_path / "whole", **changes))
    train_until_killed(monkeypatch, 8, config_of(data, tmp_path / "killed", **changes))
    result = train(config_of(data, tmp_path / "killed", resume=True, **changes))
    curves = [
        [line.rsplit(",", 1)[0] for line in (tmp_path / name / "loss.csv").read_text().splitlines()]
        for name in ("whole", "killed")
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 10
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert result.n_tokens == int(curves[0][-1].split(",")[1])
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").iterdir()] == [
        "step-00000009"
    ]


def test_dot_products_of_a_resumed_run_equal_an_uninterrupted_one(data, tmp_path, monkeypatch):
    changes = {"method": "GradDotProd", "val_shards": str(data / "val"), "checkpoint_interval": 3}
    train(config_of(data, tmp_path / "whole", **changes))
    train_until_killed(monkeypatch, 5, config_of(data, tmp_path / "killed", **changes))
    train(config_of(data, tmp_path / "killed", resume=True, **changes))
    a, b = (
        zarr.open_group(tmp_path / name / "grad_dotprod", mode="r") for name in ("whole", "killed")
    )
    for name in ("step", "sample_id", "total"):
        np.testing.assert_array_equal(a[name][...], b[name][...])
    values = [(tmp_path / name / "values.md").read_text() for name in ("whole", "killed")]
    assert values[0] == values[1]


def test_resuming_a_finished_run_changes_nothing(data, tmp_path):
    changes = {"checkpoint_interval": 3, "method": "GradProjLora"}
    first = train(config_of(data, tmp_path, **changes))
    before = (tmp_path / "loss.csv").read_bytes(), (tmp_path / "model.safetensors").read_bytes()
    assert train(config_of(data, tmp_path, resume=True, **changes)).loss == first.loss
    assert before == (
        (tmp_path / "loss.csv").read_bytes(),
        (tmp_path / "model.safetensors").read_bytes(),
    )


def test_resume_with_other_settings_is_rejected(data, tmp_path):
    train(config_of(data, tmp_path, checkpoint_interval=3))
    with pytest.raises(
        StoreError, match=r"checkpoint .step-00000006.: continue from it with --resume"
    ):
        train(config_of(data, tmp_path))
    other = config_of(data, tmp_path, resume=True, seed=3, learning_rate=0.5)
    with pytest.raises(ConfigError) as error:
        train(other)
    lines = str(error.value).splitlines()
    assert "  --seed: checkpoint 0, this run 3" in lines
    assert "  --learning_rate: checkpoint 0.01, this run 0.5" in lines
    assert len(lines) == 4
    same = config_of(data, tmp_path, resume=True)
    with pytest.raises(ConfigError, match="  ranks: checkpoint 1, this run 2"):
        Checkpoints(tmp_path, same, World(0, 2), {}).load(
            tmp_path / "checkpoints" / "step-00000006"
        )


def test_unfinished_checkpoint_is_ignored(data, tmp_path):
    train(config_of(data, tmp_path, checkpoint_interval=3))
    (tmp_path / "checkpoints" / ".saving-step-00000009").mkdir()
    newest = Checkpoints(tmp_path, config_of(data, tmp_path, resume=True), World(), {}).newest()
    assert newest == tmp_path / "checkpoints" / "step-00000006"


def test_random_state_is_restored():
    state = random_state()
    first = torch.rand(3)
    restore_random_state(state)
    assert torch.equal(first, torch.rand(3))


@pytest.mark.parametrize(
    ("schedule", "want"),
    [
        ("cosine", [1 / 3, 2 / 3, 1.0, 0.1 + 0.9 * (1 + np.cos(np.pi / 2)) / 2]),
        ("linear", [1 / 3, 2 / 3, 1.0, 0.5]),
        ("constant", [1 / 3, 2 / 3, 1.0, 1.0]),
    ],
)
def test_learning_rate_follows_warmup_and_schedule(data, tmp_path, schedule, want):
    config = config_of(data, tmp_path, schedule=schedule)
    assert [rate_at(step, config) for step in (0, 1, 2, 4)] == pytest.approx(want)


def test_validation_loss_is_the_mean_over_targets_and_changes_nothing(data, tmp_path):
    config = config_of(
        data, tmp_path, val_shards=str(data / "val"), val_batch_size=3, val_batches=2
    )
    _, model = loop.load_or_make_model(config)
    model.train()
    validation = Validation(config, tokenizer_of(data), torch.device("cpu"), World())
    assert [len(batch.sample_ids) for batch in validation.batches] == [3, 3]
    state = random_state()["cpu"]
    got = validation.loss(model)
    assert model.training
    assert torch.equal(state, random_state()["cpu"])
    total = count = 0
    for batch in validation.batches:
        for ids, labels in zip(batch.input_ids, batch.labels, strict=True):
            alone = ids[labels != -100][None]
            total += model.eval()(input_ids=alone, labels=alone).loss.item() * (alone.shape[1] - 1)
            count += alone.shape[1] - 1
    assert got == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize(
    "info",
    [
        {"rank": 0, "world_size": 1},
        {"ddp_rank": 0, "ddp_world_size": 1},
        SimpleNamespace(rank=0, world_size=1),
    ],
)
def test_ranks_come_from_any_form_of_ddp_info(info):
    assert world_of(info) == world_of(None) == World(0, 1)


@pytest.mark.parametrize(
    ("info", "message"),
    [
        ({"ddp": True}, "give None, or rank and world_size"),
        ({"rank": 1, "world_size": 2}, "names 2 ranks, but torch.distributed is not initialised"),
    ],
)
def test_ranks_without_a_process_group_are_rejected(info, message):
    with pytest.raises(ConfigError, match=message):
        world_of(info)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"learning_rate": 1e30},
            ModelError,
            "the gradient of step . is not finite: give a smaller --learning_rate",
        ),
        ({"method": "GradDotProd"}, ConfigError, "--method GradDotProd .*give --val_shards"),
        ({"eval_interval": 2}, ConfigError, "--eval_interval 2 needs --val_shards"),
        ({"val_shards": "nowhere"}, CorpusError, "nowhere"),
        (
            {"schedule": "steps"},
            ConfigError,
            "--schedule is 'steps'; choose one of cosine, linear, constant",
        ),
        (
            {"model_dtype": "fp8"},
            ConfigError,
            "--model_dtype is 'fp8'; choose one of float32, bfloat16",
        ),
        ({"grad_accumulation": 0}, ConfigError, "--grad_accumulation must be at least 1"),
        ({"checkpoint_interval": -1}, ConfigError, "--checkpoint_interval must be at least 0"),
    ],
)
def test_unusable_training_input_is_named(data, tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        train(config_of(data, tmp_path, **changes))


def test_domain_and_text_are_found_for_documents_of_another_process(data):
    documents = TrainedDocuments(index_of(data))
    assert documents.domain(4) == "ArXiv"
    assert len(documents.text(4)) > 2
