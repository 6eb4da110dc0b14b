"""Ranks without the seconds of their imports: a parent that has imported everything forks them.

Each rank is a process with its own pid and environment, and runs the real command to its real exit.
Only imported code is shared: the parent runs nothing, starts no thread, and does not import the
modules that note at import which process started them.
"""

import atexit
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.faults import before_each_change
from helpers.gate import hold_job, hold_training
from helpers.jobs import ENVIRONMENT, PATIENCE_S

from gradproj.coordinator import fault_points

SIGNALS = {"stop_at": signal.SIGTERM, "kill_at": signal.SIGKILL}


@dataclass
class FinishedProcess:
    """A process that has exited."""

    rank: int
    status: int
    """Exit code, or minus the signal's number."""
    steps: list[str]
    """Fault points that it reached, in order."""
    output: str
    """Standard output, and standard error if it was not asked for apart."""
    errors: str = ""
    """Standard error, if it was asked for apart."""


class _Parent:
    """The parent of all forked processes of a test run, in a session of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "helpers.forked_ranks"]
        environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, env=environment, stdin=pipe, stdout=pipe, text=True, start_new_session=True
        )
        self.pid, self._lock = self._process.pid, threading.Lock()

    def ask(self, request: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline()
        assert answer, "the parent of the ranks has died"
        return json.loads(answer)

    def end(self) -> None:
        for pid in children_in(self.pid):
            os.kill(pid, signal.SIGKILL)
        self._process.communicate()


@functools.cache
def shared_parent() -> _Parent:
    """Return the parent, which the first call starts."""
    parent = _Parent()
    atexit.register(parent.end)
    return parent


def children_in(session: int) -> list[int]:
    """Return the living processes of a session except its leader."""
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        with suppress(ProcessLookupError):
            if os.getsid(pid) == session != pid:
                found.append(pid)
    return found


class Ranks:
    """Starts ranks and waits for them. Leaving the context kills them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._running: dict[int, tuple[int, Path]] = {}

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *error: object) -> None:
        self.kill_all()

    def alive(self) -> list[int]:
        """Return the living processes of the parent's session except the parent."""
        return children_in(shared_parent().pid)

    def start(self, argv: list[str], rank: int = 0, **options: Any) -> int:
        """Start a process and return its pid.

        Args:
            argv: module and arguments, as after ``python -m``.
            rank: the number to report in ``FinishedProcess``.
            options: ``environment``: more variables; ``kill_at``: the fault point at which it kills
                itself (-9); ``stop_at``: the one at which it sends itself SIGTERM, once, before it
                looks for ``kill_at``; ``changes``: the path of a ``ChangeLog``; ``gate``: that
                of a ``Gate`` for the steps of a training run, ``job_gate`` for the batches of a
                job; ``folder``: the working directory; ``errors_apart``: keep standard error apart
                from standard output.
        """
        self._number += 1
        files = self._folder / str(self._number)
        pid = shared_parent().ask({"argv": argv, "files": str(files), **options})
        self._running[pid] = (rank, files)
        return pid

    def running(self) -> int:
        """Return the number of ranks that have not been waited for."""
        return len(self._running)

    def pids(self) -> list[int]:
        """Return the processes that have not been waited for; some may have exited."""
        return list(self._running)

    def wait_for_one(self) -> FinishedProcess:
        """Wait for the next rank to exit."""
        timer = threading.Timer(
            PATIENCE_S, lambda: [os.kill(pid, signal.SIGKILL) for pid in self._running]
        )
        timer.start()
        pid, status = shared_parent().ask({"wait": list(self._running)})
        timer.cancel()
        return self._finished(pid, status)

    def poll(self, pid: int) -> FinishedProcess | None:
        """Return a rank if it has exited, without waiting for it."""
        answer = shared_parent().ask({"poll": [pid]})
        return None if answer is None else self._finished(*answer)

    def _finished(self, pid: int, status: int) -> FinishedProcess:
        rank, files = self._running.pop(pid)
        output, errors, steps = (
            path.read_text() if path.exists() else ""
            for path in map(files.with_suffix, (".out", ".err", ".steps"))
        )
        code = os.waitstatus_to_exitcode(status)
        return FinishedProcess(rank, code, steps.splitlines(), output, errors)

    def wait_for_all(self) -> list[FinishedProcess]:
        """Wait for every rank; in the order of their exits."""
        return [self.wait_for_one() for _ in list(self._running)]

    def kill_all(self) -> list[FinishedProcess]:
        """Kill every rank (-9) and wait for it."""
        for pid in self._running:
            os.kill(pid, signal.SIGKILL)  # not reaped yet, so the pid is still its own
        return self.wait_for_all()


