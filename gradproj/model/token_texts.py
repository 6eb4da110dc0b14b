"""Pieces of a document's text that its tokens stand for, by character offsets."""

from dataclasses import dataclass, field
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


@dataclass
class TokenTexts:
    """The tokens of a document in their places, those of a preference's second answer last.

    A token's characters begin where those of the token before it end. So blanks that a tokenizer
    leaves out of all tokens belong to the next one, and of the tokens of one character the first
    has it.
    """

    tokenizer: Any
    tokens: list[TokenText] = field(default_factory=list)

    def add(self, ids: np.ndarray, text: str, special: bool, answer: str = "") -> int:
        """Add the tokens of a text and return the place of the first.

        ``text`` is empty for token ids that were made of none; ``special`` says that the tokenizer
        added special tokens.
        """
        first, names = len(self.tokens), self.tokenizer.convert_ids_to_tokens(ids.tolist())
        ends = self._ends(ids, text, special) if text else None
        start = 0
        for number, name in enumerate(map(str, names)):
            if ends is None:
                piece = self._decoded(ids, number)
                self.tokens.append(TokenText(piece, name, None, None, answer))
                continue
            end = max(start, int(ends[number]))
            if name == _BLANK and text[start:end].strip():
                end = start  # it was put before the text, and its offsets are of the next token
            self.tokens.append(TokenText(text[start:end], name, start, end, answer))
            start = end
        return first

    def _decoded(self, ids: np.ndarray, number: int) -> str:
        """Return a token's text: what it adds to that of the token before it."""
        alone, before = (self.tokenizer.decode([token]) for token in (ids[number], ids[number - 1]))
        both = self.tokenizer.decode([ids[number - 1], ids[number]]) if number else alone
        return both[len(before) :] if number and both.startswith(before) else alone

    def _ends(self, ids: np.ndarray, text: str, special: bool) -> np.ndarray | None:
        """Return where each token's characters end, ``(S,)``; None if that is not known.

        ``ids`` may be those of the text's beginning, with a special token before and after them.
        """
        if not self.tokenizer.is_fast:
            return None
        limit = _CHARACTERS_PER_TOKEN * len(ids)
        for some in (text[:limit], text) if len(text) > limit else (text,):
            encoded = self.tokenizer(
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
