"""Products from the bits equal those of decoded codes in float64."""

import numpy as np
import pytest
import torch

from gradproj.kernels.bit_products import BitProducts

WIDTHS = [15, 64, 7, 33, 128]
"""Layers that end inside a byte, inside a pair of bytes and inside a word."""


def make(bits, n_queries, n, seed=0):
    """Random ``(weights, codes, scales)``, and the products and their sizes in float64."""
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((n_queries, sum(WIDTHS)), np.float32)
    n_bytes = [-(-width * bits // 8) for width in WIDTHS]
    codes = generator.integers(0, 256, (n, sum(n_bytes)), np.uint8)
    scales = generator.random((n, len(WIDTHS)), np.float32)
    products, sizes, byte, value = np.zeros((n, n_queries)), np.zeros((n, n_queries)), 0, 0
    for layer, (width, size) in enumerate(zip(WIDTHS, n_bytes, strict=True)):
        unpacked = np.unpackbits(codes[:, byte : byte + size], axis=1, bitorder="little")
        of_value = unpacked[:, : width * bits].reshape(n, width, bits).astype(float)
        rows = (of_value @ 2.0 ** np.arange(bits)) * 2 - (2**bits - 1)
        of_layer, scale = weights[:, value : value + width].astype(float), scales[:, [layer]]
        products += rows @ of_layer.T * scale
        sizes += np.abs(rows) @ np.abs(of_layer).T * scale
        byte, value = byte + size, value + width
    return weights, codes, scales, products, sizes


@pytest.mark.parametrize("n", [1, 6, 70], ids=lambda n: f"{n}-rows")
@pytest.mark.parametrize("n_queries", [1, 3, 5, 16, 40])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_products_equal_those_of_decoded_rows(bits, n_queries, n):
    weights, codes, scales, expected, sizes = make(bits, n_queries, n)
    products = BitProducts(weights, WIDTHS, bits)
    for width in (codes.shape[1], 7):  # all bytes at once, and a few at a time
        got = products.zeros(n)
        for at in range(0, codes.shape[1], width):
            products.add(codes[:, at : at + width], at, scales, got)
        assert (np.abs(products.by_row(got) - expected) / sizes).max() < 5e-7


def test_rows_without_scale_have_no_products():
    weights, codes, scales, *_ = make(1, 5, 40)
    scales[3] = np.nan
    products = BitProducts(weights, WIDTHS, 1)
    got = products.zeros(40)
    products.add(codes, 0, scales, got)
    assert np.flatnonzero(np.isnan(products.by_row(got)).any(axis=1)).tolist() == [3]


@pytest.mark.parametrize("n_queries", [1, 16])
def test_threads_share_the_rows(monkeypatch, n_queries):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    weights, codes, scales, expected, sizes = make(1, n_queries, 300)
    products = BitProducts(weights, WIDTHS, 1)
    got = products.zeros(300)
    products.add(codes, 0, scales, got)
    assert (np.abs(products.by_row(got) - expected) / sizes).max() < 5e-7
