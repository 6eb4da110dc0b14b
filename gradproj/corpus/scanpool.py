"""Scan many tars, in this process or in several."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from gradproj.corpus.tarscan import TarFacts, scan_tar
from gradproj.errors import CorpusError

_MOST_ERRORS = 20
# Starting a process takes as long as scanning this much.
_SMALL_BYTES = 256 * 2**20


def scan_tars(
    paths: Sequence[Path], sizes: Sequence[int], domain_field: str, processes: int | None, progress: bool
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
    work = [(path, domain_field) for path in paths]
    with ExitStack() as stack:
        bar = stack.enter_context(_bar(sum(sizes), progress))
        results: Iterator[TarFacts | CorpusError]
        if processes == 1 or len(paths) == 1:
            results = map(_scan, work)
        else:
            results = _in_processes(work, min(processes, len(paths)), stack)
        try:
            for size, result in zip(sizes, results, strict=True):
                bar.update(size)
                if isinstance(result, TarFacts):
                    facts.append(result)
                    continue
                errors.append(str(result))
                if len(errors) == _MOST_ERRORS:
                    errors.append("... and perhaps more: stopped here")
                    break
        except BrokenProcessPool as error:
            raise CorpusError(
                "a process that scanned tars was killed, most likely because memory ran out; index with fewer processes"
            ) from error
    if errors:
        raise CorpusError("\n".join(errors))
    return facts


def _scan(work: tuple[Path, str]) -> TarFacts | CorpusError:
    try:
        return scan_tar(*work)
    except CorpusError as error:
        return error


def _in_processes(
    work: list[tuple[Path, str]], processes: int, stack: ExitStack
) -> Iterator[TarFacts | CorpusError]:
    # Never fork: this process may have the threads of torch or zarr.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_leave_with_parent)
    stack.callback(pool.shutdown, cancel_futures=True)
    return pool.map(_scan, work)


def _leave_with_parent() -> None:
    """A pool's processes would otherwise wait for work for ever once the parent was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:

        def wait() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


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
