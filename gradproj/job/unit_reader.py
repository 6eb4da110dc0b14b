"""Reads a unit: its documents read, tokenized and batched on the host, ready for the engine."""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gradproj.corpus.content import TokenIds
from gradproj.corpus.documents import UNKNOWN_DOMAIN, Document, ReadLimits
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.stream import read_documents
from gradproj.engine.batching import BatchConfig, longest_of_owners, plan_batches
from gradproj.formatting import escaped
from gradproj.model.document_tokens import DocumentRules, DocumentTokenizer, TokenizedDocument
from gradproj.model.sequences import TokenSequence
from gradproj.model.token_texts import TokenTexts
from gradproj.store.layout import STATUS, StoreLayout, empty_columns, encode_keys

log = logging.getLogger(__name__)

PARTIAL_VERSION = 3
"""Of the files of partial rows. Those of another version are computed again."""

_TOKENIZED_AT_ONCE = 256
"""Documents handed to the tokenizer in one call."""

_CHARACTERS_AT_ONCE = 4_000_000
"""Characters, or token ids, handed to the tokenizer in one call; an encoding takes some 40 bytes
for each."""


@dataclass(frozen=True)
class UnitSettings:
    """The settings that turn documents into rows, equal in every rank."""

    layout: StoreLayout
    identity: str
    batch: BatchConfig
    """With ``max_length`` resolved."""
    special_tokens: str
    vocabulary: int
    """Number of token ids the model has."""
    domains: tuple[str, ...]
    """All domain names, in the order of their codes."""
    chosen_domains: tuple[str, ...]
    """Empty: all."""
    limits: ReadLimits
    rules: DocumentRules

    def status_of(self, document: Document) -> tuple[str, str]:
        """Return the status as far as the document alone decides it, and a bad input's problem."""
        if self.chosen_domains and document.domain not in self.chosen_domains:
            return "not_selected", ""
        if document.content is None:
            return "bad_input", document.problem or ""
        return ("empty" if document.content.is_empty() else "ok"), ""


@dataclass
class PreparedUnit:
    """A unit on the host, ready for the engine."""

    unit: int
    start: int
    columns: dict[str, np.ndarray]
    sequences: list[TokenSequence]
    """Their owners are rows of the unit."""
    batches: list[np.ndarray]
    """Positions in ``sequences``."""
    row_of: np.ndarray = field(init=False)
    """``(n_sequences,)`` int64: the row that a sequence's gradient is added to."""

    def __post_init__(self) -> None:
        self.row_of = np.array([sequence.owner for sequence in self.sequences], dtype=np.int64)

    def key(self, settings: UnitSettings, basis: str) -> str:
        """Return a digest of everything that partial rows of this unit depend on.

        ``basis`` is a digest of the rows' basis.
        """
        digest = hashlib.sha256(f"{PARTIAL_VERSION} {settings.identity} {basis} ".encode())
        for chosen in self.batches:
            digest.update(chosen.tobytes() + b"|")
        for sequence in self.sequences:
            factor = np.float64(sequence.factor)
            for part in (sequence.ids, sequence.is_target, factor):
                digest.update(part.tobytes())
        return digest.hexdigest()[:32]


