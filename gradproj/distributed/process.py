"""This process's rank, world size, device and job, read from the environment."""

import contextlib
import os
import socket
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradproj.errors import ConfigError, GradprojError, ReportedError
from gradproj.formatting import clean_lines

if TYPE_CHECKING:
    import torch

LET_RANK_0_SPEAK_S = 10.0


def launcher_rank() -> int | None:
    """Return the rank that a launcher gave this process. None without a launcher."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdigit() else None


def quieten_torch() -> None:
    """Let torch's C++ code log errors only, unless the user wants more. Call before torch loads.

    A lost launcher is a page of C++ frames as a warning, and one line of ours (``Rendezvous``).
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


def store_address() -> tuple[str, int, bool]:
    """Return host and port of the ranks' store, and whether torchrun's agent holds it, not rank 0.

    Raises:
        ConfigError: the launcher named no address.
    """
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit() or int(port) >= 2**16:
        raise ConfigError(
            f"the launcher set MASTER_ADDR to {host!r} and MASTER_PORT to {port!r}: the ranks need "
            "rank 0's machine and a free port of it. Start the job with torchrun"
        )
    return host, int(port), os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def launcher_died() -> bool:
    """Return whether torchrun's rendezvous store, held by its agent, refuses connections."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        socket.create_connection(store_address()[:2]).close()
    except OSError as error:
        return isinstance(error, ConnectionRefusedError)  # others are the network's
    return False


@dataclass(frozen=True)
class Process:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool = False
    """Started by torchrun or the like, which ends all ranks if one fails."""

    @classmethod
    def from_environment(cls) -> "Process":
        """Read torchrun's variables. A process without them is rank 0 of 1."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        given: dict[str, Any] = {name: os.environ[name] for name in names if name in os.environ}
        if "RANK" not in given and "WORLD_SIZE" not in given:
            return cls(0, 1, 0, 1)
        missing = [name for name in names if name not in given]
        if missing:
            incomplete = f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}"
            raise ConfigError(f"{incomplete}: start the job with torchrun")
        return cls(**{name.lower(): int(value) for name, value in given.items()}, launched=True)


@dataclass(frozen=True)
class JobName:
    """The job and its start, the same on all ranks."""

    job_id: str
    generation: int
    """Number of earlier starts, by torchrun or Slurm."""

    @classmethod
    def from_environment(cls) -> "JobName":
        """Take Slurm's job id (an array's element has its own), or a name unique to this start."""
        env = os.environ
        restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
        restarts += 1000 * int(env.get("SLURM_RESTART_COUNT", 0))
        if "SLURM_ARRAY_JOB_ID" in env:
            task = env.get("SLURM_ARRAY_TASK_ID", "0")
            return cls(f"slurm-{env['SLURM_ARRAY_JOB_ID']}_{task}", restarts)
        if "SLURM_JOB_ID" in env:
            return cls(f"slurm-{env['SLURM_JOB_ID']}", restarts)
        # torchrun's run id is "none" unless one was chosen, so the launcher's pid tells jobs apart.
        return cls(f"local-{socket.gethostname()}-{os.getppid()}-{uuid.uuid4().hex[:6]}", restarts)


def visible_gpu_hint() -> str | None:
    """Return a reason to expect a GPU here, or None. Call it only if torch sees none."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return "this machine has an NVIDIA device"
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"):
        # A count of 0 means no GPU, but in a list of devices 0 is the first one.
        none = ("", "-1", "0") if name == "SLURM_GPUS_ON_NODE" else ("", "-1")
        if os.environ.get(name, "") not in none:
            return f"{name} is set to {os.environ[name]!r}"
    return None


def choose_device(name: str, local_rank: int) -> "tuple[torch.device, str | None]":
    """Return this rank's device, and a warning if ``auto`` chose the CPU although there is a GPU.

    Raises:
        ConfigError: ``cuda`` is not available, or a node has fewer GPUs than ranks.
    """
    import torch

    if name == "cpu":
        return torch.device("cpu"), None
    if not torch.cuda.is_available():
        versions = f"torch {torch.__version__}, built for CUDA {torch.version.cuda}"
        if name == "cuda":
            raise ConfigError(
                f"--device cuda: torch sees no GPU here ({versions}); install a CUDA build or give "
                "--device cpu"
            )
        hint = visible_gpu_hint()
        return torch.device("cpu"), hint and (
            f"WARNING: running on the CPU although {hint}: torch sees no GPU ({versions}). "
            "Give --device cuda to make this an error."
        )
    n_gpus = torch.cuda.device_count()
    if local_rank >= n_gpus:
        raise ConfigError(
            f"local rank {local_rank} has no GPU: this node has {n_gpus}; start at most that many "
            f"ranks a node (--nproc_per_node {n_gpus})"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank), None


@contextlib.contextmanager
def report_errors_from_rank_0(rank: int, *, only: bool = False) -> Iterator[None]:
    """Report an error that is common to all ranks once, from rank 0.

    With ``only`` the other ranks stay silent: any error is common to all, as that of a flag.
    """
    try:
        yield
    except ReportedError:
        raise
    except GradprojError as error:
        if rank == 0:
            raise
        # The launcher kills rank 0 as soon as another rank exits, and kills this sleep when rank 0
        # exits. An error of this rank alone is reported after the sleep.
        time.sleep(LET_RANK_0_SPEAK_S)
        if not only:
            print(f"gradproj: rank {rank}: {clean_lines(str(error))}", file=sys.stderr, flush=True)
        raise ReportedError from error
