"""Process-wide torch settings that must be made before the first product."""

import os

import torch

ONEDNN_KERNELS = 64
"""oneDNN and torch would each cache a kernel for 1,024 shapes, a gigabyte in all. Batches rarely
repeat a shape, and one batch uses a few dozen.
"""


def prepare_torch(threads: int, deterministic: bool) -> None:
    """Set this process's threads, precision and determinism. Call before CUDA is initialised.

    ``threads`` is the number of CPU threads; 0 leaves torch's own.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(ONEDNN_KERNELS))
    if threads:
        torch.set_num_threads(threads)
    # TF32 would change rows in the fourth digit, and which products use it depends on the GPU.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # A long sum must not be split into parts that are added in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
