"""Scores at several checkpoints and their weighted sum, in one scan of each store."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.jobs import run_job
from helpers.models import make_model
from helpers.outputs import SETTINGS, copy_of
from helpers.query_command import TEXT, write_queries

from gradproj import ProjectionStore
from gradproj.analysis import checkpoint_sum, score
from gradproj.query import QueryProjector, read_queries

RATES = (0.5, -2.0)


@pytest.fixture(scope="module")
def runs(job, tmp_path_factory):
    """Two outputs of one corpus, at other weights and in rows of another width."""
    folder = tmp_path_factory.mktemp("runs")
    model = make_model(folder / "model", initializer_range=0.1)
    settings = {**SETTINGS, "proj_rank_total": 9}
    run_job(shards=job.corpus, model=model, output_dir=folder / "step2", **settings)
    first = copy_of(job.output, folder)
    queries = write_queries(folder / "q.jsonl", {"text": TEXT, "id": "a"}, {"text": "of to in"})
    return SimpleNamespace(outputs=(first, folder / "step2"), queries=queries)


def wanted(runs, **options):
    """Return each checkpoint's scores ``(Q, N)``."""
    each = []
    for output in runs.outputs:
        with ProjectionStore(output) as store:
            rows = QueryProjector(store, device="cpu").rows(read_queries(runs.queries)).rows
            each.append(score(rows, store, **options).astype(np.float64))
    return each


def test_python_gives_the_same_sum_and_reads_every_row_once(runs, monkeypatch):
    stores = [ProjectionStore(output) for output in runs.outputs]
    rows = [
        QueryProjector(store, device="cpu").rows(read_queries(runs.queries)).rows
        for store in stores
    ]
    bands, scan = [], ProjectionStore.scan_bands

    def counted(self, *args):
        for band in scan(self, *args):
            bands.append((self.path, band.first, band.last))
            yield band

    monkeypatch.setattr(ProjectionStore, "scan_bands", counted)
    top, bottom = checkpoint_sum(rows, stores, RATES, score="dot").ends(4, 2)
    for store in stores:
        read = sorted(span for path, *span in bands if path == store.path)
        assert sum(last - first for first, last in read) == len(store)
    each = wanted(runs, score="dot")
    total = RATES[0] * each[0] + RATES[1] * each[1]
    for end, sign in ((top, -1), (bottom, 1)):
        for number, values in enumerate(total):
            order = np.argsort(sign * values, kind="stable")
            assert end.ids[number].tolist() == order[: end.ids.shape[1]].tolist()
    for store in stores:
        store.close()
