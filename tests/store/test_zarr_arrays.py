"""Arrays in a bucket, read by zarr-python over a network that fails."""

import numpy as np
from helpers.fault_proxy import fault_proxy, url_of

from gradproj.storage.object_path import path_of
from gradproj.store.writer import write_array
from gradproj.store.zarr_arrays import open_array


def test_cut_replies_are_asked_for_again(bucket, s3_server, monkeypatch):
    values = np.arange(1000.0)
    write_array(path_of(f"{bucket}/store"), "sums", values)
    rates = {"cut": 0.4, "lost_after": 0.1, "500": 0.1}
    with fault_proxy(s3_server.url, seed=1, rates=rates) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url_of(proxy))
        for _ in range(5):
            array = open_array(path_of(f"{bucket}/store") / "sums")
            np.testing.assert_array_equal(array[...], values)
        assert proxy.met["cut"] > 2
