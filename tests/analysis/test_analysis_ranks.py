"""Ranks that share a scan each return the result of a single process."""

from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers.analysis_stores import NAMES, make_store
from helpers.forked_ranks import call_as_two_ranks

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, domain_matrix, score, self_influence, top_and_bottom
from gradproj.analysis.row_blocks import rank_range
from gradproj.distributed import World
from gradproj.errors import ConfigError

SCORES = ("kfac", "preconditioned", "cosine")
FITS = ({}, {"joint": True}, {"largest_width": 7, "directions": 64}, {"layers": [NAMES[1]]})


def queries_for(store):
    return np.random.default_rng(3).standard_normal((3, store.dim)).astype(np.float32)


def results_of(store, together):
    """Return rankings, and some rows solved by fitted preconditioners."""
    results = []
    for kind in SCORES:
        for ends in top_and_bottom(queries_for(store), store, 60, 7, score=kind, together=together):
            results += [ends.ids, ends.scores, np.array(ends.n_scored)]
    for settings in FITS:
        fitted = Preconditioner.fit(store, "second_moment", 0.1, together=together, **settings)
        x = torch.from_numpy(queries_for(store)).double()
        x = x[:, :8] if "layers" in settings else x
        results += [fitted.solve(x).numpy(), np.array(fitted.n_rows)]
    return results


def rank_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        f"file://{folder / 'meeting'}",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),
    )
    with ProjectionStore(folder / "out") as store:
        torch.save(results_of(store, together=True), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_return_the_results_of_one_process(tmp_path):
    make_store(tmp_path / "out")
    call_as_two_ranks(rank_of_two, tmp_path)
    with ProjectionStore(tmp_path / "out") as store:
        want = results_of(store, together=False)
    for rank in range(2):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert len(got) == len(want)
        for ours, alone in zip(got, want, strict=True):
            if alone.dtype == np.int64:
                np.testing.assert_array_equal(ours, alone)
            else:
                np.testing.assert_allclose(ours, alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_rank_ranges_are_whole_units_that_cover_the_store(tmp_path, world_size):
    output = make_store(tmp_path / "out")
    with ProjectionStore(output.path) as store:
        spans = [rank_range(store, World(rank, world_size)) for rank in range(world_size)]
    assert spans[0][0] == 0
    assert spans[-1][1] == 70
    assert [stop for _, stop in spans[:-1]] == [start for start, _ in spans[1:]]
    assert all(start % 16 == 0 for start, _ in spans)


def test_together_without_a_process_group_is_rejected(tmp_path):
    output = make_store(tmp_path / "out")
    with ProjectionStore(output.path) as store:
        with pytest.raises(
            ConfigError, match=r"together=True needs an initialised torch\.distributed"
        ):
            Preconditioner.fit(store, "second_moment", together=True)
        for function, arguments in (
            (score, (queries_for(store), store)),
            (self_influence, (store,)),
            (domain_matrix, (store,)),
        ):
            with pytest.raises(
                ConfigError, match="does not take together; top_k, bottom_k and top_and_bottom do"
            ):
                function(*arguments, together=True)
