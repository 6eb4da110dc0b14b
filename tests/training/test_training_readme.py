"""The code in the README of ``gradproj/training`` does what the text says."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.models import ragged_batch, small_model
from helpers.training_runs import config_of, make_data
from transformers import TrainingArguments

from gradproj import ProjectionStore
from gradproj.training import METHODS, train

README = (Path(__file__).parents[2] / "gradproj" / "training" / "README.md").read_text()
BLOCKS = re.findall(r"```python.*?\n(.*?)```", README, re.S)


def code_with(word):
    """The one block of code with a word in it."""
    (block,) = [block for block in BLOCKS if word in block]
    return block


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, in which the README's code writes."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_ten_lines_for_a_loop_of_ones_own_and_the_lines_that_read_its_store(here):
    model = small_model("gpt2").train()
    batches = [
        (*ragged_batch([5, 9, 7], seed=i), [10 * i, 10 * i + 1, 10 * i + 2]) for i in range(4)
    ]
    names = {"model": model, "batches": batches, "optimizer": torch.optim.AdamW(model.parameters())}
    exec(code_with("for step, (ids, labels, sample_ids)"), names)
    exec(code_with('array("sample_id")'), names)
    assert names["ids"].tolist() == [10 * i + j for i in range(4) for j in range(3)]
    assert names["steps"].tolist() == np.repeat([1, 2, 3, 4], 3).tolist()
    assert names["first"].shape == (3, 8 * 256)
    assert np.isfinite(names["first"]).all()


def test_the_lines_for_a_trainer(here):
    ids, labels = ragged_batch([5, 9, 7, 6])
    dataset = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    arguments = TrainingArguments(
        output_dir=str(here / "trainer"), max_steps=2, per_device_train_batch_size=2, use_cpu=True, report_to=[],
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    exec(
        code_with("Trainer("),
        {"model": small_model("gpt2"), "dataset": dataset, "arguments": arguments},
    )
    with ProjectionStore(here / "watched" / "projections") as store:
        assert store.array("step").tolist() == [1, 1, 2, 2]


def test_a_third_method_by_one_entry_runs_in_the_loop(here, monkeypatch):
    known = dict(METHODS)
    try:
        exec(code_with('METHODS["Hardest"]'), {})
        data = make_data(here / "data")
        train(config_of(data, here / "run", method="Hardest", max_steps=3))
    finally:
        METHODS.clear()
        METHODS.update(known)
    lines = (here / "run" / "hardest.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["1", "2", "3"]
