"""The text index of a store: its documents' token ids, and document frequencies of their n-grams.

Both are made from the tars by ``gradproj text``, or by the first query that needs them, and kept
in ``OUTPUT/text``.
"""

import io
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from gradproj.errors import StoreError
from gradproj.files import explain_os_errors
from gradproj.formatting import shown
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.storage.contents import locked, map_array, sum_of
from gradproj.storage.folders import delete_tree
from gradproj.storage.publish import replace
from gradproj.storage.results import load_array
from gradproj.store import ProjectionStore
from gradproj.text.frequencies import FrequencySketch, n_counters
from gradproj.text.ngrams import thread_pool
from gradproj.text.token_files import TokenFiles, make_token_files

MAX_SKETCH_BYTES = 2**31
FACTS_NAME, SKETCH_NAME = "text.json", "document_frequencies.npy"
SAVE_EVERY_S = 600.0


@dataclass(frozen=True)
class TextFacts:
    """The content of ``text.json``, which is written last."""

    n_documents: int
    """Documents with at least one n-gram."""
    n_tokens: int
    sketch: dict[str, int]
    """``{"bytes", "crc32c"}`` of the sketch's file."""


@dataclass(frozen=True)
class TextIndex:
    """Tokens and document frequencies of a store's documents."""

    files: TokenFiles
    frequencies: FrequencySketch
    """Mapped from its file."""
    facts: TextFacts


def open_text_index(store: ProjectionStore, check_sum: bool = False) -> TextIndex | None:
    """Return the index of a store, or None if it was not made yet or not to its end.

    Args:
        store: of the job.
        check_sum: also read all document frequencies for their checksum, up to 2 GiB; their
            number of bytes is always compared.

    Raises:
        StoreError: a part of it is damaged, or the store was not written by the job.
    """
    files = TokenFiles(store)
    path, sketch = files.folder / FACTS_NAME, files.folder / SKETCH_NAME
    if not path.is_file() or files.missing():
        return None
    try:
        facts = TextFacts(**json.loads(path.read_text()))
        if sketch.stat().st_size != facts.sketch["bytes"]:
            raise ValueError(f"{SKETCH_NAME} has another size")
        if check_sum and sum_of(sketch) != facts.sketch:
            raise ValueError(f"the checksum of {SKETCH_NAME} does not match")
        table = map_array(sketch)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StoreError(
            f"{files.folder} is damaged ({error}). Delete {path.name} there, and `python -m "
            f"gradproj text {files.output}` counts again"
        ) from error
    return TextIndex(files, FrequencySketch(table, facts.n_documents), facts)


def make_text_index(
    store: ProjectionStore,
    inputs: RecordedRunArgs,
    max_sketch_bytes: int = MAX_SKETCH_BYTES,
    share: tuple[int, int] = (0, 1),
    note: Callable[[str], None] = lambda line: None,
) -> TextIndex | None:
    """Make what a store's text index lacks, and check the checksum of what it has.

    Of several calls at once one counts n-grams, and the others wait for it.

    Args:
        store: finished or not; the tokens do not depend on its rows.
        inputs: the output, and the present places of its model and tars.
        max_sketch_bytes: most memory of the sketch.
        share: ``(rank, number of ranks)`` of processes that make it at the same time. All read
            documents, and rank 0 counts n-grams.
        note: called with a line for the user before a long step.

    Returns:
        The index; None on ranks other than 0.

    Raises:
        StoreError: the folder cannot be written.
        ModelError: the tokenizer is not the recorded one.
        CorpusError: the tars are not where the job found them, or have changed.
    """
    index = open_text_index(store, check_sum=True)
    if index is not None:
        return index
    files = make_token_files(store, inputs, share, note)
    if share[0] != 0:
        return None
    with _locked(files.folder, note) as locked:
        if not (files.folder / FACTS_NAME).is_file():
            _make_sketch(files, max_sketch_bytes)
        if locked:  # else they may be those of a process that still writes them
            _delete_unfinished(files.folder)
    for other in files.folder.parent.iterdir():  # of earlier stores in this output directory
        if other != files.folder and other.is_dir():
            delete_tree(other)
    return open_text_index(store, check_sum=True)


@contextmanager
def _locked(folder: Path, note: Callable[[str], None]) -> Iterator[bool]:
    """Lock the folder, waiting for its holder; False if the file system has no locks."""
    waiting = f"waiting for another process that counts n-grams in {folder}"
    with locked(folder, lambda: note(waiting)) as is_locked:
        yield is_locked is True


def _delete_unfinished(folder: Path) -> None:
    for pattern in ("counted-*.npy", ".counted-*.tmp", f".{SKETCH_NAME}.*.tmp"):
        for unfinished in folder.glob(pattern):
            unfinished.unlink(missing_ok=True)


def _make_sketch(files: TokenFiles, max_bytes: int) -> None:
    """Count the n-grams of all token files. A killed call continues from its last saved table."""
    n_documents, n_tokens = files.totals()
    table, n_counted = _saved_table(files, n_counters(n_tokens, max_bytes))
    sketch = FrequencySketch(table, n_documents)
    units, saved_at = files.units[n_counted:].tolist(), time.monotonic()
    pool, n_threads = thread_pool()
    with pool:
        for unit in shown(units, len(units), "n-grams", "units"):
            sketch.add(files.read(unit), pool, n_threads)
            n_counted += 1
            if time.monotonic() - saved_at >= SAVE_EVERY_S:
                _save_table(table, files.folder / f"counted-{n_counted:08d}.npy")
                saved_at = time.monotonic()
    path = files.folder / SKETCH_NAME
    _save_table(table, path)
    facts = TextFacts(n_documents, n_tokens, sum_of(path))
    with explain_os_errors(files.folder):
        replace(files.folder / FACTS_NAME, [json.dumps(asdict(facts)).encode()])


def _saved_table(files: TokenFiles, n_counters: int) -> tuple[np.ndarray, int]:
    """Return the table of the most units that a killed call saved, and their number; else zeros."""
    for path in sorted(files.folder.glob("counted-*.npy"), reverse=True):
        table = load_array(path)
        if len(table) == n_counters:
            return table, int(path.stem.removeprefix("counted-"))
    return np.zeros(n_counters, np.uint32), 0


def _save_table(table: np.ndarray, path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(table))
    with explain_os_errors(path):
        replace(path, [header.getvalue(), table.data])
    for older in path.parent.glob("counted-*.npy"):
        if older != path:
            older.unlink(missing_ok=True)
