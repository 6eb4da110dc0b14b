"""Rows encoded on a GPU: dense ones to the CPU's bits, packed ones to its codes but for few."""

import numpy as np
import pytest
import torch
from helpers.encoding import encode
from helpers.stores import make_layers, make_rows

from gradproj.store.layout import PACKED_BITS, StoreConfig, place_stored, plan_layout
from gradproj.store.row_encoder import RowEncoder

pytestmark = pytest.mark.gpu

CONFIGS = {
    **{t: StoreConfig(encoding="dense", proj_dtype=t) for t in ("float16", "bfloat16", "float32")},
    **{encoding: StoreConfig(encoding=encoding) for encoding in PACKED_BITS},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_rows_are_encoded_on_the_gpu_as_on_the_cpu(gpu, name):
    layout = plan_layout(100, [4096, 4096, 35], 8, CONFIGS[name])
    layers = place_stored(make_layers([(64, 64), (64, 64), (5, 7)]), layout)
    rows = make_rows(100, layout.dim)
    rows[1], rows[2, 100:4000] = 0, 0
    want, want_scale = encode(rows, layout, layers)
    on_gpu = RowEncoder(layout, layers).encode(torch.from_numpy(rows).to(gpu))
    stored, scale = (tensor.cpu().numpy() for tensor in on_gpu)
    np.testing.assert_array_equal(scale, want_scale)
    if not layout.is_packed:
        assert stored.tobytes() == want.tobytes()
        return
    header, want_header = (x[:, :6].copy().view("<f2").astype(np.float32) for x in (stored, want))
    np.testing.assert_allclose(header, want_header, rtol=2**-10)
    assert (stored[:, 6:] != want[:, 6:]).mean() < 1e-2
