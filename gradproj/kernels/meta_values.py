"""Answers for models that ask the meta device for values, which its tensors do not have."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class AssumedValues(TorchDispatchMode):
    """Context in which every value of a meta tensor that a model reads is one, or True.

    So all of a mask's tokens are there and every expert has all tokens: the most that a batch can
    take. Shapes that depend on values are the largest ones.
    """

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        first = args[0] if args and isinstance(args[0], Tensor) else None
        if first is not None and first.is_meta:
            if operation is torch.ops.aten._local_scalar_dense.default:
                return True if first.dtype == torch.bool else 1
            if operation is torch.ops.aten.equal.default:
                return True
            if operation is torch.ops.aten.nonzero.default:
                return first.new_empty((first.numel(), first.dim()), dtype=torch.int64)
            if operation is torch.ops.aten._grouped_mm.default:
                return _grouped(*args[:2])
        return operation(*args, **(kwargs or {}))


def _grouped(a: Tensor, b: Tensor) -> Tensor:
    """Return the shape of a grouped product, which is meant for bfloat16 but serves float32 too."""
    if a.dim() == 2 and b.dim() == 3:
        return a.new_empty(len(a), b.shape[-1])
    raise NotImplementedError("only rows in groups, each times a matrix")
