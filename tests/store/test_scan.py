"""A scan by bands yields every stored value once, from any layout."""

import os
import re

import pytest
from helpers.reader_laws import joined_bands
from helpers.stores import MANY_CHUNKS, Output

from gradproj.errors import StoreError
from gradproj.store import ProjectionStore


def test_band_lies_in_one_chunk_and_one_shard(tmp_path):
    Output(tmp_path, **MANY_CHUNKS).fill()
    bands = list(ProjectionStore(tmp_path).scan_bands(start=3))
    assert [(band.first, band.last) for band in bands] == [
        (3, 32),
        (32, 64),
        (64, 96),
        (96, 128),
        (128, 150),
    ]


def test_shard_truncated_after_it_was_opened_is_reported(tmp_path):
    output = Output(tmp_path).fill()
    path = output.path / output.layout.shard_name(1)
    store = ProjectionStore(tmp_path)
    store.rows([20])
    os.truncate(path, 70)
    with pytest.raises(
        StoreError, match=re.escape(f"{path} is damaged: it ends at byte 70, inside a chunk")
    ):
        joined_bands(store)
