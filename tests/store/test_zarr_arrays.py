"""Arrays in a bucket, read by zarr-python over a network that fails."""

import numpy as np
from helpers.fault_proxy import fault_proxy, url_of

from gradproj.storage.object_path import path_of
from gradproj.storage.retry import RetryPolicy
from gradproj.store import zarr_arrays
from gradproj.store.writer import write_array


def test_cut_replies_are_asked_for_again(bucket, s3_server, monkeypatch):
    values = np.arange(1000.0)
    write_array(path_of(f"{bucket}/store"), "sums", values)
    monkeypatch.setattr(zarr_arrays, "POLICY", RetryPolicy(first_s=1e-3, longest_s=0.1))
    with fault_proxy(s3_server.url, seed=1, rates={"cut": 0.5}) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url_of(proxy))
        while proxy.met["cut"] < 4:
            array = zarr_arrays.open_array(path_of(f"{bucket}/store") / "sums")
            np.testing.assert_array_equal(array[...], values)
