"""A store's model with whole gradients, and the tokens of its documents by their ids."""

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch

from gradproj.engine.batching import BatchConfig, collate, fit_padding, plan_batches
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.layers import TargetLayer
from gradproj.engine.loss import chunk_verdict
from gradproj.engine.patterns import ALL
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.whole_gradients import LayerBatch, WholeGradients
from gradproj.errors import ModelError
from gradproj.formatting import shown
from gradproj.job.config import RunConfig
from gradproj.job.recorded import recorded_config, recorded_index, recorded_model
from gradproj.job.recorded_documents import RecordedDocuments
from gradproj.kernels.memory import CudaMemory, HostMemory, is_out_of_memory
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.model.loading import load_model, load_model_config
from gradproj.model.sequences import TokenSequence
from gradproj.store import ProjectionStore

log = logging.getLogger(__name__)

SequenceVisit = Callable[[int, LayerBatch, np.ndarray], None]
Begin = Callable[[], SequenceVisit]


def _show(visit: SequenceVisit, numbers: np.ndarray, layer: int, batch: LayerBatch) -> None:
    visit(layer, batch, numbers)


class RecordedModel:
    """The unchanged model of a store's job, which runs texts with whole gradients.

    Args:
        store: of a job.
        run: the job's settings, with the present place of the model.
        device: where to run.
        shards: the tars, if they have moved.
        layers: patterns as those of ``--proj_layers``; empty for the store's layers.

    Raises:
        ModelError: the model or the tokenizer is not the recorded one, or no layer matches.
    """

    def __init__(
        self,
        store: ProjectionStore,
        run: RunConfig,
        device: torch.device,
        shards: str = "",
        layers: Sequence[str] = (),
    ) -> None:
        prepare_torch(run.job.threads, run.job.deterministic)
        files, self._tokenizer = recorded_model(store, run)
        self._vocabulary = load_model_config(files).get_text_config().vocab_size
        self._store, self._run, self.device, self._shards = store, run, device, shards
        self.model = load_model(files, device)
        # An engine finds the layers and checks their gradients against autograd's.
        chosen = ProjectionConfig(
            layers=",".join(layers) or ALL,
            seed=run.projection.seed,
            experts=run.projection.experts,
            include_embeddings=run.projection.include_embeddings and not layers,
        )
        if not layers:
            chosen = chosen.of_layers(store.layers)
        engine = GradProjLoraEngine.from_config(self.model, chosen)
        with engine:
            self._alone = bool(engine.only_alone)
        self.targets: dict[str, TargetLayer] = {each.name: each for each in engine.targets}
        self._chunked, _ = chunk_verdict(self.model)
        self._batch_tokens = run.batch.batch_tokens or BatchConfig.batch_tokens

    def sequences(
        self, sample_ids: np.ndarray, other: ProjectionStore | None = None
    ) -> list[TokenSequence]:
        """Read documents from their tars; an owner is its document's place in the ids.

        ``other`` is another job's store with the same model, whose documents these are.

        Raises:
            CorpusError: a tar is missing or has changed.
            StoreError: a document has no target token now.
        """
        run = self._run if other is None else recorded_config(other.path.parent)
        store = other or self._store
        index = recorded_index(store.path.parent, "" if other else self._shards)
        made = store, run, self._tokenizer, self._vocabulary, index
        return RecordedDocuments(*made).sequences(sample_ids)

    @property
    def memory(self) -> CudaMemory | HostMemory:
        """Memory of the device."""
        return CudaMemory(self.device) if self.device.type == "cuda" else HostMemory(1)

    def budget(self, gigabytes: float) -> int:
        """Return the bytes that matrices may take: so many GB, or half of what is free for 0."""
        return int(gigabytes * 1e9) or self.memory.free() // 2

    @property
    def batch(self) -> BatchConfig:
        """The job's batch settings."""
        return self._run.batch

    def run(
        self, layers: Sequence[str], sequences: Sequence[TokenSequence], label: str, begin: Begin
    ) -> None:
        """Run all sequences forward and backward, and show each layer's part of each batch.

        On a device without the memory, all begins again with batches of half the tokens.

        Args:
            layers: names of ``targets``.
            sequences: of any texts.
            label: names the pass in its progress.
            begin: returns a function of ``(number of the layer, its batch, positions of the
                batch's samples in sequences)``, with all sums at zero.

        Raises:
            ModelError: a single sequence does not fit the device's memory.
        """
        chosen = [self.targets[name] for name in layers]
        lengths = list(map(len, sequences))
        batch = self._batch_settings(lengths)
        checkpointing = self._run.job.gradient_checkpointing
        while True:
            plan = plan_batches(lengths, batch.batch_size, self._batch_tokens, batch.max_padding)
            visit = begin()
            try:
                with WholeGradients(self.model, chosen, checkpointing) as whole:
                    for numbers in shown(plan, len(plan), label, "batches"):
                        on_device = collate(sequences, numbers).to(self.device)
                        show = functools.partial(_show, visit, numbers)
                        whole.run(on_device, show, self._chunked)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if max(map(len, plan)) == 1:
                    raise ModelError(
                        f"{self.device} has no memory for the whole gradients of a sequence of "
                        f"{max(lengths):,} tokens: give --memory less, for more and smaller groups "
                        "of layers, or --device cpu"
                    ) from error
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._batch_tokens = max(self._batch_tokens // 2, 1)
            log.warning("out of memory: batches of %d tokens from now on", self._batch_tokens)

    def _batch_settings(self, lengths: Sequence[int]) -> BatchConfig:
        batch = self._run.batch
        if self._alone:
            return replace(batch, batch_size=1)
        return fit_padding(self.model, batch, max(lengths)) if len(set(lengths)) > 1 else batch
