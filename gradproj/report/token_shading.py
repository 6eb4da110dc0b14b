"""Shaded texts: the tokens that a score comes from, and a strip of the layers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from markupsafe import Markup, escape

from gradproj.formatting import clean_piece
from gradproj.model.token_texts import TokenText
from gradproj.query.token_scores import TokenScores
from gradproj.report.number_format import exponent_of, minus, places_for, scaled

COLOURS = {
    "p1": "#eaf2fa", "p2": "#d6e6f5", "p3": "#c2daf0", "p4": "#adcdea", "p5": "#9bc2e5",
    "p6": "#8fb8e0", "n1": "#fdf3e6", "n2": "#fae6cc", "n3": "#f7d9b1", "n4": "#f4cb97",
    "n5": "#f2bd7e", "n6": "#f0b068",
}  # fmt: skip
"""Shade -> background: blue of parts that add to a score, orange of those that take from it."""
_LEVELS = len(COLOURS) // 2
_CHARACTERS = 240
"""Of a shaded excerpt, about."""
_PIECE_CHARACTERS = 80
_MOST_CELLS = 48
"""Of a strip; of more layers, those of a block share a cell."""


class Scale:
    """Formats parts of scores in the unit of a table, with a decimal more than the scores have."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.exponent = exponent_of(scores)
        self._places = places_for(scores, self.exponent) + 1

    def __call__(self, value: float) -> str:
        return minus(scaled(value, self.exponent, self._places))


@dataclass(frozen=True)
class Shaded:
    """A piece of text or a cell of a strip, with its number in the unit of the table."""

    text: Markup
    """Cleaned and escaped."""
    value: str
    shade: str
    """A key of ``COLOURS``; empty for a number that is small beside the largest."""


@dataclass(frozen=True)
class Shading:
    """An excerpt by token, and the layers in model order."""

    pieces: list[Shaded]
    layers: list[Shaded]
    total: str
    """The recomputed score, formatted."""


def shading_of(scores: TokenScores, query: int, scale: Scale, sample_id: int) -> Shading | None:
    """Return the excerpt of a document in which most of its score for a query comes about.

    None if it was not split.
    """
    found = scores.found.get((query, sample_id))
    if found is None:
        return None
    names, values = _blocks(scores.layers, found.layers)
    if scores.has_head:
        names, values = [*names, "head rows"], np.append(values, found.head)
    return Shading(
        _excerpt(scores.documents[sample_id], found.parts, scale),
        [
            Shaded(escape(clean_piece(name)), scale(value), shade)
            for name, value, shade in zip(names, values.tolist(), _shades(values), strict=True)
        ],
        scale(found.score),
    )


def query_shading(
    scores: TokenScores, query: int, sample_ids: Sequence[int], scale: Scale
) -> list[Shaded]:
    """Return the query's text by the mean of its tokens' parts of some documents' scores."""
    found = [scores.found.get((query, i)) for i in sample_ids]
    known = [x.query_parts for x in found if x is not None and x.query_parts is not None]
    if not known:
        return []
    return _excerpt(scores.queries[query], np.mean(known, axis=0), scale)


def _excerpt(tokens: Sequence[TokenText], parts: np.ndarray, scale: Scale) -> list[Shaded]:
    pieces = [clean_piece(token.piece[:_PIECE_CHARACTERS]) for token in tokens]
    first, last = _densest(np.array(list(map(len, pieces))), np.abs(parts))
    shades = _shades(parts)
    shown = [
        Shaded(escape(pieces[n]), scale(float(parts[n])), shades[n])
        for n in range(first, last)
        if pieces[n]
    ]
    before, after = ([Shaded(Markup(" … "), "", "")] * cut for cut in (first, len(tokens) - last))
    return [*before[:1], *shown, *after[:1]]


def _densest(lengths: np.ndarray, sizes: np.ndarray) -> tuple[int, int]:
    """Return the tokens ``[first, last)`` of about ``_CHARACTERS`` that have the largest sum."""
    ends = np.cumsum(lengths)
    starts = ends - lengths
    lasts = np.searchsorted(ends, starts + _CHARACTERS, side="right")
    lasts = np.maximum(lasts, np.arange(len(lengths)) + 1)
    sums = np.concatenate([[0.0], np.cumsum(sizes)])
    first = int(np.argmax(sums[lasts] - sums[:-1]))
    return first, int(lasts[first])


def _shades(values: np.ndarray) -> list[str]:
    largest = np.abs(values).max(initial=0.0)
    levels = np.rint(_LEVELS * values / largest if largest > 0 else 0 * values).astype(int)
    return ["" if not n else f"p{n}" if n > 0 else f"n{-n}" for n in levels.tolist()]


def _blocks(layers: Sequence[str], values: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Return the layers, or if they are many the sums of those with the same first number."""
    if len(layers) <= _MOST_CELLS:
        return list(layers), values
    numbered = groupby(enumerate(layers), lambda pair: _block(pair[1]))
    runs = [(name, [n for n, _ in run]) for name, run in numbered]
    names = [f"{name} ({len(run)} layers)" for name, run in runs]
    return names, np.array([values[run].sum() for _, run in runs])


def _block(layer: str) -> str:
    found = re.match(r"(?:[^.\d]\w*\.)*\d+(?=\.)", layer)
    return found[0] if found else layer
