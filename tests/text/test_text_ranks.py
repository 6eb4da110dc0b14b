"""Ranks that share a scan by text each return the result of a single process."""

from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from helpers.forked_ranks import call_as_two_ranks

from gradproj import ProjectionStore
from gradproj.analysis.ranking import Ranker, Ranking
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.text.index import make_text_index
from gradproj.text.ranking import HybridRanker
from gradproj.text.scores import QueryText, TextScan


def results_of(folder, together):
    """Rank by text and by both, from memory and through a file."""
    results = []
    with ProjectionStore(folder / "out") as store:
        index = make_text_index(store, RecordedRunArgs(output=str(folder / "out")))
        texts = [QueryText(ids) for ids in index.files.tokens_at(np.array([3, 40]))]
        rows = store.rows([3, 40])
        scan = TextScan(store, index, together=together)
        options = {"score": "cosine", "layers": None, "together": together}
        both = HybridRanker(Ranker(store, 60, 7, options, None), scan)
        for name in ("", "scores.npy"):
            path = folder / f"{together} {name}" if name else None
            text_path = path and path.with_name(f"text {path.name}")
            for ranking in (
                Ranking(None, *scan.stream(texts).ends(60, 7, text_path)),
                both.rank(rows, texts, "auto", path),
            ):
                for end in (ranking.top, ranking.bottom):
                    results += [end.ids, end.scores, np.array(end.n_scored)]
    return results


def rank_of_two(rank, folder):
    torch.set_num_threads(1)
    meeting = f"file://{folder / 'meeting'}"
    timeout = timedelta(minutes=5)
    dist.init_process_group("gloo", meeting, rank=rank, world_size=2, timeout=timeout)
    torch.save(results_of(folder, together=True), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_return_the_results_of_one_process(output):
    folder = output.parent
    want = results_of(folder, together=False)
    call_as_two_ranks(rank_of_two, folder)
    for rank in range(2):
        got = torch.load(folder / f"{rank}.pt", weights_only=False)
        for ours, alone in zip(got, want, strict=True):
            if alone.dtype == np.int64:
                np.testing.assert_array_equal(ours, alone)
            else:
                np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-6)
