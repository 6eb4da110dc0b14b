"""Documents to token ids, without reading more of a long document than its row covers."""

from collections.abc import Sequence
from typing import Any

import numpy as np

_CHARACTERS_PER_TOKEN = 12
"""Of a long document so many characters per token wanted are tried first; English text has about four."""


class Tokenizing:
    """A tokenizer with the run's special tokens and length.

    Args:
        tokenizer: of transformers.
        special_tokens: tokenizer, none, bos or bos_eos.
        most_tokens: only so many tokens of a document are wanted; 0 = all.
    """

    def __init__(self, tokenizer: Any, special_tokens: str, most_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._by_tokenizer = special_tokens == "tokenizer"
        self._before = [tokenizer.bos_token_id] if "bos" in special_tokens else []
        self._after = [tokenizer.eos_token_id] if "eos" in special_tokens else []
        self._most_tokens = most_tokens
        self._most_characters = _CHARACTERS_PER_TOKEN * most_tokens if tokenizer.is_fast else 0

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Every text's token ids, int64; the first ``most_tokens`` of them are those of the whole text."""
        found = self._of_beginnings(texts)
        whole = [i for i, ids in enumerate(found) if ids is None]
        for i, ids in zip(whole, self._encode([texts[i] for i in whole]), strict=True):
            found[i] = np.array([*self._before, *ids.input_ids, *self._after], dtype=np.int64)
        return [ids for ids in found if ids is not None]

    def _of_beginnings(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Ids of texts whose beginning is enough; None for the others."""
        found: list[np.ndarray | None] = [None] * len(texts)
        limit = self._most_characters
        long = [i for i, text in enumerate(texts) if limit and len(text) > limit]
        for i, encoding in zip(long, self._encode([texts[i][:limit] for i in long]), strict=True):
            if self._is_settled(encoding):
                ids = [*self._before, *encoding.input_ids][: self._most_tokens]
                found[i] = np.array(ids, dtype=np.int64)
        return found

    def _is_settled(self, encoding: Any) -> bool:
        """Whether the tokens wanted lie in words that end before the cut, so that the rest cannot change them.

        The tokenizer splits text into words first and tokenizes each alone; where it does not (one word
        all through), this is never so.
        """
        words = encoding.words
        if len(words) <= self._most_tokens:
            return False
        last = next((w for w in reversed(words) if w is not None), None)
        wanted = [w for w in words[: self._most_tokens] if w is not None]
        return last is not None and bool(wanted) and max(wanted) < last - 1

    def _encode(self, texts: Sequence[str]) -> list[Any]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=self._by_tokenizer, return_attention_mask=False
        )
        if encoded.encodings is None:
            return [_Plain(ids) for ids in encoded.input_ids]
        return [_Plain(e.ids, e.word_ids) for e in encoded.encodings]


class _Plain:
    """What is used of an encoding."""

    def __init__(self, input_ids: list[int], words: list[int | None] | None = None) -> None:
        self.input_ids = input_ids
        self.words = words or []
