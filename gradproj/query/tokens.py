"""Tokenize queries as a store's job tokenizes documents."""

import bisect
from collections.abc import Sequence
from typing import Any

from gradproj.corpus.content import Completion, Content, Conversation, Preference, Text, TokenIds
from gradproj.engine.batching import BatchConfig
from gradproj.errors import ConfigError
from gradproj.formatting import one_line
from gradproj.model.document_tokens import DocumentRules, DocumentTokenizer, TokenizedDocument
from gradproj.model.sequences import TokenSequence, split_long
from gradproj.model.token_texts import TokenTexts
from gradproj.query.queries import EXCERPT_CHARACTERS, Query

_PROMPT_FRACTION = 0.4
"""Fraction of an excerpt that a prompt may always use, however long the completion is."""
_WHOLE = 2**31
"""No query is longer. A document's end is cut off; a query that is too long is an error."""


class QueryTokenizer:
    """A job's tokenizer and its rules for documents, applied to queries.

    Args:
        tokenizer: the model's own.
        vocabulary: number of token ids that the model has.
        special_tokens: the job's ``--special_tokens``.
        rules: the job's, for targets.
        batch: the job's batch settings, with ``max_length`` resolved.
    """

    def __init__(
        self,
        tokenizer: Any,
        vocabulary: int,
        special_tokens: str,
        rules: DocumentRules,
        batch: BatchConfig,
    ) -> None:
        self._tokenizer, self._batch = tokenizer, batch
        self._kept = "first" if rules.truncate_side == "right" else "last"
        self._documents = DocumentTokenizer(
            tokenizer, special_tokens, rules, _WHOLE, vocabulary=vocabulary
        )

    @property
    def takes_chat(self) -> bool:
        """True if a conversation has tokens: there is a chat template for it."""
        return self._documents.takes_chat

    def sequences_of(self, queries: Sequence[Query]) -> list[TokenSequence]:
        """Return the sequences of all queries; an owner is a query's place.

        Raises:
            ConfigError: no target token, more tokens than a row covers, no tokens by the rules, or
                an unknown token id.
        """
        contents, weights = [q.content for q in queries], [q.weight for q in queries]
        documents = self._documents.sequences(contents, weights)
        pairs = zip(queries, documents, strict=True)
        return [x for n, pair in enumerate(pairs) for x in self._cut(n, *pair)]

    def with_texts(self, queries: Sequence[Query]) -> tuple[list[TokenSequence], list[TokenTexts]]:
        """Return ``sequences_of``, with ``places``, and what each query's tokens stand for."""
        sequences, texts = [], []
        for number, query in enumerate(queries):
            document, tokens = self._documents.with_texts(query.content, query.weight)
            sequences += self._cut(number, query, document)
            texts.append(tokens)
        return sequences, texts

    def _cut(self, number: int, query: Query, document: TokenizedDocument) -> list[TokenSequence]:
        batch = self._batch
        if document.problem:
            raise ConfigError(f"{query.place}: {document.problem}")
        if not document.sequences:
            raise ConfigError(f"{query.place}: no target for a loss; give more text")
        n = max(map(len, document.sequences))
        if n > batch.max_length and batch.long_documents == "truncate":
            raise ConfigError(
                f"{query.place}: {n:,} tokens, and the store's rows cover the {self._kept} "
                f"{batch.max_length:,} of a document; shorten it"
            )
        return [
            part.owned_by(number)
            for whole in document.sequences
            for part in split_long(whole, batch.max_length, batch.long_documents)
        ]

    def characters_that_fit(self, text: str) -> int:
        """Return how many characters of a text, from its beginning, a query may have."""
        if self._batch.long_documents != "truncate":
            return len(text)

        def is_too_long(n: int) -> bool:
            (document,) = self._documents.sequences([Text(text[:n])], [1.0])
            return max(map(len, document.sequences), default=0) > self._batch.max_length

        if not is_too_long(len(text)):
            return len(text)
        return bisect.bisect_left(range(len(text)), True, key=is_too_long) - 1

    def excerpt(self, query: Query) -> str:
        """Return one line of at most ``EXCERPT_CHARACTERS`` characters that shows a query."""
        prompt, answer = self._shown(query.content)
        if not prompt:
            return one_line(answer, EXCERPT_CHARACTERS)
        answer = one_line(answer, EXCERPT_CHARACTERS - 4)
        room = max(int(_PROMPT_FRACTION * EXCERPT_CHARACTERS), EXCERPT_CHARACTERS - 4 - len(answer))
        prompt = one_line(prompt.rstrip()[-4 * room :], 4 * room)
        prompt = prompt if len(prompt) <= room else "..." + prompt[3 - room :]
        return one_line(f"{prompt} >> {answer}" if prompt else answer, EXCERPT_CHARACTERS)

    def _shown(self, content: Content) -> tuple[str, str]:
        """Return the texts of a query's context and of its answer, or "" and the whole text."""
        if isinstance(content, Preference):
            (prompt, chosen), (_, rejected) = map(self._shown, (content.chosen, content.rejected))
            return prompt, f"{chosen} | not: {rejected}"
        if isinstance(content, Completion):
            return content.prompt, content.completion
        if isinstance(content, Conversation):
            before = Conversation(content.messages[:-1])
            return before.plain_text(), content.messages[-1]["content"]
        if isinstance(content, TokenIds):
            return "", self._tokenizer.decode(content.ids[:EXCERPT_CHARACTERS])
        return "", content.text
