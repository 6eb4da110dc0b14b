"""Free and peak memory of a device or of this host, and out-of-memory errors."""

import ctypes
from pathlib import Path

import torch

CUDA_SHARE, HOST_SHARE = 0.85, 0.5
"""Fraction of free memory a batch may use. Lower on the host, which is shared."""


class CudaMemory:
    """Memory of torch's CUDA allocator."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def free(self) -> int:
        free, _ = torch.cuda.mem_get_info(self._device)
        cached = torch.cuda.memory_reserved(self._device)
        return int(CUDA_SHARE * (free + cached - torch.cuda.memory_allocated(self._device)))

    def start(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)
        self._before = torch.cuda.memory_allocated(self._device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._before


class HostMemory:
    """Memory of this process on Linux; unlimited on other systems."""

    def __init__(self, n_neighbours: int) -> None:
        self._n_neighbours = n_neighbours
        self._before = _proc_bytes("self/status", "VmRSS")

    def free(self) -> int:
        return int(HOST_SHARE * available_host_bytes() / self._n_neighbours)

    def start(self) -> None:
        """Do nothing: the peak only grows, and so do the measured batches."""

    def peak(self) -> int:
        return max(0, _proc_bytes("self/status", "VmHWM") - self._before)


def available_host_bytes() -> int:
    """Return the bytes that Linux can give without swapping; a huge number elsewhere."""
    return _proc_bytes("meminfo", "MemAvailable") or 2**62


def return_free_memory() -> None:
    """Give memory that this process has freed back to the system, as far as its C library can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _proc_bytes(table: str, field: str) -> int:
    """Return a field of one of Linux's tables in /proc; 0 if there is none."""
    path = Path("/proc", table)
    lines = path.read_text().splitlines() if path.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Words of errors of the CPU's allocator, CUDA and cuBLAS, which have no class of their own."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether an error means that the device has no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in _NO_MEMORY
    )
