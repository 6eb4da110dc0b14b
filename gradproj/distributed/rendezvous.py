"""The ranks' meeting at the start of a job, a training run or a query.

All waits are Python's, so that signals are handled while a rank waits: torch's own rendezvous waits
for hours inside C++ for a rank that never comes, deaf to SIGTERM and Ctrl-C.
"""

import contextlib
import gc
import pickle
import socket
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from gradproj.distributed.process import Process, store_address
from gradproj.distributed.world import World
from gradproj.errors import ConfigError, Ended, RanksError, ReportedError
from gradproj.formatting import human_seconds

COME_S = 1800.0
"""Longest wait for a rank to start. torchrun starts a node's ranks together; imports take time."""
WORK_S = 6 * 3600.0
"""Longest wait for a rank that has come, and checks the job or downloads the model."""
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
REPORT_AFTER_S = 10.0
"""Time after which a rank reports for whom it waits. It doubles with each report."""
LOOK_S = (0.01, 0.5)  # first and longest pause between two checks of another rank
REPLY_TIMEOUT = timedelta(minutes=5)
LOST_PEER = ("connection closed by peer", "connection reset by peer", "broken pipe")
"""Words of gloo's errors (in lower case) when another rank has exited."""


class Rendezvous:
    """Exchanges values between the ranks of one start, through the store of torchrun or of rank 0.

    There is no process group: a rank inside gloo handles no signal while it waits for a dead one.
    The store outlives a restart of the ranks, with all that the earlier ones wrote, so rank 0
    chooses an unused prefix and sends it to each rank by its name. A single process needs no store.
    """

    def __init__(self, process: Process) -> None:
        self._process, self._n_values = process, 0
        self.store: Any = None
        if process.world_size > 1:
            import torch.distributed as torch_dist

            with self._needs_store():
                self._whole = self._connect()
                prefix = self._agree_on_prefix(uuid.uuid4().hex)
                self.store = torch_dist.PrefixStore(prefix, self._whole)

    def __enter__(self) -> "Rendezvous":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        """Leave; rank 0 leaves last, since it may hold the store."""
        if kind is None and self.store is not None:
            with self._needs_store():
                self.store.add("left", 1)
                if self._process.rank == 0:
                    self._wait_for_count("left", "to leave the start")

    def from_rank_0(self, value: Any = None) -> Any:
        """Return rank 0's value once it is set. It travels as a pickle."""
        if self.store is None:
            return value
        key, self._n_values = f"value/{self._n_values}", self._n_values + 1
        if self._process.rank == 0:
            content = pickle.dumps(value)
            with self._needs_store():
                self.store.set(key, content)
            return value
        with self._needs_store():
            self._until(lambda: self.store.check([key]), lambda: "rank 0's checks", WORK_S)
            content = self.store.get(key)
        return pickle.loads(content)

    def wait_for_all(self, place: str) -> None:
        """Return when every rank has reached this place."""
        if self.store is not None:
            with self._needs_store():
                self.store.add(place, 1)
                self._wait_for_count(place, f"to reach: {place}")

    @contextlib.contextmanager
    def _needs_store(self) -> Iterator[None]:
        """Every request to the store is made in here. One line tells of a launcher that died.

        Raises:
            Ended: torchrun held the store, and has died: it was killed, or its machine is lost.
            ReportedError: rank 0 held it, and has ended; it has reported why.
        """
        try:
            yield
        except RuntimeError as error:
            host, port, of_launcher = store_address()
            if not of_launcher:
                raise ReportedError from error
            where = f"the launcher, torchrun, no longer answers at {host}:{port}"
            line = f"{where}: start the job again, which continues"
            raise Ended(line if self._process.local_rank == 0 else "") from error

    def _wait_for_count(self, key: str, action: str) -> None:
        size = self._process.world_size

        def waited_for() -> str:
            return f"{size - self.store.add(key, 0)} of {size} ranks {action}"

        self._until(lambda: self.store.add(key, 0) >= size, waited_for, WORK_S)

    def _connect(self) -> Any:
        """Open the store; if this rank does not hold it, wait until somebody does."""
        import torch.distributed as torch_dist

        (host, port, of_launcher), process = store_address(), self._process
        if process.rank == 0 and not of_launcher:
            try:
                return torch_dist.TCPStore(
                    host, port, process.world_size, True, REPLY_TIMEOUT, False, multi_tenant=True
                )
            except RuntimeError as error:
                raise ConfigError(
                    f"rank 0 cannot listen at {host}:{port} (MASTER_ADDR, MASTER_PORT): "
                    f"{str(error).splitlines()[0]}. Name this machine and a free port"
                ) from error
        refusals = ["none yet"]

        def is_open() -> bool:
            try:
                socket.create_connection((host, port), timeout=REPORT_AFTER_S).close()
            except OSError as error:
                refusals.append(str(error))
                return False
            return True

        self._until(
            is_open,
            lambda: f"rank 0, which does not answer at {host}:{port} ({refusals[-1]})",
            COME_S,
            reports=True,
        )
        return torch_dist.TCPStore(host, port, process.world_size, False, REPLY_TIMEOUT, False)

    def _agree_on_prefix(self, name: str) -> str:
        store, rank, size = self._whole, self._process.rank, self._process.world_size
        if rank:
            store.set(f"here/{rank}", name)
            self._until(
                lambda: store.check([f"welcome/{name}"]),
                lambda: "rank 0, or ranks that it waits for, to start",
                COME_S,
            )
            prefix = store.get(f"welcome/{name}").decode()
            store.set(f"{prefix}/here/{rank}", name)
            return prefix
        missing = set(range(1, size))

        def all_are_here() -> bool:
            for other in sorted(missing):
                if store.check([f"{name}/here/{other}"]):
                    missing.discard(other)
                elif store.check([f"here/{other}"]):
                    # It may have died; its successor then announces another name.
                    store.set(f"welcome/{store.get(f'here/{other}').decode()}", name)
            return not missing

        def waited_for() -> str:
            few = ", ".join(map(str, sorted(missing)[:8]))
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            return f"rank {few}{more} of {size} to start"

        self._until(all_are_here, waited_for, COME_S)
        return name

    def _until(
        self,
        condition: Callable[[], bool],
        waited_for: Callable[[], str],
        limit_s: float,
        *,
        reports: bool = False,
    ) -> None:
        """Wait for a condition. Rank 0, or a rank that ``reports``, prints for whom it waits.

        Raises:
            RanksError: the condition does not hold after ``limit_s``.
        """
        rank, pause_s, report_s = self._process.rank, LOOK_S[0], REPORT_AFTER_S
        started = time.monotonic()
        while not condition():
            waited_s = time.monotonic() - started
            waits = f"rank {rank} has waited {human_seconds(waited_s)} for"
            if waited_s > limit_s:
                raise RanksError(f"{waits} {waited_for()}; start all ranks again")
            if waited_s > report_s:
                report_s = 2 * waited_s
                if rank == 0 or reports:
                    line = f"{waits} {waited_for()}; it gives up after {human_seconds(limit_s)}"
                    print(f"gradproj: {line}", file=sys.stderr, flush=True)
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LOOK_S[1])


