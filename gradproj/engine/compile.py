"""torch's compiler: whether the machine has what it needs, a model's block through it, its failures in one line."""

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

WAY_OUT = "or leave --compile out: the rows are the same to rounding"


def check_compiler(device_type: str) -> None:
    """Refuse a machine on which nothing can be compiled; nothing is compiled for it.

    Raises:
        ConfigError: what is missing, and the way out.
    """
    missing = []
    if not _has_cpp_compiler():
        missing.append("a C++ compiler (g++, or the one that CXX names)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        missing.append("Python's headers (Python.h)")
    if device_type == "cuda" and not importlib.import_module("torch.utils._triton").has_triton():
        missing.append("triton for this GPU")
    if missing:
        raise ConfigError(
            f"--compile: this machine lacks {' and '.join(missing)}, which torch.compile needs. Install them "
            f"(Debian, Ubuntu: apt-get install g++ python3-dev; pip install triton), {WAY_OUT}"
        )


def _has_cpp_compiler() -> bool:
    # Not imported above: it takes seconds, and only --compile needs it.
    builder = importlib.import_module("torch._inductor.cpp_builder")
    missing = importlib.import_module("torch._inductor.exc").InvalidCxxCompiler
    try:
        builder.get_cpp_compiler()
    except missing:
        return False
    return True


def compiled_block(block: nn.Module) -> Callable[..., Any]:
    """The block's forward, compiled at its first call: once for all blocks of its kind and all lengths.

    Without gradients (an evaluation) the block runs as it is: that happens once or twice a job.
    """
    plain = block.forward
    compiled = torch.compile(plain, dynamic=True)
    settings = importlib.import_module("torch._dynamo").config

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*args, **kwargs)
        # Otherwise all that a Linear's hook holds counts as weights, and each number of samples is compiled anew.
        with settings.patch(force_nn_module_property_static_shapes=False):
            return compiled(*args, **kwargs)

    return forward


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Compiled blocks run as they are: for a few batches in another precision no graphs are worth making."""
    if (
        "torch._dynamo" not in sys.modules
    ):  # nothing is compiled, and an import here would take seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextmanager
def compiler_errors_explained() -> Iterator[None]:
    """Around everything that may compile.

    Raises:
        ModelError: the compiler failed; one line of why.
    """
    try:
        yield
    except RuntimeError as error:
        # The module is there only once something has been compiled, and an import here would take seconds.
        kinds = importlib.import_module("torch._dynamo.exc").TorchDynamoException
        cause = getattr(error, "inner_exception", error)
        if not isinstance(error, kinds) or isinstance(cause, torch.OutOfMemoryError):
            raise
        raise ModelError(
            f"--compile: torch's compiler failed on this model: {type(cause).__name__}: {_telling_line(cause)}. "
            f"Mend that, {WAY_OUT}"
        ) from error


def _telling_line(error: BaseException) -> str:
    """The line that says most: a compiler's own error where there is one, else the first."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    return next((line for line in lines if "error:" in line), lines[0])[:300]
