"""The first documents of a corpus as tokens with the targets marked: ``plan --show``."""

import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from gradproj.corpus.stream import read_documents
from gradproj.formatting import clean_lines, count, escaped
from gradproj.job.plan import Plan
from gradproj.job.unit_reader import UnitReader
from gradproj.model.sequences import TokenSequence
from gradproj.model.tokenizer_loading import load_tokenizer

_EDGE, _AROUND = 24, 12
"""Tokens that are shown of a sequence's ends, and on both sides of a change of its mask."""
_LEAST_LEFT_OUT = 8
_MARK = "^"


def show_documents(plan: Plan, n: int) -> list[str]:
    """Return lines for the first ``n`` documents: their tokens, and ``^`` under the targets.

    A token's blanks are ``·``; tokens far from a change between context and target are left out.
    """
    tokenizer = load_tokenizer(plan.files)
    reader = UnitReader(plan.index, tokenizer, plan.unit_settings)
    lines = [f"tokens        of the first documents; {_MARK} marks the targets of the loss"]
    stop = min(n, plan.layout.n_samples)
    width = max(40, shutil.get_terminal_size().columns) - 2
    for document in read_documents(plan.index, 0, stop, plan.config.limits):
        tar = plan.index.tars[document.tar].name
        where = f"document {document.sample_id} ({escaped(document.key)} in {tar})"
        status, problem = reader.status_of(document)
        sequences = reader.sequences_of(document)
        n_targets = sum(sequence.n_targets for sequence in sequences)
        what = f"{count(n_targets, 'target')} of {count(sum(map(len, sequences)), 'token')}"
        if not sequences:
            reason = "no target" if status == "ok" else status.replace("_", " ")
            what = f"no row: {problem or reason}"
        lines += ["", clean_lines(f"{where}: {what}")]
        for number, sequence in enumerate(sequences, 1):
            if len(sequences) > 1 or sequence.factor != 1:
                lines.append(
                    f"  sequence {number} of {len(sequences)}, its gradient times "
                    f"{sequence.factor:g}"
                )
            lines += _lines(sequence, tokenizer, width)
    return lines


def _lines(sequence: TokenSequence, tokenizer: Any, width: int) -> Iterator[str]:
    """Yield rows of tokens, each with its row of marks."""
    row, marks = "", ""
    for text, is_target in _words(sequence, tokenizer):
        if row and len(row) + len(text) + 1 > width:
            yield from _with_marks(row, marks)
            row, marks = "", ""
        row += f"{text} "
        marks += (_MARK if is_target else " ") * len(text) + " "
    yield from _with_marks(row, marks)


def _with_marks(row: str, marks: str) -> list[str]:
    return [f"  {line.rstrip()}" for line in (row, marks) if line.strip()]


def _words(sequence: TokenSequence, tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield the text of each token that is shown, or the number of those left out."""
    mask = sequence.is_target
    shown = np.flatnonzero(_kept(mask))
    for last, at in pairwise([-1, *shown.tolist()]):
        if at > last + 1:
            yield f"[{at - last - 1:,} more]", bool(mask[at - 1])
        yield _text_of(int(sequence.ids[at]), tokenizer), bool(mask[at])


def _kept(mask: np.ndarray) -> np.ndarray:
    """Return which tokens are shown, ``(S,)`` bool; every change of the mask is."""
    changes = np.flatnonzero(np.diff(mask.astype(np.int8)))
    kept = np.zeros(len(mask), dtype=bool)
    kept[:_EDGE] = kept[-_EDGE:] = True
    for at in changes.tolist():
        kept[max(0, at - _AROUND + 1) : at + _AROUND + 1] = True
    for start, stop in _runs(~kept):
        kept[start:stop] |= stop - start < _LEAST_LEFT_OUT
    return kept


def _runs(mask: np.ndarray) -> Sequence[tuple[int, int]]:
    ends = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True))


def _text_of(token: int, tokenizer: Any) -> str:
    """Return a token's characters on one line."""
    name, text = tokenizer.convert_ids_to_tokens(token), tokenizer.decode([token])
    if "\N{REPLACEMENT CHARACTER}" in text:  # a part of a character
        text = name
    if name.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not text.startswith(" "):
        text = f" {text}"
    for character, sign in ((" ", "·"), ("\n", "\\n"), ("\r", "\\r"), ("\t", "\\t")):
        text = text.replace(character, sign)
    return clean_lines(text) or f"<{token}>"
