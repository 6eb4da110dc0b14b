"""Self-influences of a store's rows, kept beside it so that relatif scans as fast as kfac.

Only where they cost a product with every row: see ``row_norms.py``.
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch

from gradproj.analysis.preconditioner_cache import state_of
from gradproj.analysis.preconditioner_file import folder_of, identity_of
from gradproj.analysis.scan import Scan, ScanOptions
from gradproj.analysis.score_types import DEFAULT_SCORE, SCORES
from gradproj.analysis.scores import self_products_of_blocks
from gradproj.analysis.tensor_file import read_tensors, write_tensors
from gradproj.errors import StoreError
from gradproj.store import ProjectionStore

_MOST_SAMPLES = 2**24
"""Of a store whose self-influences are kept: 64 MB of them."""
_PREFIX = "self_influence"


def with_self_influences(
    store: ProjectionStore, options: ScanOptions, note: Callable[[str], None] = lambda line: None
) -> ScanOptions:
    """Return the options with the rows' self-influences, if the score divides by them.

    They come from the file that an earlier call saved, or from a scan, after which they are saved.
    ``note`` is called with a line for the user if the file cannot be read or written.
    """
    divisor = SCORES[options.get("score", DEFAULT_SCORE)].divisor
    if divisor != "self_influence" or len(store) > _MOST_SAMPLES or options.get("domains"):
        return options
    scan = Scan.of(store, options)
    if scan.norms is not None or scan.device.type != "cpu":  # a GPU multiplies in passing
        return options
    assert scan.preconditioner is not None
    key = hashlib.sha256(scan.preconditioner.fingerprint().encode()).hexdigest()[:12]
    path = folder_of(store) / f"{_PREFIX}-{state_of(store)}-{key}.safetensors"
    values = None
    if path.exists():
        try:
            settings, tensors = read_tensors(path, "delete it")
            if settings != {"store": identity_of(store)}:
                raise StoreError(f"{path} is of another store: delete it")
            values = tensors[_PREFIX].numpy()
        except StoreError as error:
            note(f"{error}. Computing it again")
    # All ranks or none: computing is collective.
    if not all(scan.world.gather(values is not None)) or values is None:
        parts = [products.cpu() for _, _, products in self_products_of_blocks(scan)]
        values = np.concatenate(
            [part.numpy() for of_rank in scan.world.gather(parts) for part in of_rank]
        )
        if scan.world.rank == 0:
            try:
                write_tensors(
                    path, {"store": identity_of(store)}, {_PREFIX: torch.from_numpy(values)}
                )
                for old in path.parent.glob(f"{_PREFIX}-*"):
                    if not old.name.startswith(f"{_PREFIX}-{state_of(store)}-"):
                        old.unlink(missing_ok=True)
            except (StoreError, OSError) as error:
                note(f"the self-influences could not be kept for the next query: {error}")
    return {**options, "self_influences": values}
