"""Scores computed tile by tile equal those of whole rows, for every layout of a store."""

import numpy as np
import pytest
import torch
from helpers.meta_device import META_DEVICE, waits_of
from helpers.stores import Output

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, score_blocks, scores
from gradproj.analysis.scan import Scan
from gradproj.analysis.top_k import TopK
from gradproj.store.layout import StoreConfig, StoreLayout

LAYOUTS = {
    "one chunk per layer": {},
    "one chunk per row": {"widths": ((3, 5), (1, 7), (4, 1)), "n_samples": 50},
    "several chunks per layer": {"widths": ((8, 8), (16, 8), (8, 24)), "n_samples": 50},
    "bfloat16": {"config": StoreConfig(encoding="dense", proj_dtype="bfloat16", rows_per_shard=16)},
    "compressed": {"config": StoreConfig(encoding="dense", compressor="blosc", rows_per_shard=16)},
    "many chunks per shard": {
        "n_samples": 150,
        "layout": StoreLayout(150, 12, 64, 32, 6, "float16", "none", 8, 128),
    },
}


@pytest.fixture(scope="module", params=LAYOUTS)
def store(request, tmp_path_factory):
    output = Output(tmp_path_factory.mktemp("score_blocks"), **LAYOUTS[request.param]).fill()
    with ProjectionStore(output.path) as opened:
        yield opened


def both_ways(store, n_queries=3, **options):
    """Scores of ``n_queries`` by tiles and by blocks of whole rows."""
    scan = Scan.of(store, options)
    rows = np.random.default_rng(1).standard_normal((n_queries, scan.width))
    queries = scan.prepare_queries(rows)
    if not score_blocks._parts_fit_tiles(scan, queries):
        pytest.skip("this norm needs whole rows")
    return [
        torch.cat([values for _, values in blocks(scan, queries)], dim=1).numpy()
        for blocks in (score_blocks._score_tiles, score_blocks._score_rows)
    ]


def assert_same(by_tiles, by_blocks):
    np.testing.assert_array_equal(np.isnan(by_tiles), np.isnan(by_blocks))
    # Row norms go from 1e-12 to 1e12, so that each document has its own tolerance.
    size = np.abs(by_blocks).max(axis=0)
    np.testing.assert_allclose(by_tiles / size, by_blocks / size, atol=1e-4)


@pytest.mark.parametrize("reversed", [False, True], ids=["all", "reversed-layers"])
@pytest.mark.parametrize("score", ["dot", "cosine", "relatif"])
def test_tiles_give_the_scores_of_whole_rows(store, score, reversed):
    layers = [layer.name for layer in store.layers][::-1] if reversed else None
    fitted = (
        Preconditioner.fit(store, "second_moment", layers=layers) if score == "relatif" else None
    )
    assert_same(*both_ways(store, score=score, layers=layers, preconditioner=fitted))


@pytest.mark.parametrize(
    "n_queries", [1, score_blocks._ONEDNN_QUERIES - 1, score_blocks._ONEDNN_QUERIES, 40]
)
def test_number_of_queries_does_not_change_scores(store, n_queries):
    assert_same(*both_ways(store, n_queries, score="dot"))


@pytest.mark.parametrize("values_per_tile", [1, 40])
def test_tile_size_does_not_change_scores(store, monkeypatch, values_per_tile):
    monkeypatch.setattr(score_blocks, "_TILE_VALUES", values_per_tile)
    for score in ("dot", "cosine"):
        assert_same(*both_ways(store, score=score))


def test_bands_without_selected_samples_are_not_read(store, monkeypatch):
    def refuse(products, *_):
        raise AssertionError("read")

    monkeypatch.setattr(score_blocks.TileProducts, "_multiply", refuse)
    monkeypatch.setattr(
        score_blocks.SampleFilter,
        "__call__",
        lambda self, first, status: np.zeros(len(status), bool),
    )
    scan = Scan.of(store, {"score": "dot"})
    queries = scan.prepare_queries(torch.ones(2, store.dim))
    for _, values in score_blocks.score_blocks(scan, queries):
        assert values.isnan().all()


@pytest.mark.parametrize("score", ["dot", "cosine", "relatif"])
def test_scan_never_waits_for_a_gpu_between_blocks(store, score):
    """Runs on a device that fails when it is waited for, with several blocks per unit."""
    fitted = Preconditioner.fit(store, "second_moment") if score == "relatif" else None
    scan = Scan.of(
        store,
        {"score": score, "preconditioner": fitted, "device": META_DEVICE, "rows_per_block": 9},
    )
    queries = scan.prepare_queries(torch.ones(3, store.dim))
    top, bottom = TopK(3, 5, META_DEVICE), TopK(3, 2, META_DEVICE)
    blocks = score_blocks.score_blocks(scan, queries)
    assert waits_of(lambda: scores.add_all(blocks, top, bottom)) == []
    assert top.result()[0].shape == (3, 5)
