"""Tokenize documents, reading no more of a long document than its row covers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

# Characters of a long document to try first, per token needed. English text has about four.
_CHARACTERS_PER_TOKEN = 12


class _Encoding(NamedTuple):
    input_ids: list[int]
    words: list[int | None]
    """The number of each token's word; empty for a tokenizer without words."""


class Tokenizing:
    """A tokenizer with the run's special tokens and length.

    Args:
        tokenizer: a tokenizer of transformers.
        special_tokens: tokenizer, none, bos or bos_eos.
        max_tokens: the number of tokens needed of a document; 0 = all.
    """

    def __init__(self, tokenizer: Any, special_tokens: str, max_tokens: int = 0) -> None:
        self._tokenizer = tokenizer
        self._by_tokenizer = special_tokens == "tokenizer"
        self._before = [tokenizer.bos_token_id] if "bos" in special_tokens else []
        self._after = [tokenizer.eos_token_id] if "eos" in special_tokens else []
        self._max_tokens = max_tokens
        self._max_characters = _CHARACTERS_PER_TOKEN * max_tokens if tokenizer.is_fast else 0

    def ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return int64 token ids per text. The first ``max_tokens`` are those of the whole text."""
        results = self._ids_of_beginnings(texts)
        rest = [i for i, ids in enumerate(results) if ids is None]
        for i, encoding in zip(rest, self._encode([texts[i] for i in rest]), strict=True):
            ids = [*self._before, *encoding.input_ids, *self._after]
            results[i] = np.array(ids, dtype=np.int64)
        return [ids for ids in results if ids is not None]

    def _ids_of_beginnings(self, texts: Sequence[str]) -> list[np.ndarray | None]:
        """Return the ids of long texts of which the beginning suffices; None for the others."""
        results: list[np.ndarray | None] = [None] * len(texts)
        limit = self._max_characters
        long = [i for i, text in enumerate(texts) if limit and len(text) > limit]
        for i, encoding in zip(long, self._encode([texts[i][:limit] for i in long]), strict=True):
            if self._is_settled(encoding):
                ids = [*self._before, *encoding.input_ids][: self._max_tokens]
                results[i] = np.array(ids, dtype=np.int64)
        return results

    def _is_settled(self, encoding: _Encoding) -> bool:
        """Return whether text after the cut cannot change the first ``max_tokens`` tokens.

        The tokenizer splits text into words and tokenizes each alone, so that holds if these tokens
        lie in words that end before the cut. It never holds for a tokenizer without words.
        """
        words = encoding.words
        if len(words) <= self._max_tokens:
            return False
        last = next((w for w in reversed(words) if w is not None), None)
        needed = [w for w in words[: self._max_tokens] if w is not None]
        return last is not None and bool(needed) and max(needed) < last - 1

    def _encode(self, texts: Sequence[str]) -> list[_Encoding]:
        if not texts:
            return []
        encoded = self._tokenizer(
            list(texts), add_special_tokens=self._by_tokenizer, return_attention_mask=False
        )
        if encoded.encodings is None:
            return [_Encoding(ids, []) for ids in encoded.input_ids]
        return [_Encoding(e.ids, e.word_ids) for e in encoded.encodings]
