"""Refuses runs whose output is too large for its place, or mostly empty, before any work.

Each check raises a ``StoreError`` that names the flag.
"""

import math
import shutil
from pathlib import Path

from gradproj.corpus.config import CorpusConfig
from gradproj.errors import StoreError
from gradproj.files import existing_ancestor
from gradproj.formatting import human_bytes
from gradproj.storage.object_path import in_bucket
from gradproj.storage.stored_object import MAX_PUT_BYTES
from gradproj.store.layout import UNITS_DIR
from gradproj.store.unit_record import list_records

SPARSE_BYTES = 2**30
SPARSE_SHARE = 0.1
"""``--domains`` that waste more than either limit needs ``--allow_sparse``."""


def check_sparse(corpus: CorpusConfig, n_units: int, unit_bytes: int, wasted: int) -> None:
    """Refuse ``--domains`` of which much of the store would be empty.

    ``wasted`` are the bytes of empty rows in ``n_units``.
    """
    domains, total = corpus.chosen_domains, max(1, n_units * unit_bytes)
    too_much = wasted > SPARSE_BYTES or wasted / total > SPARSE_SHARE
    # Empty rows of a partial last unit or at the edges of a domain are unavoidable.
    edges = 2 * len(domains) * unit_bytes
    if domains and too_much and wasted > edges and not corpus.allow_sparse:
        raise StoreError(
            f"--domains: the corpus is not grouped by domain, so {human_bytes(wasted)} of "
            f"{human_bytes(total)} would be empty rows. Group it (python -m gradproj prepare ... "
            "--group_by_domain), or give --allow_sparse"
        )


def check_space(output: Path, n_units: int, store_bytes: int) -> None:
    """Refuse an output whose disk has no room for the units that are not committed yet."""
    done = len(list_records(output / UNITS_DIR))
    left, free = store_bytes * (1 - done / max(1, n_units)), free_bytes(output)
    if left > free:
        raise StoreError(
            f"--output_dir {output}: {human_bytes(left)} are still needed and "
            f"{human_bytes(free)} are free. Free some space, choose another directory, or give a "
            "smaller --proj_rank_total"
        )


def free_bytes(path: Path) -> float:
    """Return the free bytes of the file system that ``path`` is or will be on."""
    return math.inf if in_bucket(path) else shutil.disk_usage(existing_ancestor(path)).free


def check_requests(output: Path, rows_per_unit: int, row_bytes: int, matrix_bytes: int) -> None:
    """Refuse objects of a bucket that are too large for the one request that writes each."""
    if not in_bucket(output):
        return
    unit_bytes, limit = rows_per_unit * row_bytes, human_bytes(MAX_PUT_BYTES)
    if unit_bytes > MAX_PUT_BYTES:
        fitting = 2 ** int(math.log2(MAX_PUT_BYTES / row_bytes))
        raise StoreError(
            f"--rows_per_shard {rows_per_unit:,}: a unit's rows are one object of "
            f"{human_bytes(unit_bytes)}, and a bucket takes at most {limit} in one request. Give "
            f"--rows_per_shard {fitting} or fewer (in a new output, if this one has a store)"
        )
    if matrix_bytes > MAX_PUT_BYTES:
        raise StoreError(
            f"--proj_rank_total: the projection matrices are {human_bytes(matrix_bytes)}, and a "
            f"bucket takes at most {limit} in one request. Give a smaller --proj_rank_total"
        )