@contextlib.contextmanager
def process_group(
    process: Process, backend: str = "gloo", timeout: timedelta = COLLECTIVE_TIMEOUT
) -> Iterator[World]:
    """Initialise ``torch.distributed`` among the ranks that a launcher started.

    Raises:
        RanksError: another rank did not start, or did not answer within ``timeout``.
    """
    import torch.distributed as torch_dist

    if process.world_size == 1:
        yield World()
        return
    rank, size = process.rank, process.world_size
    store = Rendezvous(process).store
    torch_dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield World(rank, size)
    except RuntimeError as error:
        message = str(error).lower()
        if "gloo" in message and any(words in message for words in LOST_PEER):
            # A rank that this one waited for has exited; it, or the launcher, reports why.
            raise ReportedError from error
        if "gloo" in message and "timed out waiting" in message:
            raise RanksError(
                f"rank {rank} has waited {human_seconds(timeout.total_seconds())} for another "
                f"rank, which hangs or whose machine is lost ({error}); start all ranks again"
            ) from error
        raise
    # A DistributedDataParallel wrapper in a cycle of references would end the group later, while it
    # holds the interpreter's lock, for which gloo's thread may be waiting: a rank that never ends.
    gc.collect()
    # Not after an error: the other ranks may be in a collective that this call would wait for.
    torch_dist.destroy_process_group()
