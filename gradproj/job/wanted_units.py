"""The units that a job computes: those that can hold a document of the chosen domains."""

import numpy as np

from gradproj.corpus.index import CorpusIndex
from gradproj.errors import CorpusError
from gradproj.job.config import RunConfig
from gradproj.store.layout import StoreLayout


def wanted_units(
    config: RunConfig, index: CorpusIndex, layout: StoreLayout
) -> tuple[np.ndarray, int]:
    """Return the units that can hold a chosen document, and an upper bound of such documents."""
    chosen = config.corpus.chosen_domains
    if not chosen:
        return np.arange(layout.n_units, dtype=np.int64), layout.n_samples
    wanted: set[int] = set()
    n_selected, height = 0, layout.rows_per_shard
    for tar in index.tars:
        count = sum(tar.domain_counts.get(name, 0) for name in chosen)
        stop = min(tar.start_id + tar.n_samples, layout.n_samples)
        if count and tar.start_id < stop:
            n_selected += min(count, stop - tar.start_id)
            wanted.update(range(tar.start_id // height, (stop - 1) // height + 1))
    if not wanted:
        raise CorpusError(
            f"--domains: none of the first {layout.n_samples:,} documents is of {', '.join(chosen)}"
        )
    return np.array(sorted(wanted), dtype=np.int64), n_selected
