"""A store as an xarray dataset: the reader's values, read only when indexed."""

import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from helpers.stores import DOMAINS, Output, packed

from gradproj import ProjectionStore
from gradproj.errors import ConfigError
from gradproj.store import STATUS
from gradproj.store.layout import StoreConfig
from gradproj.store.row_reader import Rows
from gradproj.store.xarray_backend import GradprojBackend

MISSING = slice(16, 32)


CONFIGS = {
    **{
        t: StoreConfig(encoding="dense", proj_dtype=t, rows_per_shard=16)
        for t in ("float16", "bfloat16", "float32")
    },
    **{encoding: packed(encoding) for encoding in ("signs", "int4")},
}


@pytest.fixture(scope="module", params=CONFIGS)
def output(request, tmp_path_factory):
    config = CONFIGS[request.param]
    output = Output(
        tmp_path_factory.mktemp("labelled"),
        widths=((2, 3), (4, 16), (2, 3)),
        config=config,
        n_samples=70,
    )
    for unit in (0, 2, 3, 4):
        output.commit(unit)
    output.merge([0, 2])  # unit 1 is read through its record
    return output


@pytest.fixture
def dataset(output):
    with ProjectionStore(output.path) as store:
        yield store.to_xarray()


def expected_rows(output):
    rows = output.decoded().copy()
    rows[MISSING] = np.nan
    return rows


def test_xarray_rows_equal_decoded_rows(output, dataset):
    assert dataset.rows.dtype == np.float32
    assert dataset.rows.dims == ("sample", "value")
    np.testing.assert_array_equal(dataset.rows.values, expected_rows(output))


@pytest.mark.parametrize(
    "key",
    [
        (5, 7),
        (slice(None), 3),
        (slice(60, 3, -7), slice(4, 75, 3)),
        ([3, 69, 40, 3], slice(None)),
        ([1, 33], [75, 0, 12]),
        (slice(0, 0), slice(None)),
        (slice(None), slice(0, 0)),
    ],
)
def test_any_part_of_the_rows_can_be_indexed(output, dataset, key):
    with xr.open_dataset(output.path, engine=GradprojBackend) as lazily:
        for rows in (dataset.rows, lazily.rows):
            np.testing.assert_array_equal(
                rows[key].values,
                expected_rows(output)[np.ix_(*map(ids_of, key, (70, 76)))].reshape(rows[key].shape),
            )


def ids_of(part, size):
    return np.atleast_1d(np.arange(size)[part])


def test_selecting_a_layer_by_name_reads_no_other(output, dataset, monkeypatch):
    selections, read = [], Rows.read

    def note(self, ids, selection, missing):
        selections.append(selection.ranges)
        return read(self, ids, selection, missing)

    monkeypatch.setattr(Rows, "read", note)
    layer = output.layers[1]
    got = dataset.rows.sel(layer=layer.name)
    assert not selections
    np.testing.assert_array_equal(
        got.values, expected_rows(output)[:, layer.slice_start : layer.slice_end]
    )
    header = ((0, output.layout.header_width),) if output.layout.is_packed else ()
    assert set(selections) == {(*header, (layer.stored_start, layer.stored_end))}
    assert (
        list(dataset.layer.values)
        == np.repeat([x.name for x in output.layers], [6, 64, 6]).tolist()
    )


def test_dask_chunks_are_the_shards(dataset):
    assert dataset.rows.chunks == ((16, 16, 16, 16, 6), (76,))


def test_xarray_columns_equal_the_samples_columns(output, dataset):
    samples = np.arange(70)
    present = ~np.isin(samples, range(16, 32))
    loss, n_tokens = dataset.loss.values, dataset.n_tokens.values
    np.testing.assert_array_equal(loss, np.where(present, samples / 8, np.nan).astype(np.float32))
    np.testing.assert_array_equal(n_tokens, np.where(present, samples + 1, 0))
    np.testing.assert_array_equal(dataset.status.values, present * STATUS["ok"])
    names = [*DOMAINS, ""]
    want = [names[i % 3 - 1] if present[i] else "" for i in samples]
    assert dataset.domain.values.tolist() == want
    assert dataset.key.values.tolist() == [f"é{i}" if present[i] else "" for i in samples]
    np.testing.assert_array_equal(dataset.tar.values, np.where(present, samples // 7, -1))
    assert dataset.grad_norm[8].values == 2
    assert dataset.attrs["note"] == "kept"


def test_dask_computes_a_domain_mean(output, dataset):
    per_domain = dataset.rows.where(dataset.domain == "ArXiv").mean("sample").compute()
    rows = expected_rows(output)[np.arange(70) % 3 == 1]
    np.testing.assert_allclose(per_domain, np.nanmean(rows.astype(np.float64), axis=0), rtol=1e-4)


def test_readme_example_computes_from_the_stored_rows(output, tmp_path, monkeypatch):
    readme = (Path(__file__).parents[2] / "gradproj" / "store" / "README.md").read_text()
    (code,) = [
        block for block in re.findall(r"```python\n(.*?)```", readme, re.S) if "to_xarray" in block
    ]
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "out").symlink_to(output.path)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    mine = expected_rows(output)[np.arange(70) % 3 == 1][:, :6].astype(np.float64)
    np.testing.assert_allclose(names["mean"], np.nanmean(mine, axis=0), rtol=1e-4)
    assert names["slow"] == 69 / 8


def test_pickled_dataset_holds_the_store_path_only(output, dataset):
    sent = pickle.dumps(dataset)
    assert len(sent) < 20_000
    np.testing.assert_array_equal(pickle.loads(sent).rows.values, expected_rows(output))


def test_xarray_opens_an_output_directory_without_dask(output):
    assert GradprojBackend().guess_can_open(output.path)
    assert not GradprojBackend().guess_can_open(output.path / "units")
    with xr.open_dataset(output.path, engine=GradprojBackend, drop_variables="rows") as dataset:
        assert "rows" not in dataset
        assert dataset.sizes == {"sample": 70, "value": 76}
        assert dataset.loss.chunks is None


@pytest.mark.parametrize("absent", ["xarray", "dask"])
def test_missing_xarray_or_dask_names_the_extra(output, monkeypatch, absent):
    monkeypatch.setitem(sys.modules, absent, None)
    with (
        ProjectionStore(output.path) as store,
        pytest.raises(
            ConfigError, match=r"to_xarray needs xarray and dask.*pip install 'gradproj\[xarray\]'"
        ),
    ):
        store.to_xarray()
