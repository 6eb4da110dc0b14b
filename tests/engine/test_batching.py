"""Windows and batches."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from gradproj.engine.batching import BatchConfig, collate, longest_of_owners, plan_batches
from gradproj.engine.targets import Targets
from gradproj.errors import ConfigError
from gradproj.model.sequences import TokenSequence, join_windows, split_long

LENGTHS = np.random.default_rng(0).integers(2, 100, 137).tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 8, 9, 15, 16, 50])
def test_windows_make_every_token_but_the_first_a_target_once(n):
    whole = TokenSequence.of(np.arange(100, 100 + n), factor=-2.0, owner=3)
    windows = split_long(whole, 8, "windows")
    assert [t for w in windows for t in w.ids[w.is_target]] == whole.ids[1:].tolist()
    assert all(2 <= len(w) <= 8 for w in windows)
    assert all(a.ids[-1] == b.ids[0] for a, b in pairwise(windows))
    assert all((w.factor, w.owner, w.is_target[0]) == (-2.0, 3, False) for w in windows)
    if windows:
        joined = join_windows(windows)
        assert (joined.ids.tolist(), joined.n_targets) == (whole.ids.tolist(), n - 1)


def test_windows_without_a_target_are_left_out_and_every_target_stays_one():
    is_target = np.random.default_rng(0).random(400) < 0.05
    is_target[0] = False
    windows = split_long(TokenSequence(np.arange(400), is_target), 8, "windows")
    assert 1 < len(windows) < 57
    assert all(w.n_targets for w in windows)
    got = [t for w in windows for t in w.ids[w.is_target]]
    assert got == np.flatnonzero(is_target).tolist()


@pytest.mark.parametrize("n", [0, 1, 2, 8, 50])
@pytest.mark.parametrize("side", ["right", "left"])
def test_truncation_cuts_one_side(n, side):
    parts = split_long(TokenSequence.of(np.arange(n)), 8, "truncate", side)
    kept = np.arange(n)[:8] if side == "right" else np.arange(n)[-8:]
    assert [p.ids.tolist() for p in parts] == ([kept.tolist()] if n > 1 else [])
    assert all(p.ids[p.is_target].tolist() == kept[1:].tolist() for p in parts)
    # A first token that is the BOS stays.
    parts = split_long(TokenSequence.of(np.arange(n)), 8, "truncate", side, bos=0)
    kept = np.r_[0, np.arange(n)[1:][-7:]] if side == "left" and n else kept
    assert [p.ids.tolist() for p in parts] == ([kept.tolist()] if n > 1 else [])
    assert all(p.ids[p.is_target].tolist() == kept[1:].tolist() for p in parts)
    # All targets are cut.
    late = TokenSequence(np.arange(50), np.arange(50) == (49 if side == "right" else 1))
    assert split_long(late, 8, "truncate", side) == []


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
    sequences = [TokenSequence.of(np.arange(n, m)) for n, m in [(10, 15), (20, 22), (30, 33)]]
    batch = collate(sequences, np.array([2, 0, 1]), pad=7)
    assert batch.factors is None
    assert batch.input_ids.tolist() == [[30, 31, 32, 7, 7], [10, 11, 12, 13, 14], [20, 21, 7, 7, 7]]
    labels = torch.where(batch.input_ids == 7, -100, batch.input_ids)
    want = Targets.from_labels(labels)
    assert torch.equal(batch.positions, want.positions)
    assert torch.equal(batch.targets, want.tokens)
    assert batch.token_mask.sum(dim=1).tolist() == [2, 4, 1]
    assert batch.n_tokens == 10


def test_targets_of_a_batch_are_those_of_its_masks():
    masks = [np.array([0, 0, 1, 0, 1], bool), np.array([0, 1], bool), np.array([0, 0, 0], bool)]
    sequences = [TokenSequence(np.arange(10, 10 + len(m)), m, f) for f, m in enumerate(masks)]
    batch = collate(sequences, np.arange(3))
    ids, labels = batch.input_ids, torch.full((3, 5), -100)
    for n, mask in enumerate(masks):
        labels[n, : len(mask)] = ids[n, : len(mask)].where(torch.from_numpy(mask), -100)
    want = Targets.from_labels(labels)
    assert torch.equal(batch.positions, want.positions)
    assert torch.equal(batch.targets, want.tokens)
    assert batch.token_mask.sum(dim=1).tolist() == [2, 1, 0]
    assert batch.factors.tolist() == [0, 1, 2]


@pytest.mark.parametrize(("name", "value"), [("batch_size", 0), ("batch_tokens", -1)])
def test_zero_budget_is_rejected(name, value):
    with pytest.raises(ConfigError, match=f"--{name} must be at least 1.*, got {value}"):
        BatchConfig(**{name: value})


def test_answers_of_a_preference_run_in_one_batch_or_the_next():
    random = np.random.default_rng(0)
    sequences = [
        TokenSequence.of(np.arange(random.integers(2, 200)), owner=owner)
        for owner in range(300)
        for _ in range(1 + owner % 2)
    ]
    batches = plan_batches(longest_of_owners(sequences), 32, 1000, 0.05)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(sequences)))
    left = {n: 1 + n % 2 for n in range(300)}
    for batch in batches:
        assert max(len(sequences[i]) for i in batch) * len(batch) <= 1000
        for i in batch:
            left[sequences[i].owner] -= 1
        assert sum(0 < n < 1 + owner % 2 for owner, n in left.items()) <= 1
