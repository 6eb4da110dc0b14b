"""Windows and batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from gradproj.engine.batching import BatchConfig, collate, plan_batches, split_long
from gradproj.engine.targets import Targets
from gradproj.errors import ConfigError

LENGTHS = np.random.default_rng(0).integers(2, 100, 137).tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 15, 16, 50])
def test_windows_make_every_token_but_the_first_a_target_once(n):
    tokens = np.arange(100, 100 + n)
    windows = split_long(tokens, 8, "windows")
    assert [t for w in windows for t in w[1:]] == tokens[1:].tolist()
    assert all(2 <= len(w) <= 8 for w in windows)
    assert all(a[-1] == b[0] for a, b in pairwise(windows))


@pytest.mark.parametrize("n", [0, 1, 2, 8, 50])
def test_truncation_keeps_the_beginning(n):
    parts = split_long(np.arange(n), 8, "truncate")
    assert [p.tolist() for p in parts] == ([list(range(min(n, 8)))] if n > 1 else [])


@pytest.mark.parametrize(
    ("size", "tokens"), [(1, 1000), (8, 300), (1000, 99), (1000, 1), (5, 10**9)]
)
def test_batches_hold_every_sequence_once_within_both_budgets_longest_first(size, tokens):
    batches = plan_batches(LENGTHS, size, tokens)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(LENGTHS)))
    widths = [max(LENGTHS[i] for i in batch) for batch in batches]
    assert widths == sorted(widths, reverse=True)
    for batch, width in zip(batches, widths, strict=True):
        assert len(batch) <= size
        assert len(batch) == 1 or len(batch) * width <= tokens


def real_share(lengths, batch):
    return sum(lengths[i] for i in batch) / (len(batch) * max(lengths[i] for i in batch))


@pytest.mark.parametrize("few", [0, 1000])
def test_batch_takes_sequences_until_one_does_not_fit(few, monkeypatch):
    monkeypatch.setattr("gradproj.engine.batching.FEW_TOKENS", few)
    batches = plan_batches(LENGTHS, 1000, 2000)
    for batch, following in pairwise(batches):
        larger = [*batch, following[0]]
        tokens = len(larger) * LENGTHS[batch[0]]
        assert tokens > 2000 or (real_share(LENGTHS, larger) < 0.95 and tokens > few)


@pytest.mark.parametrize("n", [300, 4096])
@pytest.mark.parametrize("budget", [2048, 8192, 65536])
@pytest.mark.parametrize("kind", ["uniform", "log-uniform", "log-normal"])
def test_at_least_95_percent_of_the_computed_tokens_are_real(kind, budget, n):
    generator = np.random.default_rng(0)
    drawn = {
        "uniform": generator.uniform(1, 2000, n),
        "log-uniform": np.exp(generator.uniform(0, np.log(2000), n)),
        "log-normal": generator.lognormal(5.5, 1.2, n),
    }
    lengths = [
        int(x) for x in drawn[kind].clip(1, 2000) if x >= 2
    ]  # of one token there is nothing to compute
    batches = plan_batches(lengths, 256, budget)
    computed = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert sum(lengths) / computed >= 0.95


def test_no_sequences_make_no_batch():
    assert plan_batches([], 8, 100) == []


def test_batch_targets_equal_those_of_its_labels():
    sequences = [np.arange(10, 15), np.arange(20, 22), np.arange(30, 33)]
    batch = collate(sequences, np.array([2, 0, 1]), pad=7)
    assert batch.input_ids.tolist() == [[30, 31, 32, 7, 7], [10, 11, 12, 13, 14], [20, 21, 7, 7, 7]]
    labels = torch.where(batch.input_ids == 7, -100, batch.input_ids)
    want = Targets.from_labels(labels)
    assert torch.equal(batch.positions, want.positions)
    assert torch.equal(batch.targets, want.tokens)
    assert batch.token_mask.sum(dim=1).tolist() == [2, 4, 1]
    assert batch.n_tokens == 10


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_tokens", -1)])
def test_zero_budget_is_rejected(name, value):
    with pytest.raises(ConfigError, match=f"--{name} must be at least 1.*, got {value}"):
        BatchConfig(**{name: value})
