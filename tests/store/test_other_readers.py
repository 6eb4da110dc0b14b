"""Stores as other programs read them: zarr-python, xarray, dask and tensorstore, no gradproj."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.jobs import ENVIRONMENT
from helpers.stores import READER_CASES, filled, packed

import gradproj.store
from gradproj import ProjectionStore
from gradproj.store.append_table import AppendTable
from gradproj.store.layout import PACKED_BITS
from gradproj.store.writer import write_array

README = Path(gradproj.store.__file__).with_name("README.md")
PACKED = ("signs in whole rows", "int2 blosc", "int8 training store")
READ = """
import json
import sys

sys.modules["gradproj"] = None  # xarray would import its engine
import dask.array
import numpy as np
import tensorstore
import xarray
import zarr

found = {}
for name, path in json.loads(sys.argv[1]).items():
    stored, scale = (
        tensorstore.open({"driver": "zarr3", "kvstore": f"file://{path}/{array}"}).result()
        for array in ("projections", "row_scale")
    )
    rows, scale = stored[...].read().result(), scale[...].read().result()
    if stored.dtype.name == "uint8":  # packed
        data = xarray.open_zarr(path)
        assert data.projections.dims == ("sample", "byte")
        found[f"{name} tensorstore"] = rows
        found[f"{name} zarr"] = zarr.open_group(path, mode="r")["projections"][...]
        found[f"{name} xarray"] = data.projections.compute().values
        continue
    found[f"{name} tensorstore"] = rows.astype("f4") * scale[:, None]
    if stored.dtype.name == "bfloat16":  # zarr-python has no such type
        continue
    group = zarr.open_group(path, mode="r")
    rows, scale = group["projections"][...], group["row_scale"][...]
    found[f"{name} zarr"] = rows.astype("f4") * scale[:, None]
    data = xarray.open_zarr(path)
    assert isinstance(data.projections.data, dask.array.Array)
    assert data.projections.dims == ("sample", "value")
    assert data.key.dims == ("sample", "key_byte")
    rows = data.projections.astype("float32") * data.row_scale
    found[f"{name} xarray"] = rows.where(data.status == 1).compute().values
table = xarray.open_zarr(sys.argv[2])
assert dict(table.sizes) == {"row": 5, "parts_value": 3}
found["table"] = table.parts[(table.total > 6).compute()].values
np.savez(sys.argv[3], **found)
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """A store of each type, a compressed one and a training run's."""
    folder = tmp_path_factory.mktemp("stores")
    outputs = {
        name: READER_CASES[name](folder / name.replace(" ", "-"))
        for name in ("float16", "bfloat16", "float32", "blosc", "training store", *PACKED)
    }
    write_array(outputs["float16"].store_path, "token_covariance_a", np.ones(18))
    return outputs


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """The table of a training run."""
    columns = {"total": (np.dtype("f4"), None), "parts": (np.dtype("f4"), 3)}
    table = AppendTable(tmp_path_factory.mktemp("table") / "table", columns, {})
    table.append({"total": np.arange(4, 9), "parts": np.arange(15).reshape(5, 3)})
    return table


def test_every_program_reads_the_rows(outputs, table, tmp_path):
    paths = json.dumps({name: str(output.store_path) for name, output in outputs.items()})
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, paths, table.path, tmp_path / "found.npz"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "found.npz"))
    assert found.pop("table").tolist() == [[9, 10, 11], [12, 13, 14]]
    assert len(found) == 3 * (4 + len(PACKED)) + 1
    for name, rows in found.items():
        output = outputs[name.rpartition(" ")[0]]
        want = output.stored if output.layout.is_packed else output.decoded()
        np.testing.assert_array_equal(rows, want, name)


@pytest.mark.parametrize("encoding", PACKED_BITS)
def test_the_specification_s_code_reads_packed_rows(encoding, tmp_path, monkeypatch):
    widths = ((2, 3), (3, 5), (1, 7), (3, 7))
    output = filled(tmp_path / "demo" / "signs", widths=widths, config=packed(encoding))
    code = re.search(r"^```python\n([^`]*unpackbits.*?)^```", README.read_text(), re.M | re.S)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    want = ProjectionStore(output.path).layer("h.3.mlp")[10:60]
    np.testing.assert_array_equal(names["gradients"], want)


def test_every_array_names_its_dimensions(outputs, table):
    for path in (*(output.store_path for output in outputs.values()), table.path):
        for name, array in zarr.open_group(path, mode="r").arrays():
            names = array.metadata.dimension_names
            assert names is not None, name
            assert name not in names, "it would be an index, which is read at once"
