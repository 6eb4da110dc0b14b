"""Process-wide torch settings that must be made before the first product."""

import os

KEPT_KERNELS = 64


def use_deterministic_cublas() -> None:
    """For equal results of equal products; before CUDA starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def limit_kernel_caches() -> None:
    """Before torch's first product: oneDNN keeps a kernel for each shape, and batches hardly ever have an earlier one.

    Its 1,024 kernels, and the 1,024 that torch keeps beside, come to a gigabyte; a batch uses a few dozen.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))
