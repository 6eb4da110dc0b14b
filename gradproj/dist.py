"""Who this process is: rank, world size, device, job. The only reader of the launcher's environment.

The process group is gloo on every device and serves the start only (rank 0 checks while the others
wait): nothing in the job's loop is collective, so an uneven rank can never make another time out.
"""

from __future__ import annotations

import contextlib
import os
import socket
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradproj.errors import ConfigError

if TYPE_CHECKING:
    import torch

# torch is imported where it is used: who started this process must be known before the seconds that it takes.

DEVICES = ("auto", "cpu", "cuda")
START_TIMEOUT = timedelta(hours=6)
"""Rank 0 may build an index and download a model while the others wait."""


def launcher_rank() -> int | None:
    """The rank that a launcher gave this process; None where none did."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdigit() else None


def launcher_died() -> bool:
    """Whether torchrun, which holds the store that its ranks meet at, does not answer there any more."""
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"]))).close()
    except ConnectionRefusedError:
        return True
    except OSError:
        return False  # of a network that does not work nothing is known
    return False


@dataclass(frozen=True)
class Process:
    """This process's place in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launched: bool = False
    """Started by torchrun or the like, whose end is this process's end too."""

    @classmethod
    def from_environment(cls) -> Process:
        """From torchrun's variables; a process without them is rank 0 of 1.

        Raises:
            ConfigError: some of the variables are set and others are not.
        """
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        values = [os.environ.get(name) for name in names]
        if values[0] is None and values[1] is None:
            return cls(0, 1, 0, 1)
        missing = [name for name, value in zip(names, values, strict=True) if value is None]
        if missing:
            raise ConfigError(
                f"the launcher set RANK or WORLD_SIZE but not {', '.join(missing)}: start the job by torchrun"
            )
        rank, world_size, local_rank, local_world_size = (int(value) for value in values if value is not None)
        return cls(rank, world_size, local_rank, local_world_size, launched=True)


@dataclass(frozen=True)
class JobName:
    """Which job this is and which start of it: the same on all ranks."""

    job_id: str
    generation: int
    """How often the job has been started before, by torchrun or by Slurm."""

    @classmethod
    def from_environment(cls) -> JobName:
        """Slurm's job id (an array's element has its own), else torchrun's run id, else a new name."""
        env = os.environ
        restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0)) + 1000 * int(
            env.get("SLURM_RESTART_COUNT", 0)
        )
        if "SLURM_ARRAY_JOB_ID" in env:
            return cls(f"slurm-{env['SLURM_ARRAY_JOB_ID']}_{env.get('SLURM_ARRAY_TASK_ID', '0')}", restarts)
        if "SLURM_JOB_ID" in env:
            return cls(f"slurm-{env['SLURM_JOB_ID']}", restarts)
        # torchrun's run id is "none" unless it was chosen, so the launcher's process tells jobs apart.
        return cls(f"local-{socket.gethostname()}-{os.getppid()}-{uuid.uuid4().hex[:6]}", restarts)


def visible_gpu_hint() -> str | None:
    """Why one would expect a GPU here, or None; asked only where torch sees none."""
    if any(Path("/dev").glob("nvidia[0-9]*")):
        return "this machine has an NVIDIA device"
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"):
        if os.environ.get(name) not in (None, "", "-1", "0" if name == "SLURM_GPUS_ON_NODE" else ""):
            return f"{name} is set to {os.environ[name]!r}"
    return None


def choose_device(name: str, local_rank: int) -> tuple[torch.device, str | None]:
    """The device of this rank, and a warning where ``auto`` had to take the CPU beside a GPU.

    Raises:
        ConfigError: CUDA was asked for and is not there, or a node has fewer GPUs than ranks.
    """
    import torch

    available = torch.cuda.is_available()
    if name == "cpu":
        return torch.device("cpu"), None
    if not available:
        if name == "cuda":
            raise ConfigError(
                "--device cuda: torch sees no GPU here (torch "
                f"{torch.__version__}, built for CUDA {torch.version.cuda}); "
                "install a CUDA build or give --device cpu"
            )
        hint = visible_gpu_hint()
        return torch.device("cpu"), None if hint is None else (
            f"WARNING: running on the CPU although {hint}: torch {torch.__version__} (CUDA "
            f"{torch.version.cuda}) sees no GPU. Give --device cuda to make this an error."
        )
    if local_rank >= torch.cuda.device_count():
        raise ConfigError(
            f"local rank {local_rank} has no GPU of its own: this node shows {torch.cuda.device_count()}; "
            f"start at most so many ranks a node (--nproc_per_node {torch.cuda.device_count()})"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank), None


@contextlib.contextmanager
def start_group(process: Process) -> Iterator[None]:
    """The process group for the job's start; a single process has none."""
    import torch.distributed as torch_dist

    if process.world_size > 1:
        torch_dist.init_process_group("gloo", timeout=START_TIMEOUT)
    try:
        yield
    finally:
        if torch_dist.is_initialized():
            torch_dist.destroy_process_group()


def from_rank_0(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    import torch.distributed as torch_dist

    if not torch_dist.is_initialized():
        return value
    box = [value]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def wait_for_all() -> None:
    """Return when every rank has come here."""
    import torch.distributed as torch_dist

    if torch_dist.is_initialized():
        torch_dist.barrier()
