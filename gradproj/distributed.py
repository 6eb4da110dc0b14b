"""This process's rank, world size, device and job, read from the environment.

The job's ranks meet at its start only, where rank 0 checks while the others wait. Its loop has no
collective, so an uneven rank cannot make another time out.
"""

import contextlib
import os
import pickle
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradproj.errors import ConfigError, GradprojError, ReportedError
from gradproj.formatting import clean_lines

if TYPE_CHECKING:
    import torch

# torch is imported where it is used: signals must be handled before the seconds that it takes.
START_TIMEOUT = timedelta(hours=6)
"""Rank 0 holds the rendezvous store itself under some launchers, and may be late."""
LET_RANK_0_SPEAK_S = 10.0
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe")
"""Words of gloo's errors (in lower case) when another rank has exited."""
LOOK_S = (0.01, 0.5)  # first and longest pause between two checks of another rank


def launcher_rank() -> int | None:
    """Return the rank that a launcher gave this process. None without a launcher."""
    rank = os.environ.get("RANK", "")
    return int(rank) if rank.isdigit() else None


def launcher_died() -> bool:
    """Return whether torchrun's rendezvous store, held by its agent, refuses connections."""
    env = os.environ
    if env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    try:
        socket.create_connection((env["MASTER_ADDR"], int(env["MASTER_PORT"]))).close()
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


def has_process_group() -> bool:
    import torch.distributed as torch_dist

    return torch_dist.is_available() and torch_dist.is_initialized()


@dataclass(frozen=True)
class World:
    """The processes of a ``torch.distributed`` group, and this process's place among them.

    Every method but ``current`` is collective: all ranks call it, in the same order. A single
    process gets back what it gave. Nothing in the job's loop uses it.
    """

    rank: int = 0
    size: int = 1
    group: Any = None
    """A ``ProcessGroup``; None for the default one."""

    @classmethod
    def current(cls, group: Any = None) -> "World":
        """Return the ranks of the initialised process group, or one process without it."""
        import torch.distributed as torch_dist

        if not has_process_group():
            return cls()
        return cls(torch_dist.get_rank(group), torch_dist.get_world_size(group), group)

    def sum(self, tensor: "torch.Tensor") -> "torch.Tensor":
        """Return the sum of every rank's tensor, on this one's device."""
        import torch
        import torch.distributed as torch_dist

        if self.size == 1:
            return tensor
        device = torch.device("cuda" if torch_dist.get_backend(self.group) == "nccl" else "cpu")
        summed = tensor.to(device, copy=True)
        torch_dist.all_reduce(summed, group=self.group)
        return summed.to(tensor.device)

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of the ranks."""
        import torch.distributed as torch_dist

        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        torch_dist.all_gather_object(values, value, group=self.group)
        return values

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""
        import torch.distributed as torch_dist

        if self.size == 1:
            return value
        first = 0 if self.group is None else torch_dist.get_global_rank(self.group, 0)
        values = [value]
        torch_dist.broadcast_object_list(values, src=first, group=self.group)
        return values[0]

    def barrier(self) -> None:
        import torch.distributed as torch_dist

        if self.size > 1:
            torch_dist.barrier(self.group)


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


class Rendezvous:
    """Exchanges values between the ranks of one start, through the store of torchrun or of rank 0.

    There is no process group: a rank inside gloo handles no signal while it waits for a dead one.
    These waits are Python's. The store outlives a restart of the ranks, with all that the earlier
    ones wrote, so rank 0 chooses an unused prefix and sends it to each rank by its name.
    """

    def __init__(self, process: Process) -> None:
        import torch.distributed as torch_dist

        self._process, self._n_values = process, 0
        place = (process.rank, process.world_size)
        self._whole = next(torch_dist.rendezvous("env://", *place, timeout=START_TIMEOUT))[0]
        self._store = torch_dist.PrefixStore(self._agree_on_prefix(uuid.uuid4().hex), self._whole)

    def _agree_on_prefix(self, name: str) -> str:
        store, rank = self._whole, self._process.rank
        if rank:
            store.set(f"here/{rank}", name)
            self._until(lambda: store.check([f"welcome/{name}"]))
            prefix = store.get(f"welcome/{name}").decode()
            store.set(f"{prefix}/here/{rank}", name)
            return prefix
        missing = set(range(1, self._process.world_size))

        def all_are_here() -> bool:
            for other in sorted(missing):
                if store.check([f"{name}/here/{other}"]):
                    missing.discard(other)
                elif store.check([f"here/{other}"]):
                    # It may have died; its successor then announces another name.
                    store.set(f"welcome/{store.get(f'here/{other}').decode()}", name)
            return not missing

        self._until(all_are_here)
        return name

    def from_rank_0(self, value: Any) -> Any:
        """Return rank 0's value once it is set. It travels as a pickle."""
        key, self._n_values = f"value/{self._n_values}", self._n_values + 1
        if self._process.rank == 0:
            self._store.set(key, pickle.dumps(value))  # type: ignore[arg-type]  # takes bytes too
            return value
        self._until(lambda: self._store.check([key]))
        return pickle.loads(self._store.get(key))

    def wait_for_all(self, place: str) -> None:
        """Return when every rank has reached this place."""
        self._store.add(place, 1)
        self._until(lambda: self._store.add(place, 0) >= self._process.world_size)

    def leave(self) -> None:
        """Leave; rank 0 leaves last, since it may hold the store."""
        self._store.add("left", 1)
        if self._process.rank == 0:
            self._until(lambda: self._store.add("left", 0) >= self._process.world_size)

    def _until(self, condition: Callable[[], bool]) -> None:
        pause_s = LOOK_S[0]
        try:
            while not condition():
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, LOOK_S[1])
        except RuntimeError as error:
            # The process that held the store has left, and has reported why.
            raise ReportedError from error


_rendezvous: Rendezvous | None = None


@contextlib.contextmanager
def start_group(process: Process) -> Iterator[None]:
    """Open the ranks' rendezvous for the job's start. A single process has none."""
    global _rendezvous
    if process.world_size > 1:
        _rendezvous = Rendezvous(process)
    yield
    if _rendezvous is not None:
        _rendezvous.leave()
        _rendezvous = None


def from_rank_0(value: Any) -> Any:
    """Return rank 0's value on every rank."""
    return value if _rendezvous is None else _rendezvous.from_rank_0(value)


def wait_for_all(place: str) -> None:
    """Return when every rank has called it for this place."""
    if _rendezvous is not None:
        _rendezvous.wait_for_all(place)


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


@contextlib.contextmanager
def process_group(
    process: Process, backend: str = "gloo", timeout: timedelta = START_TIMEOUT
) -> Iterator[World]:
    """Initialise ``torch.distributed`` among the ranks that a launcher started."""
    import torch.distributed as torch_dist

    if process.world_size == 1:
        yield World()
        return
    torch_dist.init_process_group(backend, timeout=timeout)
    try:
        yield World(process.rank, process.world_size)
    except RuntimeError as error:
        message = str(error).lower()
        if "gloo" not in message or not any(words in message for words in LOST_PEER):
            raise
        # A rank that this one waited for has exited; it, or the launcher, reports why. Nobody
        # else reports a timeout or a collective that failed.
        raise ReportedError from error
    # Not after an error: the other ranks may be in a collective that this call would wait for.
    torch_dist.destroy_process_group()
