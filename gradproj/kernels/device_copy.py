"""Tensors to a device and back without waiting for what it computes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A host's tensor on ``device``; through page-locked memory, or the driver may wait for the device first."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """A mark behind all that this thread has given to the device; None where there is nothing to wait for."""
    if device.type != "cuda":
        return None
    mark = torch.cuda.Event(enable_timing=True)
    mark.record(torch.cuda.current_stream(device))
    return mark


def seconds_between(first: torch.cuda.Event | None, last: torch.cuda.Event | None) -> float | None:
    """What the device took from one mark to another that it has passed; None where there are none."""
    return None if first is None or last is None else first.elapsed_time(last) / 1000


def fetch(tensors: Sequence[Tensor], computed: torch.cuda.Event | None) -> list[Tensor]:
    """The tensors on the host, as they are at the mark.

    On CUDA they go through page-locked memory on a stream of their own, so that the copy runs beside the next unit's
    kernels; only the calling thread waits for it. On the CPU they are given back as they are.
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
            tensor.record_stream(stream)  # its memory may be given to others only after the copy
            copies.append(copy)
    stream.synchronize()
    return copies