class UnitReader:
    """Reads, tokenizes and batches units. The job runs it in a thread, ahead of the engine.

    ``stopping`` is called every few hundred documents; True abandons the unit.
    """

    def __init__(
        self,
        index: CorpusIndex,
        tokenizer: Any,
        settings: UnitSettings,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._index, self.settings = index, settings
        batch = settings.batch
        self._tokenizer = DocumentTokenizer(
            tokenizer, settings.special_tokens, settings.rules, batch.max_length,
            batch.long_documents, settings.vocabulary,
        )  # fmt: skip
        self._stopping = stopping
        self._domain_codes = {name: code for code, name in enumerate(settings.domains)}
        # An index of an earlier version read no objects written as strings.
        self._no_code = self._domain_codes.get(UNKNOWN_DOMAIN, -1)

    def read(self, unit: int) -> PreparedUnit | None:
        """Return the prepared unit, or None if a stop was requested meanwhile."""
        return self.read_samples(unit, *self.settings.layout.unit_range(unit))

    def read_samples(self, unit: int, start: int, stop: int) -> PreparedUnit | None:
        """Prepare samples ``[start, stop)`` of a unit. None if a stop was requested meanwhile."""
        settings, layout = self.settings, self.settings.layout
        columns = empty_columns(stop - start, layout.key_bytes)
        sequences: list[TokenSequence] = []
        keys: list[str] = []
        pending: list[tuple[int, Document]] = []
        size = 0

        def tokenize_pending() -> None:
            tokenized = self._tokenize([document for _, document in pending])
            for (row, document), made in zip(pending, tokenized, strict=True):
                if made.problem:
                    columns["status"][row] = STATUS["bad_input"]
                    _warn(document, made.problem)
                elif not made.sequences:
                    columns["status"][row] = STATUS["no_target"]
                columns["n_tokens"][row] = made.n_targets
                sequences.extend(sequence.owned_by(row) for sequence in made.sequences)
            pending.clear()

        for row, document in enumerate(read_documents(self._index, start, stop, settings.limits)):
            keys.append(document.key)
            columns["tar"][row] = document.tar
            columns["domain"][row] = self._domain_codes.get(document.domain, self._no_code)
            status, problem = self.settings.status_of(document)
            if problem:
                _warn(document, problem)
            columns["status"][row] = STATUS[status]
            if status == "ok":
                pending.append((row, document))
                content = document.content
                size += len(content.ids if isinstance(content, TokenIds) else document.text)
            if len(pending) == _TOKENIZED_AT_ONCE or size > _CHARACTERS_AT_ONCE:
                size = 0
                if self._stopping():
                    return None
                tokenize_pending()
        tokenize_pending()
        columns["key"] = encode_keys(keys, layout.key_bytes)
        batch = settings.batch
        lengths: Sequence[int] | np.ndarray = [len(tokens) for tokens in sequences]
        if batch.long_documents == "truncate" and batch.max_padding:
            lengths = longest_of_owners(sequences)
        batches = plan_batches(lengths, batch.batch_size, batch.batch_tokens, batch.max_padding)
        return PreparedUnit(unit, start, columns, sequences, batches)

    def status_of(self, document: Document) -> tuple[str, str]:
        """Return a document's status before it is computed, and a bad input's problem."""
        status, problem = self.settings.status_of(document)
        if status == "ok":
            (made,) = self._tokenize([document])
            problem = made.problem
        return ("bad_input" if problem else status), problem

    def sequences_of(self, document: Document) -> list[TokenSequence]:
        """Return the token sequences of one document; none if it makes no row of its own."""
        if self.settings.status_of(document)[0] != "ok":
            return []
        (made,) = self._tokenize([document])
        return made.sequences

    def with_texts(self, document: Document) -> tuple[list[TokenSequence], TokenTexts]:
        """Return the sequences of a document, with ``places``, and what its tokens stand for."""
        content = document.content
        if content is None or self.settings.status_of(document)[0] != "ok":
            return [], TokenTexts(None)
        made, texts = self._tokenizer.with_texts(content, document.weight)
        return made.sequences, texts

    def _tokenize(self, documents: Sequence[Document]) -> list[TokenizedDocument]:
        """Tokenize documents with a content."""
        pairs = [(d.content, d.weight) for d in documents if d.content is not None]
        return self._tokenizer.sequences([c for c, _ in pairs], [weight for _, weight in pairs])


def _warn(document: Document, problem: str) -> None:
    key = escaped(document.key)
    log.warning("sample %d (%s): bad input: %s", document.sample_id, key, problem)
