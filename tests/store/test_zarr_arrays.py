"""Arrays in a bucket, read by zarr-python over a network that fails."""

import numpy as np
import pytest
from helpers.http_files import http_files

from gradproj.storage.address import Address
from gradproj.storage.contents import files_below
from gradproj.storage.object_path import object_at
from gradproj.store import zarr_arrays
from gradproj.store.writer import write_array
from gradproj.store.zarr_arrays import open_array


@pytest.mark.parametrize("fault", [503, ("cut", 9)])
def test_replies_that_fail_are_asked_for_again(fault, tmp_path, monkeypatch):
    slept, values = [], np.arange(1000.0)

    async def sleep(seconds):
        slept.append(seconds)

    monkeypatch.setattr(zarr_arrays, "sleep", sleep)
    write_array(tmp_path, "sums", values)
    files = {f"/{name}": (tmp_path / name).read_bytes() for name in files_below(tmp_path)}
    with http_files(files=files) as site:
        site.faults.extend([fault] * 5)  # more than obstore's own tries
        array = open_array(object_at(Address.parse(f"{site.url}/sums")))
        np.testing.assert_array_equal(array[...], values)
    assert slept
