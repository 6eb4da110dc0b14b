"""Process-wide torch settings that must be made before the first product."""

import os

import torch

ONEDNN_KERNELS = 64


def prepare_torch(threads: int, deterministic: bool) -> None:
    """Set this process's threads, precision and determinism. Call before CUDA is initialised.

    Args:
        threads: CPU threads; 0 leaves torch's own number.
        deterministic: use deterministic CUDA kernels only.
    """
    limit_onednn_cache()
    if threads:
        torch.set_num_threads(threads)
    # TF32 would change rows in the fourth digit, and which products use it depends on the GPU.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # A long sum must not be split into parts that are added in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if deterministic:
        use_deterministic_cublas()
        torch.use_deterministic_algorithms(True)


def use_deterministic_cublas() -> None:
    """Make cuBLAS deterministic. Must be called before CUDA is initialised."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def limit_onednn_cache() -> None:
    """Keep few compiled oneDNN kernels. Must be called before torch's first product.

    oneDNN and torch each cache a kernel for 1,024 shapes, a gigabyte in all. Batches rarely repeat
    a shape, and one batch uses a few dozen.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(ONEDNN_KERNELS))
