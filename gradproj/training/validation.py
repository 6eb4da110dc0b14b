"""A fixed set of validation batches, for evaluations and for GradDotProd."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.stream import read_documents
from gradproj.distributed import World
from gradproj.engine.loss import per_sample_loss
from gradproj.errors import CorpusError
from gradproj.model.fingerprint import check_corpus_tokenizer
from gradproj.training.config import TrainConfig
from gradproj.training.data import DataPosition, Sample, SampleTokenizer, TrainBatch, make_batch
from gradproj.training.data_parallel import totals


class Validation:
    """The first ``--val_batches`` batches of ``--val_shards``."""

    def __init__(
        self, config: TrainConfig, tokenizer: Any, device: torch.device, world: World
    ) -> None:
        self.batches = _read(config, tokenizer) if config.val_shards else []
        self._device, self._world = device, world
        self._autocast = config.model_dtype == "bfloat16"

    @property
    def pair(self) -> tuple[Tensor, Tensor] | None:
        """``(input_ids, labels)`` of the first batch, on the device; None without batches."""
        if not self.batches:
            return None
        return self.batches[0].input_ids.to(self._device), self.batches[0].labels.to(self._device)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Return the mean loss of all batches, in nats per target token.

        Collective: each rank takes its part of the batches.
        """
        training = model.training
        model.eval()
        total, n_targets = 0.0, 0
        for batch in self.batches[self._world.rank :: self._world.size]:
            ids, labels = batch.input_ids.to(self._device), batch.labels.to(self._device)
            inputs = {"input_ids": ids, "labels": labels}
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
                total += per_sample_loss(model, inputs, chunked=False).sum().item()
            n_targets += batch.n_targets
        model.train(training)
        total, n_all = totals(self._world, total, n_targets)
        return total / n_all


def _read(config: TrainConfig, tokenizer: Any) -> list[TrainBatch]:
    index = open_corpus(config.val_shards, flag="--val_shards")
    check_corpus_tokenizer(index.tokenization, tokenizer, config.rules, flag="--val_shards")
    samples: list[Sample] = []
    shards, problem = f"--val_shards {config.val_shards}", ""
    tokenize = SampleTokenizer(config, tokenizer, pack=False)
    for document in read_documents(index, 0, index.n_samples):
        if len(samples) == config.val_batches * config.val_batch_size:
            break
        sequence, of_document = tokenize(document, shards)
        problem = problem or of_document
        if sequence is not None:
            # A validation loss is one mean over all targets.
            sequence = replace(sequence, factor=1.0)
            samples.append(Sample(sequence, document.domain, DataPosition()))
    if not samples:
        raise CorpusError(
            f"{shards}: no document has two tokens and a target"
            f"{problem and f' (the first problem: {problem})'}"
        )
    size = config.val_batch_size
    return [make_batch(samples[i : i + size]) for i in range(0, len(samples), size)]
