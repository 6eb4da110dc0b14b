"""Copies tensors to a device and back without waiting for its kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to ``device``."""
    # From pageable memory the copy would wait for the device's earlier work.
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """Record a CUDA event on the current stream. None on a CPU."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def seconds_between(first: torch.cuda.Event | None, last: torch.cuda.Event | None) -> float | None:
    """Return the device's time between two events that have passed. None if there are none."""
    return None if first is None or last is None else first.elapsed_time(last) / 1000


def to_host(tensors: Sequence[Tensor], computed: torch.cuda.Event | None) -> list[Tensor]:
    """Return the tensors on the host, with their values at the event ``computed``.

    On CUDA they are copied to page-locked memory on a separate stream, beside the next unit's
    kernels; only the calling thread waits. CPU tensors are returned as they are.
    """
    if computed is None:
        return [tensor.cpu() for tensor in tensors]
    stream = torch.cuda.Stream(tensors[0].device)
    with torch.cuda.stream(stream):
        stream.wait_event(computed)
        copies = []
        for tensor in tensors:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            copy.copy_(tensor, non_blocking=True)
            tensor.record_stream(stream)  # the allocator may reuse its memory only after the copy
            copies.append(copy)
    stream.synchronize()
    return copies
