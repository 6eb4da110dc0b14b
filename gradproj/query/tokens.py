"""Tokenize queries as a store's job tokenizes documents."""

from collections.abc import Sequence
from typing import Any

from gradproj.engine.batching import BatchConfig
from gradproj.errors import ConfigError
from gradproj.formatting import one_line
from gradproj.model.sequences import TokenSequence, split_long
from gradproj.query.queries import EXCERPT_CHARACTERS, Query

_PROMPT_FRACTION = 0.4
"""Fraction of an excerpt that a prompt may always use, however long the completion is."""


class QueryTokenizer:
    """A job's tokenizer, special tokens and rule for long documents, applied to queries.

    Args:
        tokenizer: the model's own.
        vocabulary: number of token ids that the model has.
        special_tokens: the job's ``--special_tokens``.
        batch: the job's batch settings, with ``max_length`` resolved.
    """

    def __init__(
        self, tokenizer: Any, vocabulary: int, special_tokens: str, batch: BatchConfig
    ) -> None:
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        self._special, self._batch = special_tokens, batch

    def sequences_of(self, queries: Sequence[Query]) -> list[TokenSequence]:
        """Return the sequences of all queries; an owner is a query's place.

        Raises:
            ConfigError: no target token, more tokens than a row covers, or an unknown token id.
        """
        batch = self._batch
        return [
            part
            for number, query in enumerate(queries)
            for part in split_long(
                self._whole(query).owned_by(number), batch.max_length, batch.long_documents
            )
        ]

    def _whole(self, query: Query) -> TokenSequence:
        tokens, max_length = self._encode(query), self._batch.max_length
        n = len(tokens)
        if not tokens.n_targets:
            length = "a single token" if n < 2 else f"{n:,} tokens, all of the prompt"
            raise ConfigError(f"{query.place}: {length}: no target for a loss; give more text")
        if n > max_length and self._batch.long_documents == "truncate":
            raise ConfigError(
                f"{query.place}: {n:,} tokens, and the store's rows cover the first "
                f"{max_length:,} of a document; shorten it"
            )
        return tokens

    def excerpt(self, query: Query) -> str:
        """Return one line of at most ``EXCERPT_CHARACTERS`` characters that shows a query."""
        if query.input_ids is not None:
            text = self._tokenizer.decode(query.input_ids[:EXCERPT_CHARACTERS])
            return one_line(text, EXCERPT_CHARACTERS)
        if query.text is not None:
            return one_line(query.text, EXCERPT_CHARACTERS)
        completion = one_line(query.completion or "", EXCERPT_CHARACTERS - 4)
        room = max(
            int(_PROMPT_FRACTION * EXCERPT_CHARACTERS), EXCERPT_CHARACTERS - 4 - len(completion)
        )
        prompt = one_line((query.prompt or "").rstrip()[-4 * room :], 4 * room)
        prompt = prompt if len(prompt) <= room else "..." + prompt[3 - room :]
        return one_line(f"{prompt} >> {completion}" if prompt else completion, EXCERPT_CHARACTERS)

    def _encode(self, query: Query) -> TokenSequence:
        if query.input_ids is not None:
            self._check_vocabulary(query, max(query.input_ids))
            return TokenSequence.of(query.input_ids)
        prompt = _encodable(query.prompt or "")
        whole = prompt + _encodable(query.completion if query.text is None else query.text)
        encoding = self._tokenizer(
            whole,
            add_special_tokens=self._special == "tokenizer",
            return_offsets_mapping=self._tokenizer.is_fast,
        )
        first = _first_completion_token(
            encoding, prompt, self._tokenizer, self._special == "tokenizer"
        )
        before = [self._tokenizer.bos_token_id] if "bos" in self._special else []
        after = [self._tokenizer.eos_token_id] if "eos" in self._special else []
        ids = [*before, *encoding.input_ids, *after]
        self._check_vocabulary(query, max(ids, default=0))
        return TokenSequence.of(ids, first=len(before) + first)

    def _check_vocabulary(self, query: Query, largest: int) -> None:
        if largest >= self._vocabulary:
            raise ConfigError(
                f"{query.place}: token id {largest}; the model has ids from 0 to "
                f"{self._vocabulary - 1:,}"
            )


def _first_completion_token(encoding: Any, prompt: str, tokenizer: Any, special: bool) -> int:
    """Return the first token with a character after the prompt, from the token offsets.

    Slow tokenizers have no offsets. There it is the first token that differs from those of the
    prompt alone, which is too early if the completion changes how the prompt's end is split.
    """
    if not prompt:
        return 0
    if not tokenizer.is_fast:
        alone = tokenizer(prompt, add_special_tokens=special).input_ids
        pairs = enumerate(zip(alone, encoding.input_ids, strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(alone), len(encoding.input_ids)))
    ends = [end for _, end in encoding.offset_mapping]
    return next((i for i, end in enumerate(ends) if end > len(prompt)), len(ends))


def _encodable(text: str | None) -> str:
    """Replace lone surrogates, which stand for bytes that are not UTF-8 in argv and in JSON."""
    return (text or "").encode("utf-8", "replace").decode()
