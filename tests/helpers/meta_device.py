"""A device that cannot be asked: torch's ``meta``, whose tensors have shapes and no values, watched for waits.

What would make a CUDA program wait for its device either has no answer there (``item``, ``nonzero``, a copy to the
host) or is noted on the way: copies from the host that are not from page-locked memory, boolean masks, tensors made of
Python's numbers. So a loop that runs through here never waits, and no GPU is needed to know it.
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
    """Notes each operation that would wait and that ``meta`` lets pass."""

    def __init__(self, found: list[str], pinned: WeakTensorKeyDictionary) -> None:
        super().__init__()
        self._found, self._pinned = found, pinned

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
                self._found.append(
                    f"{operation}: from the host, not by a copy of page-locked memory"
                )
        if "index" in name and any(x.dtype == torch.bool for x in _tensors(args[1:2])):
            self._found.append(f"{operation}: by a boolean mask, whose size is not known")
        return result


class _Makers(TorchFunctionMode):
    """Notes tensors made of Python's numbers on the device: a copy that no operation shows."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        made = name in _MAKERS and not any(isinstance(x, Tensor) for x in args[-1:])
        listed = name in ("__getitem__", "__setitem__") and isinstance(args[1], list)
        if (made and result.device == META_DEVICE) or (listed and args[0].device == META_DEVICE):
            self._found.append(f"{name}: made of numbers that the host has")
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


@contextmanager
def watched(found: list[str]) -> Iterator[None]:
    """Note in ``found`` what would wait for the device; page-locked memory is ordinary memory that is known by name.

    What reads a value raises torch's own error.
    """
    pinned, pin = WeakTensorKeyDictionary(), Tensor.pin_memory

    def pin_memory(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        pinned[copy] = True
        return copy

    Tensor.pin_memory = pin_memory  # type: ignore[method-assign, assignment]
    try:
        with _Makers(found), _Operations(found, pinned):
            yield
    finally:
        Tensor.pin_memory = pin  # type: ignore[method-assign]


def waits_of(work: Callable[[], object]) -> list[str]:
    """What in ``work`` would wait for the device; an operation that reads a value ends it."""
    found: list[str] = []
    try:
        with watched(found):
            work()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if "meta" not in str(error).lower():
            raise
        found.append(str(error))
    return found
