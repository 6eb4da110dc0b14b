"""Tokenize documents, reading no more of a long document than its row covers."""

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from gradproj.model.long_words import longest_token, settled_ids

SPECIAL_TOKENS = ("tokenizer", "none", "bos", "bos_eos")
"""Values of ``--special_tokens``."""

# Characters of a long document to try first, per token needed. English text has about four.
_CHARACTERS_PER_TOKEN = 12


class Tokenizing:
    """A tokenizer with the run's special tokens and length.

    ``max_tokens`` is the number of tokens needed of a document; 0 = all.
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
        rest = [i for i in range(len(texts)) if i not in results]
        results |= self._ids_of_long_words({i: texts[i] for i in rest})
        rest = [i for i in rest if i not in results]
        if rest:
            encoded = self._encode([texts[i] for i in rest]).input_ids
            whole = ([*self._before, *ids, *self._after] for ids in encoded)
            results |= dict(zip(rest, whole, strict=True))
        return [np.array(results[i], dtype=np.int64) for i in range(len(texts))]

    def _ids_of_beginnings(self, texts: Sequence[str]) -> dict[int, list[int]]:
        """Return position -> ids of the long texts of which the beginning suffices."""
        limit = self._max_characters
        long = [i for i, text in enumerate(texts) if limit and len(text) > limit]
        if not long:
            return {}
        encoded = self._encode([texts[i][:limit] for i in long]).encodings
        return {
            i: [*self._before, *encoding.ids][: self._max_tokens]
            for i, encoding in zip(long, encoded, strict=True)
            if self._is_settled(encoding.word_ids)
        }

    def _ids_of_long_words(self, texts: dict[int, str]) -> dict[int, list[int]]:
        """Return position -> ids of texts of which many beginnings are shorter than the whole."""
        found, limit = {}, self._max_characters
        for i, text in texts.items():
            if limit and len(text) > 2 * limit and len(text) > limit * self._longest > 0:
                ids = settled_ids(self._encodings, text, limit, self._max_tokens, self._longest)
                if ids is not None:
                    found[i] = [*self._before, *ids][: self._max_tokens]
        return found

    @functools.cached_property
    def _longest(self) -> int:
        return longest_token(self._tokenizer)

    def _encodings(self, texts: Sequence[str]) -> Any:
        return self._encode(list(texts)).encodings

    def _is_settled(self, words: list[int | None]) -> bool:
        """Return whether text after the cut cannot change the first ``max_tokens`` tokens.

        The tokenizer splits text into words and tokenizes each alone, so that holds if these tokens
        lie in words that end before the cut. It never holds for a tokenizer without words.
        ``words`` has the number of each token's word.
        """
        if len(words) <= self._max_tokens:
            return False
        last = next((w for w in reversed(words) if w is not None), None)
        needed = [w for w in words[: self._max_tokens] if w is not None]
        return last is not None and bool(needed) and max(needed) < last - 1

    def _encode(self, texts: list[str]) -> Any:
        return self._tokenizer(
            texts, add_special_tokens=self._by_tokenizer, return_attention_mask=False
        )
