"""Documents to training batches, in an order that depends on the seed alone."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.batching import Batch, collate
from gradproj.corpus.documents import Document
from gradproj.corpus.index import SAMPLES_PER_BLOCK, CorpusIndex, build_index, list_tars, load_index
from gradproj.corpus.stream import read_documents
from gradproj.errors import CorpusError, StoreError
from gradproj.store.files import explain_os_errors
from gradproj.training.config import TrainConfig

SHUFFLED_BLOCKS = 64
"""Blocks of documents that are read and shuffled together; the blocks themselves come in a shuffled order."""
CHARACTERS_PER_TOKEN = 40
"""Of a long document only so many per wanted token are tokenized, since the rest is cut off anyway."""


def open_corpus(shards: str) -> CorpusIndex:
    """The corpus named by ``--shards``: an index file's, or one made from the tars."""
    return load_index(Path(shards)) if shards.endswith(".json") else build_index(list_tars(shards))


def make_folder(flag: str, path: str) -> Path:
    """The folder for results, made before any work is done for it; ``StoreError`` where it cannot be."""
    try:
        with explain_os_errors(path):
            Path(path).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StoreError(f"{flag} {path}: {error.filename} is a file; give a folder") from error
    return Path(path)


def batches_of(config: TrainConfig, index: CorpusIndex, tokenizer: Any) -> Iterator[Batch]:
    """Batches without end, the same for the same seed."""
    sequences = _sequences(config, index, tokenizer)
    for chunk in iter(lambda: list(itertools.islice(sequences, config.batch_size)), []):
        yield collate(chunk, np.arange(len(chunk)), pad=0)


def _sequences(config: TrainConfig, index: CorpusIndex, tokenizer: Any) -> Iterator[np.ndarray]:
    left = np.empty(0, np.int64)
    for epoch in itertools.count():
        found = False
        for document in shuffled_documents(index, config.seed, epoch):
            tokens = _tokens(document, tokenizer, None if config.pack else config.max_length)
            if config.pack and len(tokens):
                end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
                left = np.concatenate([left, tokens, np.array(end, np.int64)])
                while len(left) >= config.max_length:
                    yield left[: config.max_length]
                    left, found = left[config.max_length :], True
            elif len(tokens) > 1:
                yield tokens
                found = True
        if not found and len(left) < 2:
            raise CorpusError(
                f"--shards {config.shards}: no document has two tokens, so there is nothing to learn"
            )


def shuffled_documents(index: CorpusIndex, seed: int, epoch: int) -> Iterator[Document]:
    """Every document once, in an order that depends on the seed and the epoch; memory holds 4,096 of them."""
    order = np.random.default_rng([seed, epoch])
    blocks = order.permutation(-(-index.n_samples // SAMPLES_PER_BLOCK)) * SAMPLES_PER_BLOCK
    for first in range(0, len(blocks), SHUFFLED_BLOCKS):
        group = [
            document
            for start in blocks[first : first + SHUFFLED_BLOCKS].tolist()
            for document in read_documents(index, start, min(start + SAMPLES_PER_BLOCK, index.n_samples))
        ]
        yield from (group[i] for i in order.permutation(len(group)))


def _tokens(document: Document, tokenizer: Any, most: int | None) -> np.ndarray:
    """A document's token ids, the first ``most`` of them; none of one that is bad input."""
    ids = document.input_ids
    if ids is None:
        text = (document.text or "")[: None if most is None else most * CHARACTERS_PER_TOKEN]
        ids = tokenizer(text.encode("utf-8", "replace").decode()).input_ids
    return np.array(ids[:most], np.int64)
