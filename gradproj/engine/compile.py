"""torch.compile for a model's blocks: what the machine needs for it, and its errors in one line."""

import importlib
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradproj.errors import ConfigError, ModelError

WAY_OUT = "or leave --compile out: the rows are the same up to rounding"


def check_compiler(device_type: str) -> None:
    """Raise ``ConfigError`` if this machine lacks what torch.compile needs. Compiles nothing."""
    missing = []
    if not _has_cpp_compiler():
        missing.append("a C++ compiler (g++, or the one that CXX names)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python's headers (Python.h)")
    if device_type == "cuda" and not importlib.import_module("torch.utils._triton").has_triton():
        missing.append("triton for this GPU")
    if missing:
        raise ConfigError(
            f"--compile: this machine lacks {' and '.join(missing)}, which torch.compile needs. "
            "Install them (Debian, Ubuntu: apt-get install g++ python3-dev; pip install triton), "
            f"{WAY_OUT}"
        )


def _has_cpp_compiler() -> bool:
    # Imported here because it takes seconds and only --compile needs it.
    builder = importlib.import_module("torch._inductor.cpp_builder")
    missing = importlib.import_module("torch._inductor.exc").InvalidCxxCompiler
    try:
        builder.get_cpp_compiler()
    except missing:
        return False
    return True


def compiled_block(block: nn.Module) -> Callable[..., Any]:
    """Return the block's compiled forward, one for all blocks of its kind and all lengths.

    It is compiled at its first call. Without gradients (an evaluation, once or twice a job) the
    block runs uncompiled.
    """
    plain = block.forward
    compiled = torch.compile(plain, dynamic=True)
    settings = importlib.import_module("torch._dynamo").config

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # By default torch treats everything a Linear's hook holds as weights with fixed shapes, and
        # would compile again for each number of samples.
        with settings.patch(force_nn_module_property_static_shapes=False):
            return compiled(*args, **kwargs)

    return forward


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Run compiled blocks uncompiled: a few batches in another precision are not worth a graph."""
    if "torch._dynamo" not in sys.modules:
        # Nothing is compiled, and importing it takes seconds.
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def compiler_errors_explained() -> Iterator[None]:
    """Turn errors of torch's compiler into a ``ModelError`` of one line."""
    try:
        yield
    except RuntimeError as error:
        # Imported here because it takes seconds, and is loaded once something was compiled.
        kinds = importlib.import_module("torch._dynamo.exc").TorchDynamoException
        cause = getattr(error, "inner_exception", error)
        if not isinstance(error, kinds) or isinstance(cause, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"--compile: torch's compiler failed on this model: {type(cause).__name__}: "
            f"{_telling_line(cause)}. Fix that, {WAY_OUT}"
        ) from error


def _telling_line(error: BaseException) -> str:
    """Return the line that says most: the first with 'error:' in it, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if "error:" in line), lines[0])[:300]
