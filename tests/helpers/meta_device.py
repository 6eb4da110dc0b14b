"""Find operations that would make the host wait for a GPU, without a GPU: torch's ``meta`` device.

Its tensors have shapes and no values. An operation that waits for a CUDA device either fails on it
(``item``, ``nonzero``, a copy to the host) or is recorded here: copies from host memory that is not
page-locked, boolean masks, tensors made from Python numbers. So a loop that passes never waits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

META_DEVICE = torch.device("meta")

_COPIES = ("aten::_to_copy", "aten::copy_")
_MAKERS = ("tensor", "as_tensor", "new_tensor", "asarray")


class _Operations(TorchDispatchMode):
    """Records each operation that would wait but does not fail on ``meta``."""

    def __init__(self, waits: list[str], pinned: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._waits, self._pinned = waits, pinned

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        given = _tensors((args, kwargs))
        name = operation._schema.name
        on_host = [x for x in given if x.device.type == "cpu"]
        if on_host and any(x.device == META_DEVICE for x in (*given, *_tensors(result))):
            blocking = not (
                kwargs.get("non_blocking") or (name == "aten::copy_" and args[2:] == (True,))
            )
            if name not in _COPIES or blocking or any(x not in self._pinned for x in on_host):
                self._waits.append(f"{operation}: copy from host memory that is not page-locked")
        if "index" in name and any(x.dtype == torch.bool for x in _tensors(args[1:2])):
            self._waits.append(f"{operation}: boolean mask, whose size only the device knows")
        return result


class _Makers(TorchFunctionMode):
    """Records tensors made on the device from Python numbers: a copy that no operation shows."""

    def __init__(self, waits: list[str]) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        made = name in _MAKERS and not any(isinstance(x, Tensor) for x in args[-1:])
        listed = name in ("__getitem__", "__setitem__") and isinstance(args[1], list)
        if (made and result.device == META_DEVICE) or (listed and args[0].device == META_DEVICE):
            self._waits.append(f"{name}: made from numbers of the host")
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@contextmanager
def watched(waits: list[str]) -> Iterator[None]:
    """Record in ``waits`` what would wait for the device. Reading a value raises torch's error.

    ``pin_memory`` copies into ordinary memory that counts as page-locked.
    """
    pinned, pin = WeakTensorKeyDictionary(), Tensor.pin_memory

    def pin_memory(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned[copy] = True
        return copy

    Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]
    try:
        with _Makers(waits), _Operations(waits, pinned):
            yield
    finally:
        Tensor.pin_memory = pin  # type: ignore[method-assign]


def waits_of(work: Callable[[], object]) -> list[str]:
    """Return what in ``work`` would wait for the device. Reading a value ends ``work``."""
    waits: list[str] = []
    try:
        with watched(waits):
            work()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if "meta" not in str(error).lower():
            raise
        waits.append(str(error))
    return waits
