"""Scan many tars, in this process or in several."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict

from tqdm import tqdm

from gradproj.corpus.tar.scan import TarFacts, scan_tar
from gradproj.errors import CorpusError
from gradproj.storage.address import Address, Location, parse_location
from gradproj.storage.facts import ObjectFacts

_MAX_ERRORS = 20
# Starting a process takes as long as scanning this much.
_SMALL_BYTES = 256 * 2**20
_WORKER = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from gradproj.corpus.tar.scan_pool import run_worker; run_worker()"
)


def scan_tars(
    paths: Sequence[Location],
    versions: Sequence[ObjectFacts],
    domain_field: str,
    processes: int | None,
    progress: bool,
    done: Callable[[int, TarFacts], object] = lambda number, facts: None,
) -> list[TarFacts]:
    """Scan tars; the facts are in the order of ``paths``.

    ``versions`` are the tars' sizes and what else tells one version of a remote tar from another.
    ``done`` is called with each tar's number and facts, in this order. ``processes`` is
    the number of worker processes; None for one per CPU, or none if there is little to read.

    Raises:
        CorpusError: tars are damaged (lists up to 20), or a worker process died.
    """
    sizes = [version.size_bytes for version in versions]
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
            results = (
                _scan(path, version, domain_field)
                for path, version in zip(paths, versions, strict=True)
            )
        else:
            results = _in_processes(
                paths, versions, domain_field, min(processes, len(paths)), stack
            )
        # Results end early only behind an error, when a worker has died.
        for size, result in zip(sizes, results, strict=False):
            bar.update(size)
            if isinstance(result, TarFacts):
                done(len(facts) + len(errors), result)
                facts.append(result)
                continue
            errors.append(result)
            if len(errors) == _MAX_ERRORS:
                errors.append("... and perhaps more: stopped here")
                break
    if errors:
        raise CorpusError("\n".join(errors))
    assert len(facts) == len(paths), f"{len(facts)} of {len(paths)} tars were scanned"
    return facts


def run_worker() -> None:
    """Run a worker: read all its tars' paths from standard input, print one JSON line per tar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    domain_field, *tars = json.load(sys.stdin.buffer)
    for path, anonymous, version in tars:
        result = _scan(parse_location(path, anonymous), ObjectFacts(**version), domain_field)
        line = json.dumps(asdict(result) if isinstance(result, TarFacts) else result)
        try:
            print(line, flush=True)
        except BrokenPipeError:
            os._exit(1)  # the parent is gone, however it ended


def _scan(path: Location, version: ObjectFacts, domain_field: str) -> TarFacts | str:
    """Return the facts, or the error message of a damaged tar."""
    try:
        return scan_tar(path, domain_field, version)
    except CorpusError as error:
        return str(error)


def _in_processes(
    paths: Sequence[Location],
    versions: Sequence[ObjectFacts],
    domain_field: str,
    n_processes: int,
    stack: ExitStack,
) -> Iterator[TarFacts | str]:
    """Scan in worker processes that ``stack`` ends.

    Each tar goes to the worker with the fewest bytes so far. Results are read in the order of
    ``paths``; a worker that is ahead waits at its full pipe, so memory stays bounded.
    """
    # Not concurrent.futures.ProcessPoolExecutor, neither with fork nor with spawn or forkserver:
    # - a fork copies locks that threads of torch or zarr hold at that moment;
    # - the other two import the caller's main module in every worker: seconds where that is the
    #   job, and an error for a script without `if __name__ == "__main__"`;
    # - its workers outlive a parent that is killed, since each holds both ends of the task queue;
    # - BrokenProcessPool names neither the tar nor the exit code of the worker that died.
    command = [sys.executable, "-c", _WORKER, json.dumps(sys.path)]
    workers = []
    for _ in range(n_processes):
        workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        stack.callback(_end, workers[-1])
    n_bytes = [0] * n_processes
    worker_of = []
    for version in versions:
        worker_of.append(n_bytes.index(min(n_bytes)))
        n_bytes[worker_of[-1]] += version.size_bytes
    for number, worker in enumerate(workers):
        assert worker.stdin is not None
        tars = [
            (str(path), isinstance(path, Address) and path.anonymous, asdict(version))
            for path, version, at in zip(paths, versions, worker_of, strict=True)
            if at == number
        ]
        with suppress(BrokenPipeError), worker.stdin as stdin:
            stdin.write(json.dumps([domain_field, *tars]).encode())
    for path, number in zip(paths, worker_of, strict=True):
        stdout = workers[number].stdout
        assert stdout is not None
        line = stdout.readline()
        if not line.endswith(b"\n"):
            yield (
                f"{path}: the process that scanned it ended "
                f"(exit code {workers[number].wait()}); was it out of memory?"
            )
            return
        result = json.loads(line)
        yield TarFacts(**result) if isinstance(result, dict) else str(result)


def _end(worker: subprocess.Popen[bytes]) -> None:
    worker.terminate()
    with worker:  # closes its pipes and waits
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
