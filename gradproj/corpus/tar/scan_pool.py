"""Scan many tars, in this process or in several."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue

from tqdm import tqdm

from gradproj.corpus.tar.scan import TarFacts, scan_tar
from gradproj.errors import CorpusError

_MOST_ERRORS = 20
# Starting a process takes as long as scanning this much.
_SMALL_BYTES = 256 * 2**20
_WORKER = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from gradproj.corpus.tar.scan_pool import work; work()"


def scan_tars(
    paths: Sequence[Path],
    sizes: Sequence[int],
    domain_field: str,
    processes: int | None,
    progress: bool,
) -> list[TarFacts]:
    """Scan every tar; the facts are in the order of ``paths``, whatever the number of processes.

    Raises:
        CorpusError: names every damaged tar, up to 20.
    """
    if processes is None:
        processes = 1 if sum(sizes) < _SMALL_BYTES else len(os.sched_getaffinity(0))
    if processes < 1:
        raise CorpusError(f"an index needs at least 1 process, got {processes}")
    facts: list[TarFacts] = []
    errors: list[str] = []
    with ExitStack() as stack:
        bar = stack.enter_context(_bar(sum(sizes), progress))
        results: Iterator[TarFacts | str]
        if processes == 1 or len(paths) == 1:
            results = (_scan(path, domain_field) for path in paths)
        else:
            results = _in_processes(paths, domain_field, min(processes, len(paths)), stack)
        for size, result in zip(sizes, results, strict=True):
            bar.update(size)
            if isinstance(result, TarFacts):
                facts.append(result)
                continue
            errors.append(result)
            if len(errors) == _MOST_ERRORS:
                errors.append("... and perhaps more: stopped here")
                break
    if errors:
        raise CorpusError("\n".join(errors))
    return facts


def work() -> None:
    """A worker's life: a tar's path on each line of its input, what was found on each line of its output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    for line in sys.stdin.buffer:
        path, domain_field = json.loads(line)
        found = _scan(Path(path), domain_field)
        print(json.dumps(asdict(found) if isinstance(found, TarFacts) else found), flush=True)


def _scan(path: Path, domain_field: str) -> TarFacts | str:
    """The facts, or in words why there are none."""
    try:
        return scan_tar(path, domain_field)
    except CorpusError as error:
        return str(error)


def _in_processes(
    paths: Sequence[Path], domain_field: str, processes: int, stack: ExitStack
) -> Iterator[TarFacts | str]:
    """The same in worker processes, each fed by a thread of this one.

    They are programs of their own, not multiprocessing's: a fork would copy the threads of torch or zarr, and a spawned
    process imports the main program again, which takes seconds where that is the job. Their input ends with this
    process, however it ends, and so do they.
    """
    command = [sys.executable, "-c", _WORKER, json.dumps(sys.path)]
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
    for _ in range(processes):
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        stack.callback(_end, worker)
        idle.put(worker)

    def ask(path: Path) -> TarFacts | str:
        worker = idle.get()
        try:
            return _ask(worker, path, domain_field)
        finally:
            idle.put(worker)

    threads = ThreadPoolExecutor(processes)
    stack.callback(threads.shutdown, cancel_futures=True)
    return threads.map(ask, paths)


def _ask(worker: subprocess.Popen[bytes], path: Path, domain_field: str) -> TarFacts | str:
    assert worker.stdin is not None
    assert worker.stdout is not None
    answer = b""
    try:
        worker.stdin.write(json.dumps([str(path), domain_field]).encode() + b"\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
    except BrokenPipeError:
        pass
    if not answer.endswith(b"\n"):
        return f"{path}: the process that scanned it ended (exit code {worker.wait()}); was it out of memory?"
    found = json.loads(answer)
    return TarFacts(**found) if isinstance(found, dict) else str(found)


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    # Closes its pipes and waits; what was not yet sent to one that is gone cannot be sent now.
    with suppress(BrokenPipeError), worker:
        pass


def _bar(n_bytes: int, progress: bool) -> tqdm:
    return tqdm(
        total=n_bytes,
        desc="indexing tars",
        unit="B",
        unit_scale=True,
        file=sys.stderr,
        disable=not progress,
        delay=1.0,
        mininterval=0.2 if sys.stderr.isatty() else 10.0,
    )
