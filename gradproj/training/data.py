"""Documents to training batches, in a seeded order and from any position in it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.corpus.content import Preference, Text, TokenIds
from gradproj.corpus.documents import Document
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.sampling import spread_order
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tar.scan import SAMPLES_PER_BLOCK
from gradproj.distributed import World
from gradproj.engine.batching import collate
from gradproj.engine.targets import IGNORE
from gradproj.errors import CorpusError
from gradproj.formatting import escaped
from gradproj.model.document_tokens import DocumentTokenizer
from gradproj.model.sequences import TokenSequence
from gradproj.training.config import TrainConfig

SHUFFLED_BLOCKS = 64
"""Blocks of documents read and shuffled together. The blocks too are in a shuffled order."""
N_CHECKED = 32
"""Documents that are read before the first step."""


@dataclass(frozen=True)
class DataPosition:
    """A rank's position: its next document, and tokens that do not fill a sequence yet."""

    epoch: int = 0
    document: int = 0
    """Documents of this epoch that the rank has read."""
    left: np.ndarray = field(default_factory=lambda: np.empty((3, 0), np.int64))
    """``(3, n)``: tokens left over by ``--pack``, their sample ids, and 1 for a target."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "document": self.document,
            "left": torch.from_numpy(np.ascontiguousarray(self.left)),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "DataPosition":
        left = state["left"].numpy()
        if len(left) == 2:  # of an earlier version, in which every token was a target
            left = np.concatenate([left, np.ones_like(left[:1])])
        return cls(state["epoch"], state["document"], left)


@dataclass(frozen=True)
class TrainBatch:
    """Sequences to train on, padded on the right."""

    input_ids: Tensor
    """``(N, S)`` int64."""
    labels: Tensor
    """``(N, S)`` int64, not shifted; -100 at padding and at tokens that carry no loss."""
    weights: Tensor | None
    """``(N,)`` float32: what the sequences' losses are multiplied by; None if all are 1."""
    sample_ids: np.ndarray
    """``(N,)`` int64: the document; with ``--pack`` that of the first token."""
    domains: tuple[str, ...]
    """Domains of these documents."""
    n_tokens: int
    """Without padding."""
    n_targets: int
    position: DataPosition
    """Position after this batch."""


def batches_of(
    config: TrainConfig,
    index: CorpusIndex,
    tokenizer: Any,
    world: World = World(),  # noqa: B008 - frozen
    position: DataPosition | None = None,
) -> Iterator[TrainBatch]:
    """Yield a rank's batches without end, from a position on; equal seeds give equal batches.

    Of an epoch's documents in shuffled order, rank r of W takes those at r, W + r, 2 W + r, ...
    """
    if index.n_samples < world.size:
        raise CorpusError(
            f"--shards {config.shards}: {index.n_samples} document(s) for {world.size} ranks; "
            "start fewer"
        )
    samples = _samples(config, index, tokenizer, world, position or DataPosition())
    for chunk in iter(lambda: list(itertools.islice(samples, config.batch_size)), []):
        yield make_batch(chunk)


@dataclass(frozen=True)
class Sample:
    """One row of a batch."""

    sequence: TokenSequence
    """Its owner is the document's sample id."""
    domain: str
    position: DataPosition
    """Position after it."""


def make_batch(samples: list[Sample]) -> TrainBatch:
    """Pad samples on the right into one batch."""
    sequences = [sample.sequence for sample in samples]
    batch = collate(sequences, np.arange(len(sequences)))
    labels = torch.full_like(batch.input_ids, IGNORE)
    labels[:, 1:][batch.token_mask[:, :-1]] = batch.targets
    labels[:, 0] = batch.input_ids[:, 0]  # nothing predicts it
    ids = np.array([sequence.owner for sequence in sequences], np.int64)
    domains = tuple(sample.domain for sample in samples)
    return TrainBatch(
        batch.input_ids, labels, batch.factors, ids, domains, batch.n_tokens, len(batch.targets),
        samples[-1].position,
    )  # fmt: skip


def check_tokens(batch: TrainBatch, vocabulary: int, flag: str) -> None:
    """Raise ``CorpusError`` for a token that the model has no embedding for."""
    largest, place = batch.input_ids.max(dim=1).values.max(dim=0)
    if largest >= vocabulary:
        raise CorpusError(
            f"{flag}: document {batch.sample_ids[place]} has the token id {largest}, and the model "
            f"{vocabulary:,} tokens: give the --tokenizer that belongs to the model, or a corpus "
            "without that token"
        )


class SampleTokenizer:
    """A run's tokenizer and rules, for documents to train on.

    Args:
        config: the run's settings.
        tokenizer: the model's.
        pack: whether documents are joined, so that none is cut.
    """

    def __init__(self, config: TrainConfig, tokenizer: Any, pack: bool) -> None:
        length = 0 if pack else config.max_length
        self._documents = DocumentTokenizer(tokenizer, "tokenizer", config.rules, length)
        self._pack, self._end = pack, tokenizer.eos_token_id

    def __call__(self, document: Document, shards: str) -> tuple[TokenSequence | None, str]:
        """Return a document's sequence, or None and the problem with it (or "").

        Raises:
            CorpusError: a preference, or a weight among packed documents.
        """
        if document.content is None:
            return None, document.problem or ""
        if isinstance(document.content, Preference):
            raise CorpusError(
                f"{shards}: document {document.sample_id} ({escaped(document.key)}) is a chosen "
                "and a rejected answer, and gradproj train has no reference model to compare them "
                "with: leave such documents out. The job makes rows of them"
            )
        if self._pack and document.weight != 1:
            raise CorpusError(
                f"{shards}: document {document.sample_id} ({escaped(document.key)}) has the weight "
                f"{document.weight:g}, and --pack joins documents in one loss: leave --pack out"
            )
        (tokenized,) = self._documents.sequences([document.content], [document.weight])
        sequences = [x for x in tokenized.sequences if x.n_targets or _is_one_token(x, document)]
        if not sequences:
            return None, tokenized.problem
        return sequences[0].owned_by(document.sample_id), ""

    def ended(self, sequence: TokenSequence) -> np.ndarray:
        """Return ``(3, n)`` as in ``DataPosition.left``, with the token that ends a document."""
        ids, is_target = sequence.ids, sequence.is_target.copy()
        is_target[0] = is_target[1:].all()  # after another document, the first is predicted too
        if self._end is not None:
            # A target if the document's last token is one.
            ids, is_target = np.append(ids, self._end), np.append(is_target, is_target[-1])
        return np.stack([ids, np.full(len(ids), sequence.owner), is_target])


