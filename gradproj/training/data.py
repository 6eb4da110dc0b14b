"""Documents to training batches, in a seeded order and from any position in it."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.corpus.content import TokenIds
from gradproj.corpus.documents import Document
from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tar.scan import SAMPLES_PER_BLOCK
from gradproj.distributed import World
from gradproj.engine.batching import collate
from gradproj.engine.targets import IGNORE
from gradproj.errors import CorpusError
from gradproj.model.sequences import TokenSequence
from gradproj.training.config import TrainConfig

SHUFFLED_BLOCKS = 64
"""Blocks of documents read and shuffled together. The blocks too are in a shuffled order."""
CHARACTERS_PER_TOKEN = 40
"""Characters of a document that are tokenized per wanted token; the rest would be cut off."""


@dataclass(frozen=True)
class DataPosition:
    """A rank's position: its next document, and tokens that do not fill a sequence yet."""

    epoch: int = 0
    document: int = 0
    """Documents of this epoch that the rank has read."""
    left: np.ndarray = field(default_factory=lambda: np.empty((2, 0), np.int64))
    """``(2, n)``: tokens left over by ``--pack``, and their sample ids."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "epoch": self.epoch,
            "document": self.document,
            "left": torch.from_numpy(np.ascontiguousarray(self.left)),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "DataPosition":
        return cls(state["epoch"], state["document"], state["left"].numpy())


@dataclass(frozen=True)
class TrainBatch:
    """Sequences to train on, padded on the right."""

    input_ids: Tensor
    """``(N, S)`` int64."""
    labels: Tensor
    """``(N, S)`` int64, not shifted; -100 at padding."""
    sample_ids: np.ndarray
    """``(N,)`` int64: the document; with ``--pack`` that of the first token."""
    domains: tuple[str, ...]
    """Domains of these documents."""
    n_tokens: int
    """Without padding."""
    position: DataPosition
    """Position after this batch."""

    @property
    def n_targets(self) -> int:
        return self.n_tokens - len(self.sample_ids)


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
    sequences = _sequences(config, index, tokenizer, world, position or DataPosition())
    for chunk in iter(lambda: list(itertools.islice(sequences, config.batch_size)), []):
        yield make_batch(chunk)


@dataclass(frozen=True)
class Sequence:
    """Tokens of one row of a batch."""

    tokens: np.ndarray
    sample_id: int
    domain: str
    position: DataPosition
    """Position after it."""


def make_batch(sequences: list[Sequence]) -> TrainBatch:
    """Pad sequences on the right into one batch."""
    tokens = [sequence.tokens for sequence in sequences]
    batch = collate([TokenSequence.of(ids) for ids in tokens], np.arange(len(tokens)))
    lengths = torch.tensor([len(ids) for ids in tokens])
    padding = torch.arange(batch.input_ids.shape[1]) >= lengths[:, None]
    labels = batch.input_ids.masked_fill(padding, IGNORE)
    ids = np.array([sequence.sample_id for sequence in sequences], np.int64)
    domains = tuple(sequence.domain for sequence in sequences)
    return TrainBatch(batch.input_ids, labels, ids, domains, batch.n_tokens, sequences[-1].position)


def check_tokens(batch: TrainBatch, vocabulary: int, flag: str) -> None:
    """Raise ``CorpusError`` for a token that the model has no embedding for."""
    largest, place = batch.input_ids.max(dim=1).values.max(dim=0)
    if largest >= vocabulary:
        raise CorpusError(
            f"{flag}: document {batch.sample_ids[place]} has the token id {largest}, and the model "
            f"{vocabulary:,} tokens: give the --tokenizer that belongs to the model, or a corpus "
            "without that token"
        )


def _sequences(
    config: TrainConfig, index: CorpusIndex, tokenizer: Any, world: World, position: DataPosition
) -> Iterator[Sequence]:
    """Yield sequences with at least one target."""
    left, problem = position.left, ""
    for epoch in itertools.count(position.epoch):
        done = position.document if epoch == position.epoch else 0
        has_sequence = done > 0
        first = done * world.size + world.rank
        documents = shuffled_documents(index, config.seed, epoch, first)
        for document in itertools.islice(documents, 0, None, world.size):
            done += 1
            problem = problem or document.problem or ""
            tokens = tokens_of(document, tokenizer, None if config.pack else config.max_length)
            if config.pack and len(tokens):
                end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
                tokens = np.array([*tokens, *end], np.int64)
                pairs = np.stack([tokens, np.full(len(tokens), document.sample_id)])
                left = np.concatenate([left, pairs], axis=1)
                while left.shape[1] >= config.max_length:
                    (ids, owners), left = left[:, : config.max_length], left[:, config.max_length :]
                    after = DataPosition(epoch, done, left)
                    yield Sequence(ids, int(owners[0]), document.domain, after)
                    has_sequence = True
            elif len(tokens) > 1:
                after = DataPosition(epoch, done, left)
                yield Sequence(tokens, document.sample_id, document.domain, after)
                has_sequence = True
        if not has_sequence and left.shape[1] < 2:
            raise CorpusError(
                f"--shards {config.shards}: no document has two tokens, so there is nothing to "
                f"learn{problem and f' (the first problem: {problem})'}"
            )


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


def tokens_of(document: Document, tokenizer: Any, most: int | None) -> np.ndarray:
    """Return a document's first ``most`` token ids (None: all); none for bad input."""
    content = document.content
    if isinstance(content, TokenIds):
        return np.array(content.ids[:most], np.int64)
    text = document.text[: None if most is None else most * CHARACTERS_PER_TOKEN]
    ids = tokenizer(text.encode("utf-8", "replace").decode()).input_ids
    return np.array(ids[:most], np.int64)


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
