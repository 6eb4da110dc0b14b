"""Sums of two scores' z-scores over all documents, in bounded memory."""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from gradproj.analysis.score_blocks import Columns
from gradproj.distributed import World

_ROUNDING = 1e-12
"""Deviation of equal scores, relative to their mean."""
Blocks = Iterator[tuple[int, np.ndarray]]
"""Consecutive samples: the first one's id, and their scores ``(Q, n)`` float32."""


def sums_of_z_scores(one: Blocks, other: Blocks, world: World, file: IO[bytes]) -> Blocks:
    """Yield the sums of the z-scores of two scores, in the blocks of ``one``.

    Args:
        one: blocks of one score, in order of the samples.
        other: blocks of the other score for the same samples, of any sizes.
        world: the ranks that share the samples: mean and deviation are over those of all.
        file: an empty file. It holds the scores until mean and deviation are known, 8 bytes for
            each query and sample.

    A document that lacks a score for any query has NaN for all and is in no mean. A score that is
    the same for all documents adds 0.
    """
    columns, spans, moments = Columns(other), [], _Moments()
    for first, values in one:
        both = np.stack([values, columns.take(first, values.shape[1])]).astype(np.float32)
        absent = ~np.isfinite(both).all(axis=(0, 1))
        both[:, :, absent] = np.nan
        moments = moments.joined(_Moments.of(both[:, :, ~absent]))
        file.write(both.tobytes())
        spans.append((first, both.shape))
    whole = functools.reduce(_Moments.joined, world.gather(moments))
    file.seek(0)
    for first, shape in spans:
        scores = np.frombuffer(file.read(4 * math.prod(shape)), np.float32).reshape(shape)
        yield first, whole.z_scores(scores).sum(axis=0).astype(np.float32)


@dataclass(frozen=True)
class _Moments:
    """Number, mean and sum of squared deviations of values, for ``(2, Q)`` scores in float64."""

    n: int = 0
    mean: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    @classmethod
    def of(cls, values: np.ndarray) -> "_Moments":
        """Return the moments of ``(2, Q, n)`` values."""
        if not values.shape[2]:
            return cls()
        mean = values.mean(axis=2, dtype=np.float64)
        return cls(values.shape[2], mean, np.square(values - mean[..., None]).sum(axis=2))

    def joined(self, other: "_Moments") -> "_Moments":
        """Return the moments of both sets of values (Chan, Golub and LeVeque 1979)."""
        n = self.n + other.n
        if not n:
            return self
        shift, share = np.subtract(other.mean, self.mean), other.n / n
        squares = self.squares + other.squares + np.square(shift) * self.n * share
        return _Moments(n, self.mean + shift * share, squares)

    def z_scores(self, values: np.ndarray) -> np.ndarray:
        deviation = np.sqrt(np.asarray(self.squares) / max(self.n, 1))
        varies = deviation > _ROUNDING * np.abs(self.mean)
        factor = np.divide(1.0, deviation, out=np.zeros_like(deviation), where=varies)
        return (values - np.asarray(self.mean)[..., None]) * factor[..., None]
