"""Tests that need a CUDA device: ``pytest -m gpu``. Without one, each is skipped."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """The first GPU, with the job's precision: no TF32."""
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU here")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return torch.device("cuda", 0)


@pytest.fixture(scope="session")
def two_gpus(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip(f"two ranks on two GPUs: torch sees {torch.cuda.device_count()} here")


@pytest.fixture
def memory(gpu):
    """The GPU's allocator, which a test may limit; the limit is removed afterwards."""
    torch.cuda.empty_cache()
    yield GpuMemory(gpu)
    torch.cuda.set_per_process_memory_fraction(1.0, gpu)
    torch.cuda.empty_cache()


class GpuMemory:
    """Bytes that torch's allocator took from the GPU."""

    def __init__(self, device):
        self._device = device

    def peak_of(self, work):
        """Bytes in tensors that ``work`` adds at most to what there is."""
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        return torch.cuda.max_memory_allocated(self._device) - before

    def reserved_by(self, work):
        """Bytes that the allocator holds at most while ``work`` runs, from an empty cache on."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        return torch.cuda.max_memory_reserved(self._device)

    def limit(self, n_bytes):
        """Give no more than so many bytes from here on."""
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(n_bytes / total, self._device)