class ForkedProcess:
    """A forked process with the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, argv: list[str], **options: Any) -> None:
        """Run ``python -m ARGV`` in the working directory; ``options`` of ``Ranks.start``."""
        self._folder = tempfile.TemporaryDirectory()
        self._ranks = Ranks(Path(self._folder.name))
        self._done: FinishedProcess | None = None
        self.pid = self._ranks.start(argv, folder=os.getcwd(), errors_apart=True, **options)

    @property
    def returncode(self) -> int | None:
        return None if self._done is None else self._done.status

    def poll(self) -> int | None:
        if self._done is None:
            self._done = self._ranks.poll(self.pid)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float = PATIENCE_S) -> int:
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.01)
        return code

    def communicate(self, timeout: float = PATIENCE_S) -> tuple[str, str]:
        """Wait for the end and return standard output and error."""
        self.wait(timeout)
        assert self._done is not None
        return self._done.output, self._done.errors


def run_forked(argv: list[str], ranks: int = 1) -> subprocess.CompletedProcess:
    """Run ``python -m ARGV`` in the working directory, to its end.

    Several ranks have the environment that torchrun gives them. Their output comes in the order of
    ranks; the exit code is the first that is not 0.
    """
    started = [ForkedProcess(argv, environment=each) for each in environments(ranks)]
    output, errors = map("".join, zip(*(each.communicate() for each in started), strict=True))
    code = next((each.returncode for each in started if each.returncode), 0)
    return subprocess.CompletedProcess(argv, code, output, errors)


def environments(ranks: int) -> list[dict[str, str]]:
    """Return the variables that torchrun gives its ranks; none to a process alone."""
    if ranks == 1:
        return [{}]
    sizes = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), **sizes}
    return [meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def call_as_two_ranks(function: Callable[..., None], *args: Any) -> None:
    """Call ``function(rank, *args)`` in two processes, and raise the error of one that fails."""
    import torch  # not at the top: the parent of the ranks imports this module first

    # Its server imports these once; the processes are forked from it.
    multiprocessing.set_forkserver_preload(["torch", "helpers.models", "gradproj.text.ranking"])
    torch.multiprocessing.start_processes(function, args, nprocs=2, start_method="forkserver")


# --- the parent ---


def serve() -> None:
    """Fork on request until standard input is closed. The forked process runs its command."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            while (answer := first_exited(request["wait"])) is None:
                time.sleep(0.002)
        elif "poll" in request:
            answer = first_exited(request["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                answers.close()
                become(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def first_exited(pids: list[int]) -> tuple[int, int] | None:
    """Return pid and status of a child that has exited, if there is one."""
    waited = (os.waitpid(pid, os.WNOHANG) for pid in pids)
    return next((each for each in waited if each[0]), None)


def become(request: dict[str, Any]) -> None:
    """Run a request in the forked process."""
    files = Path(request["files"])
    errors = files.with_suffix(".err" if request.get("errors_apart") else ".out")
    for number, path in enumerate((os.devnull, files.with_suffix(".out"), errors)):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(request.get("folder", "."))
    os.environ.update(request.get("environment", {}))
    listen(os.open(files.with_suffix(".steps"), os.O_WRONLY | os.O_CREAT, 0o600), request)
    module, *sys.argv[1:] = request["argv"]
    if request.get("gate"):
        hold_training(Path(request["gate"]))
    if request.get("job_gate"):
        hold_job(Path(request["job_gate"]) / "any file")
    with ExitStack() as stack:
        if "changes" in request:
            stack.enter_context(before_each_change(ChangeLog(Path(request["changes"]))))
        code = __import__(module, fromlist=["main"]).main()
        if module == "gradproj.run":  # as it does itself
            from gradproj.job.shutdown import leave

            leave(code)
        sys.exit(code)


def listen(log: int, request: dict[str, Any]) -> None:
    """Log each fault point, and send the requested signals."""
    to_come = [(request[name], number) for name, number in SIGNALS.items() if name in request]

    def at(step: str) -> None:
        os.write(log, f"{step}\n".encode())
        if to_come and to_come[0][0] == step:
            os.kill(os.getpid(), to_come.pop(0)[1])

    fault_points.reach = at


class ChangeLog:
    """Writes a line of JSON for each fsync (``flush``) and each link or rename (``publish``).

    ``[thread, kind, old name, new name, {file by its old name: hash of its content}]``
    """

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def __call__(self, name: str, args: tuple) -> None:
        if name == "fsync":
            path = os.readlink(f"/proc/self/fd/{args[0]}")
            self._note("flush", path, path, self._sums(Path(path)) if os.path.isfile(path) else {})
        elif name in ("link", "rename", "replace") and os.path.exists(args[0]):
            self._note("publish", str(args[0]), str(args[1]), self._sums(Path(args[0])))

    def _sums(self, path: Path) -> dict[str, str]:
        files = (
            [path] if path.is_file() else [found for found in path.rglob("*") if found.is_file()]
        )
        return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def _note(self, *entry: object) -> None:
        os.write(self._file, (json.dumps([threading.get_ident(), *entry]) + "\n").encode())


def import_everything() -> None:
    """Import everything that a rank needs, except modules that note their parent process."""
    import transformers.models.llama.modeling_llama

    import gradproj.coordinator.progress
    import gradproj.distributed
    import gradproj.job.config
    import gradproj.job.plan
    import gradproj.job.summary
    import gradproj.job.unit_projector
    import gradproj.maintenance.merge

    assert gradproj
    assert transformers
    assert "gradproj.job.shutdown" not in sys.modules
    assert len(os.listdir("/proc/self/task")) == 1, "a thread would be lost in the forked processes"
    gc.freeze()  # collecting shared objects at every exit would touch, and so copy, all their pages


if __name__ == "__main__":
    import_everything()
    serve()