def check_forms(config: TrainConfig, index: CorpusIndex, tokenizer: Any) -> None:
    """Tokenize a few documents from all over the corpus, before the first step.

    Raises:
        CorpusError: one of them is of a form that cannot be trained on.
    """
    tokenize, shards = SampleTokenizer(config, tokenizer, config.pack), f"--shards {config.shards}"
    for sample_id in itertools.islice(spread_order(index.n_samples), N_CHECKED):
        for document in read_documents(index, sample_id, sample_id + 1):
            tokenize(document, shards)


def _is_one_token(sequence: TokenSequence, document: Document) -> bool:
    """Return whether a whole document is one token, a target after another document's tokens."""
    content = document.content
    is_plain = isinstance(content, Text) or (
        isinstance(content, TokenIds) and content.labels is None
    )
    return len(sequence) == 1 and is_plain


def _samples(
    config: TrainConfig, index: CorpusIndex, tokenizer: Any, world: World, position: DataPosition
) -> Iterator[Sample]:
    """Yield samples with at least one target."""
    left, problem, shards = position.left, "", f"--shards {config.shards}"
    tokenize = SampleTokenizer(config, tokenizer, config.pack)
    for epoch in itertools.count(position.epoch):
        done = position.document if epoch == position.epoch else 0
        has_sample = done > 0
        first = done * world.size + world.rank
        documents = shuffled_documents(index, config.seed, epoch, first)
        for document in itertools.islice(documents, 0, None, world.size):
            done += 1
            sequence, of_document = tokenize(document, shards)
            problem = problem or of_document
            if sequence is None:
                continue
            if not config.pack:
                yield Sample(sequence, document.domain, DataPosition(epoch, done, left))
                has_sample = True
                continue
            left = np.concatenate([left, tokenize.ended(sequence)], axis=1)
            while left.shape[1] >= config.max_length:
                row, left = _packed(left[:, : config.max_length]), left[:, config.max_length :]
                if row.n_targets:
                    yield Sample(row, document.domain, DataPosition(epoch, done, left))
                    has_sample = True
        if not has_sample and left.shape[1] < 2:
            raise CorpusError(
                f"{shards}: no document has two tokens and a target, so there is nothing to "
                f"learn{problem and f' (the first problem: {problem})'}"
            )


def _packed(tokens: np.ndarray) -> TokenSequence:
    """Return a sequence of ``(3, n)`` tokens, as ``DataPosition.left`` has them."""
    ids, owners, is_target = tokens
    return TokenSequence(ids, is_target.astype(bool), owner=int(owners[0])).part(0, len(ids))


def shuffled_documents(
    index: CorpusIndex, seed: int, epoch: int, first: int = 0
) -> Iterator[Document]:
    """Yield every document once, in an order that seed and epoch define.

    At most 4,096 documents are in memory. Of the ``first`` documents, which are skipped, only those
    that are shuffled together with later ones are read.
    """
    order = np.random.default_rng([seed, epoch])
    n_samples = index.n_samples
    blocks = order.permutation(-(-n_samples // SAMPLES_PER_BLOCK)) * SAMPLES_PER_BLOCK
    for begin in range(0, len(blocks), SHUFFLED_BLOCKS):
        ranges = [
            (start, min(start + SAMPLES_PER_BLOCK, n_samples))
            for start in blocks[begin : begin + SHUFFLED_BLOCKS].tolist()
        ]
        size = sum(stop - start for start, stop in ranges)
        chosen = order.permutation(size)[first:]
        first = max(0, first - size)
        if len(chosen):
            parts = (read_documents(index, start, stop) for start, stop in ranges)
            group = list(itertools.chain.from_iterable(parts))
            yield from (group[i] for i in chosen)


class TrainedDocuments:
    """Domains and texts of the documents trained on, by sample id."""

    def __init__(self, index: CorpusIndex) -> None:
        self._index = index
        self._domains: dict[int, str] = {}

    def add(self, batches: list[TrainBatch]) -> None:
        for batch in batches:
            self._domains.update(zip(batch.sample_ids.tolist(), batch.domains, strict=True))

    def domain(self, sample_id: int) -> str:
        """Return a document's domain, read from its tar if another process trained on it."""
        if sample_id not in self._domains:
            # Read the whole block: a tar is read from the start of a block anyway.
            first = sample_id - sample_id % SAMPLES_PER_BLOCK
            last = min(first + SAMPLES_PER_BLOCK, self._index.n_samples)
            documents = read_documents(self._index, first, last)
            self._domains.update((each.sample_id, each.domain) for each in documents)
        return self._domains[sample_id]

    def text(self, sample_id: int) -> str:
        """Return a document's text; empty if it has token ids only."""
        return next(iter(read_documents(self._index, sample_id, sample_id + 1))).text
