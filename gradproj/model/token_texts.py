"""Pieces of a document's text that its tokens stand for, by character offsets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_CHARACTERS_PER_TOKEN = 12
"""Of the beginning of a long text that is looked at first."""

_BLANK = "▁"
"""A blank, as pieces of sentencepiece's kind write it."""


@dataclass(frozen=True)
class TokenText:
    """A token of a document. The pieces of a text, one after the other, are that text."""

    piece: str
    """Its characters; empty for a special token, and for a further token of one character."""
    name: str
    """Its form in the vocabulary."""
    start: int | None
    """Of ``piece`` in the text, in characters; None if it was not made from a text."""
    end: int | None
    answer: str = ""
    """Of a preference: which of the two answers, each of which is a text of its own."""


@dataclass(frozen=True)
class _Passage:
    """A text of a document, or token ids, in the order of the document's tokens."""

    first: int
    ids: np.ndarray
    text: str
    bounds: list[int] | None
    """The tokens' beginnings in characters, and the last one's end; None if they are not known."""
    answer: str


class TokenTexts(Sequence[TokenText]):
    """The tokens of a document by their places, those of a preference's second answer last.

    A token's characters begin where those of the token before it end. So blanks that a tokenizer
    leaves out of all tokens belong to the next one, and of the tokens of one character the first
    has it. A ``TokenText`` is made when it is asked for: a document may have millions.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._passages: list[_Passage] = []

    def __len__(self) -> int:
        return sum(len(passage.ids) for passage in self._passages)

    def __getitem__(self, place: Any) -> Any:
        if isinstance(place, slice):
            return [self[n] for n in range(*place.indices(len(self)))]
        place = range(len(self))[place]  # of the end, if negative; or an IndexError
        passage = next(x for x in reversed(self._passages) if x.first <= place)
        number = place - passage.first
        name = str(self._tokenizer.convert_ids_to_tokens(int(passage.ids[number])))
        if passage.bounds is None:
            return TokenText(self._decoded(passage.ids, number), name, None, None, passage.answer)
        start, end = passage.bounds[number : number + 2]
        return TokenText(passage.text[start:end], name, start, end, passage.answer)

    def add(self, ids: np.ndarray, text: str, special: bool, answer: str = "") -> int:
        """Add the tokens of a text and return the place of the first.

        ``text`` is empty for token ids that were made of none; ``special`` says that the tokenizer
        added special tokens.
        """
        ends = self._ends(ids, text, special) if text else None
        bounds = None if ends is None else self._bounds(ids, text, ends.tolist())
        self._passages.append(_Passage(len(self), ids, text, bounds, answer))
        return self._passages[-1].first

    def _bounds(self, ids: np.ndarray, text: str, ends: list[int]) -> list[int]:
        blank, bounds = self._tokenizer.get_vocab().get(_BLANK), [0]
        for token, end in zip(ids.tolist(), ends, strict=True):
            start = bounds[-1]
            # A blank that was put before the text has the offsets of the next token.
            is_added = token == blank and text[start:end].strip()
            bounds.append(start if is_added else max(start, end))
        return bounds

    def _decoded(self, ids: np.ndarray, number: int) -> str:
        """Return a token's text: what it adds to that of the token before it."""
        decode, token = self._tokenizer.decode, ids[number]
        if number == 0:
            return decode([token])
        before, both = decode([ids[number - 1]]), decode([ids[number - 1], token])
        return both[len(before) :] if both.startswith(before) else decode([token])

    def _ends(self, ids: np.ndarray, text: str, special: bool) -> np.ndarray | None:
        """Return where each token's characters end, ``(S,)``; None if that is not known.

        ``ids`` may be those of the text's beginning, with a special token before and after them.
        """
        if not self._tokenizer.is_fast:
            return None
        limit = _CHARACTERS_PER_TOKEN * len(ids)
        for some in (text[:limit], text) if len(text) > limit else (text,):
            encoded = self._tokenizer(
                some,
                add_special_tokens=special,
                return_offsets_mapping=True,
                return_attention_mask=False,
            )
            theirs = np.array(encoded.input_ids, np.int64)
            ends = np.array(encoded.offset_mapping, np.int64).reshape(-1, 2)[:, 1]
            for before in (0, 1):
                n = min(len(ids) - before, len(theirs))
                if n >= len(ids) - before - 1 and (ids[before : before + n] == theirs[:n]).all():
                    found = np.zeros(len(ids), np.int64)
                    found[before : before + n] = ends[:n]
                    return found
        return None
