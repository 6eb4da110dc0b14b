"""Splits a unit's documents into token batches under a budget, sorted by length.

Batches are formed within a unit and depend only on the unit and the batch settings, so the rows
have the same bits for any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from gradproj.flags import Flags, flag
from gradproj.kernels.device_copy import to_device
from gradproj.model.properties import sees_padding
from gradproj.model.sequences import TokenSequence

LONG_DOCUMENTS = ("truncate", "windows")

AUTO = 0
"""``--batch_tokens auto``: measured once, before the first unit."""

FEW_TOKENS = 256
"""Smaller batches may have more padding: starting a batch costs more than their tokens."""


@dataclass(frozen=True, kw_only=True)
class BatchConfig(Flags, title="batches"):
    """Length and batch settings. ``max_length`` and ``long_documents`` are part of the identity."""

    batch_size: int = flag("Largest number of sequences in a batch.", 256, minimum=1)
    batch_tokens: int = flag(
        "Largest number of tokens in a batch, padding included; auto measures the fastest number "
        "on the device, once, at the start.",
        8192,
        minimum=1,
        words={"auto": AUTO},
    )
    max_padding: float = flag(
        "Largest fraction of a batch's tokens that may be padding (batches of 256 tokens may have "
        "more); 0 = sequences of one length in a batch, which is chosen by itself for a model "
        "whose output depends on padding.",
        0.05,
        minimum=0,
        below=1,
    )
    max_length: int = flag(
        "Longest sequence, in tokens; 0 = the smaller of 1024 and the model's positions.",
        0,
        minimum=2,
        why="a token and its target; leave it out for the model's own",
    )
    long_documents: str = flag(
        "A document longer than --max_length: take its beginning only (truncate), or sum the "
        "gradients of consecutive windows (windows).",
        "truncate",
        choices=LONG_DOCUMENTS,
    )
    loss_reduction: str = flag(
        "A row is the gradient of this reduction of the loss over a document's target tokens.",
        "sum",
        choices=("mean", "sum"),
    )


@dataclass(frozen=True)
class Batch:
    """One forward and backward pass. Padding is on the right; a causal model needs no mask."""

    input_ids: Tensor
    """``(N, S)`` int64."""
    positions: Tensor
    """``(T,)`` int64 flat positions in ``(N * S)`` that predict a target."""
    targets: Tensor
    """``(T,)`` int64 target tokens at these positions."""
    token_mask: Tensor
    """``(N, S)`` bool: the positions that predict a target."""
    sequences: np.ndarray
    """``(N,)`` int64 positions in the unit's list of sequences."""
    n_tokens: int
    """Real tokens, without padding."""
    factors: Tensor | None = None
    """``(N,)`` float32: what the sequences' rows are multiplied by; None if all are 1."""

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on ``device``, copied without waiting."""
        moved = {k: to_device(x, device) for k, x in vars(self).items() if isinstance(x, Tensor)}
        return Batch(**vars(self) | moved)


def fit_padding(model: nn.Module, batch: BatchConfig, longest: int | None = None) -> BatchConfig:
    """Return the settings for a model: without padding if its output depends on it.

    ``longest`` is the length of the longest sequence, if it is known to be below ``max_length``.
    """
    pads = batch.max_padding > 0 and batch.batch_size > 1
    if pads and sees_padding(model, longest or batch.max_length):
        return replace(batch, max_padding=0.0)
    return batch


def plan_batches(
    lengths: Sequence[int] | np.ndarray,
    batch_size: int,
    batch_tokens: int,
    max_padding: float = BatchConfig.max_padding,
) -> list[np.ndarray]:
    """Group sequences into batches: longest first, within both budgets and with little padding.

    With the longest first, a batch that is too large for the device shows at once. A sequence
    longer than ``batch_tokens`` is a batch of its own. A batch ends before a sequence that would
    bring its padding above ``max_padding``, a fraction of its tokens, unless it has at most
    ``FEW_TOKENS``; with 0 it has none.

    Returns:
        Arrays of positions in ``lengths``; every position once.
    """
    order = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable")
    sizes = np.asarray(lengths, dtype=np.int64)[order]
    batches, start = [], 0
    while start < len(order):
        width = sizes[start]
        chosen = sizes[start : start + max(1, min(batch_size, batch_tokens // width))]
        computed = width * np.arange(1, len(chosen) + 1)
        fits = chosen.cumsum() >= (1 - max_padding) * computed
        if max_padding:
            fits |= computed <= FEW_TOKENS
        count = len(chosen) if fits.all() else int(np.argmin(fits))
        batches.append(order[start : start + count])
        start += count
    return batches


def longest_of_owners(sequences: Sequence[TokenSequence]) -> np.ndarray:
    """Return for each sequence the length of its owner's longest, ``(n,)`` int64.

    Batches of these lengths keep the two answers of a preference together, so that hardly any
    document waits with the sum of one.
    """
    owners = np.array([sequence.owner for sequence in sequences], dtype=np.int64)
    lengths = np.array([len(sequence) for sequence in sequences], dtype=np.int64)
    longest = np.zeros(owners.max(initial=-1) + 1, dtype=np.int64)
    np.maximum.at(longest, owners, lengths)
    return longest[owners]


def collate(sequences: Sequence[TokenSequence], chosen: np.ndarray, pad: int = 0) -> Batch:
    """Pad the chosen sequences into one batch on the host.

    ``chosen`` are positions in ``sequences``, ``(N,)``. ``pad`` is a valid token id; its value does
    not change any row.
    """
    parts = [sequences[i] for i in chosen]
    width = max(map(len, parts))
    ids = np.full((len(parts), width), pad, dtype=np.int64)
    mask = np.zeros((len(parts), width), dtype=bool)
    for n, part in enumerate(parts):
        ids[n, : len(part)] = part.ids
        mask[n, : len(part) - 1] = part.is_target[1:]
    positions = np.flatnonzero(mask)
    # The target of a position is the next token of its sequence, the next element of the row.
    targets = ids.reshape(-1)[positions + 1]
    factors = np.array([part.factor for part in parts], dtype=np.float32)
    return Batch(
        torch.from_numpy(ids), torch.from_numpy(positions), torch.from_numpy(targets),
        torch.from_numpy(mask), np.asarray(chosen, dtype=np.int64), sum(map(len, parts)),
        None if (factors == 1).all() else torch.from_numpy(factors),
    )  # fmt: skip
