"""The layers of a job: a new store's by the default, a begun one's as recorded."""

import numpy as np
import pytest
from helpers.corpora import make_corpus, mixed_documents
from helpers.jobs import flags
from helpers.models import make_model

import gradproj.run
from gradproj import ProjectionStore
from gradproj.engine import patterns
from gradproj.store.unit_record import list_records, record_name


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """A corpus and a model whose blocks have attention or a convolution before their MLP."""
    root = tmp_path_factory.mktemp("hybrid")
    corpus = make_corpus(root / "tars", mixed_documents(48))
    return {"shards": corpus, "model": make_model(root / "model", "lfm2")}


def run(hybrid, output, **more):
    settings = {**hybrid, "output_dir": output, "device": "cpu", "rows_per_shard": 16, **more}
    return gradproj.run.main(
        flags(**settings, proj_rank_total=24, proj_rank_min=3, max_length=48, threads=1)
    )


def lose_a_unit(output):
    """Leave a store begun: one of its units has to be computed again."""
    (output / record_name(list_records(output / "units")[-1])).unlink()


def layers_of(output):
    with ProjectionStore(output) as store:
        return [layer.name for layer in store.layers], store.rows(np.arange(48))


def test_store_begun_with_the_earlier_default_is_continued_without_the_flag(hybrid, tmp_path):
    assert run(hybrid, tmp_path / "out", proj_layers="mlp,attn") == 0
    before, rows = layers_of(tmp_path / "out")
    assert not [name for name in before if ".conv." in name]
    lose_a_unit(tmp_path / "out")
    assert run(hybrid, tmp_path / "out") == 0
    after, again = layers_of(tmp_path / "out")
    assert after == before
    np.testing.assert_array_equal(again, rows)
    assert run(hybrid, tmp_path / "new") == 0
    default, _ = layers_of(tmp_path / "new")
    assert len(default) == 12 > len(before)
    assert set(before) < set(default)


def test_begun_store_keeps_the_layers_that_an_older_role_took(hybrid, tmp_path, monkeypatch):
    with monkeypatch.context() as older:
        older.setitem(patterns.ROLES, "mixer", ("conv.in_proj",))
        assert run(hybrid, tmp_path / "out", proj_layers="mixer,attn") == 0
    before, rows = layers_of(tmp_path / "out")
    assert not [name for name in before if "conv.out_proj" in name]
    lose_a_unit(tmp_path / "out")
    assert run(hybrid, tmp_path / "out", proj_layers="mixer,attn") == 0
    after, again = layers_of(tmp_path / "out")
    assert after == before
    np.testing.assert_array_equal(again, rows)
    assert run(hybrid, tmp_path / "out", proj_layers="attn") == 2
