"""Estimates a rank's memory by running a batch on the meta device, where tensors have no values."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradproj.engine.batching import BatchConfig
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import logits_are_the_heads, per_sample_loss
from gradproj.engine.projection import ProjectionConfig
from gradproj.engine.targets import Targets
from gradproj.kernels.meta_values import AssumedValues
from gradproj.model.checkpoint import ModelFiles
from gradproj.model.config import MODEL_DTYPES
from gradproj.model.loading import model_skeleton


def batch_bytes(
    files: ModelFiles, projection: ProjectionConfig, batch: BatchConfig, checkpointing: bool
) -> int | None:
    """Return the most bytes that the largest batch's forward and backward pass hold at once.

    Returns:
        Bytes of the engine's matrices and of all tensors but the weights. None if nothing is known,
        since the model's path depends on values.
    """
    model = model_skeleton(files).to(MODEL_DTYPES[files.config.model_dtype])
    n = max(1, min(batch.batch_size, batch.batch_tokens // batch.max_length))
    weights = [*model.parameters(), *model.buffers()]
    try:
        counted = _LiveBytes(weights)
        with torch.device("meta"), counted as live, AssumedValues(), _fused_attention():
            engine = GradProjLoraEngine.from_config(model, projection, None, checkpointing)
            with engine:
                chunked = logits_are_the_heads(model)
                ids = torch.zeros(n, batch.max_length, dtype=torch.int64)
                tokens = torch.zeros(n * (batch.max_length - 1), dtype=torch.int64)
                engine.set_token_mask(torch.ones_like(ids))
                inputs = {"input_ids": ids, "targets": Targets(tokens, tokens)}
                per_sample_loss(model, inputs, chunked=chunked, causal=False).sum().backward()
                engine.collect_batch()
    except torch.OutOfMemoryError:
        raise
    except Exception:  # what a model cannot do on the meta device raises many types
        return None
    return live.most


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that exist, without ``known`` ones and their views."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._storages = {tensor.untyped_storage()._cdata for tensor in known}
        self._now = self.most = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, n_bytes = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages.add(key)
            self._now += n_bytes
            self.most = max(self.most, self._now)
            weakref.finalize(storage, self._drop, key, n_bytes)

    def _drop(self, key: int, n_bytes: int) -> None:
        self._storages.discard(key)
        self._now -= n_bytes


@contextmanager
def _fused_attention() -> Iterator[None]:
    """Give attention the memory of a fused kernel; the meta device has only the plain product."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Tensor:
        return _Attention.apply(query, key, value)

    plain = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = plain


class _Attention(torch.autograd.Function):
    """Tensors of a fused attention, without values."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])
