"""Packed rows: every code is that of the nearest level, and decoding follows the definition."""

import numpy as np
import pytest
from helpers.encoding import decode, encode
from helpers.stores import make_layers, make_rows

from gradproj.store.layout import PACKED_BITS, StoreConfig, place_stored, plan_layout
from gradproj.store.selection import select_layers

ODD = ((3, 5), (1, 7), (4, 1), (2, 2), (2, 2))
SCALES = {
    "signs": lambda x: np.abs(x).mean(),
    "int2": lambda x: 0.4978 * np.sqrt((x**2).mean()),
    "int4": lambda x: 0.1676 * np.sqrt((x**2).mean()),
    "int8": lambda x: np.abs(x).max() / 255,
}


def packed_store(encoding, widths=ODD):
    """A layout for rows of these layers, and the layers."""
    config = StoreConfig(encoding=encoding, rows_per_shard=16)
    layout = plan_layout(40, [k_o * k_i for k_o, k_i in widths], 8, config)
    return layout, place_stored(make_layers(list(widths)), layout)


def reader_decodes(stored, row_scale, layout, layers, names=None):
    """Decode with the reader's code."""
    selection = select_layers(layout, layers, names)
    out = np.empty((len(stored), selection.decoded_width), np.float32)
    selection.decode_into(stored, row_scale, out)
    return out


@pytest.fixture(params=PACKED_BITS)
def encoding(request):
    return request.param


@pytest.mark.parametrize("widths", [ODD, ((16, 16),) * 3, ((9, 1),), ((64, 16), (64, 16), (5, 5))])
def test_codes_are_those_of_the_nearest_levels_and_scales_of_the_definition(encoding, widths):
    layout, layers = packed_store(encoding, widths)
    rows = make_rows(30, layout.dim)
    stored, row_scale = encode(rows, layout, layers)
    assert stored.shape == (30, layout.stored_width)
    assert stored.dtype == np.uint8
    assert (np.frexp(row_scale)[0] == 0.5).all()
    decoded = decode(stored, row_scale, layout, layers).astype(np.float64)
    header = stored[:, : 2 * len(layers)].copy().view("<f2").astype(np.float64)
    largest = header.max(axis=1)
    assert ((largest >= 2**14) & (largest <= 2**15)).all()
    levels = 2 * np.arange(2**layout.bits) - (2**layout.bits - 1)
    for number, layer in enumerate(layers):
        values = slice(layer.slice_start, layer.slice_end)
        scales = header[:, number] * row_scale
        want = [SCALES[encoding](row[values].astype(np.float64)) for row in rows]
        np.testing.assert_allclose(scales, want, rtol=2**-11 + 1e-6)
        of_levels = np.abs(rows[:, values, None] - levels * scales[:, None, None])
        nearest = of_levels.min(axis=2)
        error = np.abs(rows[:, values] - decoded[:, values])
        assert (error <= nearest + 1e-6 * scales[:, None]).all()


def test_reader_decodes_by_the_definition(encoding):
    for widths in (ODD, ((16, 16),) * 3, ((3, 3), (8, 8), (8, 8), (3, 3))):
        layout, layers = packed_store(encoding, widths)
        stored, row_scale = encode(make_rows(9, layout.dim), layout, layers)
        want = decode(stored, row_scale, layout, layers)
        got = reader_decodes(stored, row_scale, layout, layers)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("power", [-95, -60, 60, 111])
def test_codes_do_not_depend_on_the_size_of_a_row(encoding, power):
    layout, layers = packed_store(encoding)
    rows = np.random.default_rng(0).standard_normal((20, layout.dim), np.float32)
    stored, row_scale = encode(rows, layout, layers)
    again, scale = encode(np.ldexp(rows, power), layout, layers)
    np.testing.assert_array_equal(again, stored)
    np.testing.assert_array_equal(scale, np.ldexp(row_scale, power))


def test_extreme_rows_keep_their_direction(encoding):
    layout, layers = packed_store(encoding)
    rows = np.random.default_rng(0).choice([-1, 1], (3, layout.dim)).astype(np.float32)
    rows *= np.array([[2e38], [2e-38], [1e-41]], np.float32)
    stored, row_scale = encode(rows, layout, layers)
    got = reader_decodes(stored, row_scale, layout, layers).astype(np.float64)
    # Two and four bits have no level at the deviation: 1.49 and 0.84 or 1.17 of it.
    most = {"signs": 1e-3, "int2": 0.5, "int4": 0.2, "int8": 1e-2}[encoding]
    np.testing.assert_allclose(got[:2], rows[:2], rtol=most)
    assert (np.sign(got[2]) == np.sign(rows[2])).all()


def test_zero_rows_and_zero_layers_decode_to_zero(encoding):
    layout, layers = packed_store(encoding)
    rows = make_rows(4, layout.dim)
    rows[1] = 0
    rows[2, layers[0].slice_start : layers[0].slice_end] = 0
    stored, row_scale = encode(rows, layout, layers)
    got = reader_decodes(stored, row_scale, layout, layers)
    assert row_scale[1] == 1
    assert (got[1] == 0).all()
    assert (got[2, : layers[0].slice_end] == 0).all()
    assert (got[2, layers[0].slice_end :] != 0).all()
    assert (got[[0, 3]] != 0).all()


def test_a_row_of_the_fill_decodes_to_nan_in_every_layer(encoding):
    layout, layers = packed_store(encoding)
    rows = make_rows(3, layout.dim)
    rows[1, 4] = np.inf
    stored, row_scale = encode(rows, layout, layers)
    assert row_scale[1] == 1
    stored[1] = layout.fill
    got = reader_decodes(stored, row_scale, layout, layers)
    assert np.isnan(got[1]).all()
    assert np.isfinite(got[[0, 2]]).all()
    got = reader_decodes(stored, np.full(3, np.nan, np.float32), layout, layers)
    assert np.isnan(got).all()


def test_value_j_has_the_bits_from_j_b_on_in_little_order():
    layout, layers = packed_store("int2", ((1, 5),))
    rows = np.array([[-9, -0.1, 0.1, 9, -9]], np.float32)
    stored, _ = encode(rows, layout, layers)
    assert stored[0, 2:].tolist() == [0b11_10_01_00, 0b00]


def test_encoding_leaves_what_follows_the_layers_zero():
    config = StoreConfig(encoding="signs", rows_per_shard=16)
    layout = plan_layout(40, [1024] * 60, 8, config, more_bytes=100)
    layers = place_stored(make_layers([(32, 32)] * 60), layout)
    stored, _ = encode(make_rows(2, layout.dim), layout, layers)
    assert layout.header_width > 120
    assert not stored[:, 120 : layout.header_width].any()
    assert layout.stored_width >= layers[-1].stored_end + 100
    assert not stored[:, layers[-1].stored_end :].any()
