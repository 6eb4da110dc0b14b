"""torch.compile for a model's blocks: what the machine needs for it, and its errors in one line."""

import importlib
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradproj.errors import ConfigError, ModelError
from gradproj.files import try_lock

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


def remove_torn_libraries() -> list[Path]:
    """Delete libraries in torch's cache that a killed compiler left unfinished.

    torch loads any library that is there: without this, each later start would end in an
    ImportError. Libraries that a process is compiling now are locked, and left alone.
    """
    cache = Path(importlib.import_module("torch._inductor.runtime.cache_dir_utils").cache_dir())
    removed = []
    for path in cache.glob("*/*.so"):
        lock_path = cache / "locks" / f"{path.name.partition('.')[0]}.lock"
        with suppress(OSError):
            if _is_torn(path):
                lock_path.parent.mkdir(exist_ok=True)
                with lock_path.open("a") as lock:
                    if try_lock(lock) is not False:
                        path.unlink()
                        removed.append(path)
    return removed


def _is_torn(path: Path) -> bool:
    """Return whether a library of Linux ends before the table of its sections, its last part."""
    with path.open("rb") as file:
        header = file.read(64)
    if not header.startswith(b"\x7fELF"):
        return not header.strip(b"\0")  # nothing was written yet; or of another system
    if len(header) < 64:
        return True
    (start,) = struct.unpack_from("<Q", header, 0x28)
    size, count = struct.unpack_from("<HH", header, 0x3A)
    return path.stat().st_size < start + size * count


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
    """Turn errors of torch's compiler, or of its cache, into a ``ModelError`` of one line."""
    try:
        yield
    except (RuntimeError, ImportError, OSError) as error:
        if "torch._inductor" not in sys.modules:
            raise
        cause = getattr(error, "inner_exception", error)
        cache = importlib.import_module("torch._inductor.runtime.cache_dir_utils").cache_dir()
        is_import = isinstance(error, ImportError) or "Failed to import" in str(error)
        # A module of the cache that is empty or cut short lacks what it was made for.
        is_cut = "module 'torch._inductor.runtime.compile_tasks." in str(cause)
        if is_cut or (is_import and f"{cache}/" in str(error)):
            raise ModelError(
                f"--compile: torch's cache of compiled code is damaged ({_telling_line(cause)}). "
                f"Delete it and start again: rm -r {cache}"
            ) from error
        # Imported here because it takes seconds, and is loaded once something was compiled.
        kinds = importlib.import_module("torch._dynamo.exc").TorchDynamoException
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
