"""Laws of scores by tiles: those of whole rows, in whatever pieces a store's layout gives its values."""

import numpy as np
import pytest
import torch
from helpers.meta_device import MUTE, waits_of
from helpers.stores import Output

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, scores
from gradproj.analysis import score_blocks as score_blocks
from gradproj.analysis.scan import Scan
from gradproj.analysis.top_k import TopK
from gradproj.store import StoreConfig, StoreLayout

LAYOUTS = {
    "a chunk a layer": {},
    "a chunk a row": {"widths": ((3, 5), (1, 7), (4, 1)), "n_samples": 50},
    "chunks of a layer's part": {"widths": ((8, 8), (16, 8), (8, 24)), "n_samples": 50},
    "bfloat16": {"config": StoreConfig(proj_dtype="bfloat16", rows_per_shard=16)},
    "compressed": {"config": StoreConfig(compressor="blosc", rows_per_shard=16)},
    "many chunks a shard": {
        "n_samples": 150,
        "layout": StoreLayout(150, 12, 64, 32, 6, "float16", "none", 8, 128),
    },
}


@pytest.fixture(scope="module", params=LAYOUTS)
def store(request, tmp_path_factory):
    output = Output(tmp_path_factory.mktemp("score_blocks"), **LAYOUTS[request.param]).fill()
    with ProjectionStore(output.path) as opened:
        yield opened


def both_ways(store, n_queries=3, **how):
    """Scores of ``n_queries`` by tiles and by blocks of whole rows."""
    asked = Scan.of(store, how)
    question = asked.question(np.random.default_rng(1).standard_normal((n_queries, asked.width)))
    if not score_blocks._parts_fit_tiles(asked, question):
        pytest.skip("this norm needs whole rows")
    found = []
    for way in (score_blocks._by_tiles, score_blocks._by_blocks):
        values = [block.values for block in way(asked, question)]
        found.append(torch.cat(values, dim=1).numpy())
    return found


def assert_same(by_tiles, by_blocks):
    np.testing.assert_array_equal(np.isnan(by_tiles), np.isnan(by_blocks))
    # Rows' sizes go from 1e-12 to 1e12: each document's scores for themselves.
    size = np.abs(by_blocks).max(axis=0)
    np.testing.assert_allclose(by_tiles / size, by_blocks / size, atol=1e-4)


@pytest.mark.parametrize("turned", [False, True], ids=["all", "layers-turned"])
@pytest.mark.parametrize("score", ["dot", "cosine", "relatif"])
def test_tiles_give_the_scores_of_whole_rows(store, score, turned):
    layers = [layer.name for layer in store.layers][::-1] if turned else None
    fitted = (
        Preconditioner.fit(store, "second_moment", layers=layers) if score == "relatif" else None
    )
    assert_same(*both_ways(store, score=score, layers=layers, preconditioner=fitted))


@pytest.mark.parametrize(
    "n_queries", [1, score_blocks._ONEDNN_QUERIES - 1, score_blocks._ONEDNN_QUERIES, 40]
)
def test_any_number_of_queries(store, n_queries):
    assert_same(*both_ways(store, n_queries, score="dot"))


@pytest.mark.parametrize("values_a_tile", [1, 40])
def test_tiles_of_any_size(store, monkeypatch, values_a_tile):
    monkeypatch.setattr(score_blocks, "_TILE_VALUES", values_a_tile)
    for score in ("dot", "cosine"):
        assert_same(*both_ways(store, score=score))


def test_bands_of_which_nothing_is_asked_are_not_read(store, monkeypatch):
    def refuse(products, *_):
        raise AssertionError("read")

    monkeypatch.setattr(score_blocks.TileProducts, "_multiply", refuse)
    monkeypatch.setattr(
        score_blocks.SampleFilter,
        "__call__",
        lambda self, first, status: np.zeros(len(status), bool),
    )
    asked = Scan.of(store, {"score": "dot"})
    for block in score_blocks.score_blocks(asked, asked.question(torch.ones(2, store.dim))):
        assert block.values.isnan().all()


@pytest.mark.parametrize("score", ["dot", "cosine", "relatif"])
def test_a_gpu_is_asked_for_nothing_between_blocks(store, score):
    """On a device that cannot be asked; the store's units are in several blocks."""
    fitted = Preconditioner.fit(store, "second_moment") if score == "relatif" else None
    asked = Scan.of(
        store, {"score": score, "preconditioner": fitted, "device": MUTE, "rows_per_block": 9}
    )
    question = asked.question(torch.ones(3, store.dim))
    top, bottom = TopK(3, 5, MUTE), TopK(3, 2, MUTE)
    assert waits_of(lambda: scores._add_all(asked, question, top, bottom)) == []
    assert top.found()[0].shape == (3, 5)
