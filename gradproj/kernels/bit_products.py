"""Products of packed codes with vectors, straight from the bits, compiled by numba for the CPU.

A code of b bits stands for ``2 code - (2^b - 1)``, which is ``sum_j 2^j s_j`` with ``s_j = +1`` for
a set bit j and -1 for another. So codes of any width are signs, each with its own weight, and there
are two kernels for all of them:

- few vectors, or few rows: the weights of the set bits are added, 16 at a time under the mask that
  two bytes of codes are. The sum of the signs is twice that minus the sum of all weights.
- else: for every four bits, the 16 possible sums are made for 16 vectors at once (method of the
  four Russians). A row then costs one load and one addition for each of its half bytes.

Both read every byte of codes from the cache once per 16 vectors, and sum a layer in float32.
"""

from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import float32, float64, int64, types, uint8
from numba.extending import intrinsic

from gradproj.kernels.compiled import compiled

_LANES = 16
"""Floats of a vector: a register of AVX-512, two or four of another instruction set."""
_MASK_QUERIES = 3
"""Most vectors for which the masked sums are faster than tables."""
_TABLE_ROWS = 32
"""Fewest rows that are worth the tables."""
_ROWS = 4
"""Rows whose masked sums are computed together: each load of weights serves all."""
_WORD = 8
"""Bytes of codes whose tables fit a core's first cache: 16 kB."""
_ROWS_PER_THREAD = 64

_FLOAT, _INT = ir.FloatType(), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, _LANES)
_VECTOR_BYTES = 4 * _LANES
_TABLE_BYTES = 16 * _VECTOR_BYTES


def _inlined(function: Any) -> Any:
    return intrinsic(function)  # numba's types hide the first argument's absence from mypy


def _number(value: int) -> ir.Constant:
    return ir.Constant(_INT, value)


def _load(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    pointer = builder.inttoptr(builder.add(address, offset), kind.as_pointer())
    return builder.load(pointer, align=1)


def _store(builder: Any, value: Any, address: Any, offset: int) -> None:
    pointer = builder.inttoptr(builder.add(address, _number(offset)), value.type.as_pointer())
    builder.store(value, pointer, align=1)


@_inlined
def _masked_sums(typing, codes, stride, weights, n_pairs, out):
    """Write the sums of the weights of set bits, ``out (_ROWS, _LANES)``.

    Row k's codes are ``n_pairs`` pairs of bytes at ``codes + k stride``; ``weights`` has a float
    for each bit. Arguments are addresses, bytes and numbers.
    """
    signature = types.void(types.uintp, types.intp, types.uintp, types.intp, types.uintp)

    def generate(context, builder, signature, arguments):
        codes, stride, weights, n_pairs, out = arguments
        zero = ir.Constant(_VECTOR, [ir.Constant(_FLOAT, 0.0)] * _LANES)
        before = builder.block
        loop, after = builder.append_basic_block(), builder.append_basic_block()
        builder.branch(loop)
        builder.position_at_end(loop)
        number = builder.phi(_INT)
        sums = [builder.phi(_VECTOR) for _ in range(_ROWS)]
        weight = _load(builder, weights, builder.mul(number, _number(_VECTOR_BYTES)), _VECTOR)
        added = []
        for k, before_it in enumerate(sums):
            at = builder.add(builder.mul(stride, _number(k)), builder.mul(number, _number(2)))
            bits = _load(builder, codes, at, ir.IntType(_LANES))
            mask = builder.bitcast(bits, ir.VectorType(ir.IntType(1), _LANES))
            added.append(builder.fadd(before_it, builder.select(mask, weight, zero)))
        following = builder.add(number, _number(1))
        number.add_incoming(_number(0), before)
        number.add_incoming(following, loop)
        for value, result in zip(sums, added, strict=True):
            value.add_incoming(zero, before)
            value.add_incoming(result, loop)
        builder.cbranch(builder.icmp_signed("<", following, n_pairs), loop, after)
        builder.position_at_end(after)
        for k, result in enumerate(added):
            _store(builder, result, out, k * _VECTOR_BYTES)
        return context.get_dummy_value()

    return signature, generate


@_inlined
def _fill_table(typing, table, weights):
    """Write the 16 sums ``(16, _LANES)`` of four weights ``(4, _LANES)`` by their bits' signs."""
    signature = types.void(types.uintp, types.uintp)

    def generate(context, builder, signature, arguments):
        table, weights = arguments
        loaded = [_load(builder, weights, _number(j * _VECTOR_BYTES), _VECTOR) for j in range(4)]
        total = builder.fadd(builder.fadd(*loaded[:2]), builder.fadd(*loaded[2:]))
        sums = [builder.fneg(total)]
        for weight in loaded:
            twice = builder.fadd(weight, weight)
            sums += [builder.fadd(value, twice) for value in sums]
        for code, value in enumerate(sums):
            _store(builder, value, table, code * _VECTOR_BYTES)
        return context.get_dummy_value()

    return signature, generate


def _add_from_tables(n_bytes: int) -> Any:
    """Return the function that adds the table entries of ``n_bytes`` bytes of a row's codes."""

    @_inlined
    def add(typing, sums, codes, tables):
        signature = types.void(types.uintp, types.uintp, types.uintp)

        def generate(context, builder, signature, arguments):
            sums, codes, tables = arguments
            word = _load(builder, codes, _number(0), ir.IntType(8 * n_bytes))
            word = builder.zext(word, _INT) if n_bytes < 8 else word
            values = []
            for j in range(2 * n_bytes):
                # Half byte j, times the bytes of a vector, which are 2^6.
                shift = 4 * j - 6
                moved = (
                    builder.shl(word, _number(-shift))
                    if shift < 0
                    else builder.lshr(word, _number(shift))
                )
                at = builder.and_(moved, _number(15 * _VECTOR_BYTES))
                at = builder.add(at, _number(j * _TABLE_BYTES))
                values.append(_load(builder, tables, at, _VECTOR))
            while len(values) > 1:
                pairs = zip(values[::2], values[1::2], strict=True)
                values = [builder.fadd(one, other) for one, other in pairs]
            before = _load(builder, sums, _number(0), _VECTOR)
            _store(builder, builder.fadd(before, values[0]), sums, 0)
            return context.get_dummy_value()

        return signature, generate

    return add


_add_word, _add_byte = _add_from_tables(_WORD), _add_from_tables(1)


_CODES, _SCALES = types.Array(uint8, 2, "A"), types.Array(float32, 2, "A")
_SPANS, _PRODUCTS = int64[:, ::1], float64[:, ::1]


@compiled(
    types.void(_CODES, _SPANS, types.Array(float32, 2, "A"), _PRODUCTS, int64, _SCALES, _PRODUCTS)
)
def _add_by_masks(codes, spans, weights, totals, bits, scales, products):
    """Add to ``products (n, lanes)``; ``weights (lanes, V)``, and their sums over each span."""
    n, stride, longest = codes.shape[0], codes.strides[0], 0
    for start, stop, _, _ in spans:
        longest = max(longest, stop - start)
    of_bits, sums = np.empty(8 * longest, np.float32), np.empty((_ROWS, _LANES), np.float32)
    for span, (start, stop, layer, value) in enumerate(spans):
        sums[:] = 0  # in case there is no pair of bytes
        for query in range(totals.shape[1]):
            for j in range(bits):
                for i in range(8 * (stop - start) // bits):
                    of_bits[i * bits + j] = weights[query, value + i] * np.float32(1 << j)
            row = 0
            while row < n:
                group = _ROWS if row + _ROWS <= n else 1
                if stop - start > 1:
                    _masked_sums(
                        codes.ctypes.data + row * stride + start,
                        stride if group > 1 else 0,
                        of_bits.ctypes.data,
                        (stop - start) // 2,
                        sums.ctypes.data,
                    )
                for k in range(group):
                    of_row = np.float32(0)
                    for lane in range(_LANES):
                        of_row += sums[k, lane]
                    if (stop - start) % 2:
                        last = codes[row + k, stop - 1]
                        for j in range(8):
                            if (last >> j) & 1:
                                of_row += of_bits[8 * (stop - 1 - start) + j]
                    signed = 2 * np.float64(of_row) - totals[span, query]
                    products[row + k, query] += signed * scales[row + k, layer]
                row += group


@compiled(types.void(_CODES, _SPANS, float32[:, ::1], int64, _SCALES, _PRODUCTS))
def _add_by_tables(codes, spans, weights, bits, scales, products):
    """Add to ``products (n, _LANES)``; ``weights (V, _LANES)``."""
    n, stride = codes.shape[0], codes.strides[0]
    sums = np.empty((n, _LANES), np.float32)
    tables, four = np.empty((2 * _WORD * 16, _LANES), np.float32), np.empty((4, _LANES), np.float32)
    for start, stop, layer, value in spans:
        sums[:] = 0
        for byte in range(start, stop, _WORD):
            n_bytes = min(_WORD, stop - byte)
            for half in range(2 * n_bytes):
                bit = 8 * (byte - start) + 4 * half
                of_four = weights.ctypes.data + (value + bit // bits) * _VECTOR_BYTES
                if bits > 1:
                    of_four = four.ctypes.data
                    for j in range(4):
                        factor = np.float32(1 << ((bit + j) % bits))
                        for lane in range(_LANES):
                            four[j, lane] = weights[value + (bit + j) // bits, lane] * factor
                _fill_table(tables.ctypes.data + half * _TABLE_BYTES, of_four)
            for row in range(n):
                at = codes.ctypes.data + row * stride + byte
                of_row = sums.ctypes.data + row * _VECTOR_BYTES
                if n_bytes == _WORD:
                    _add_word(of_row, at, tables.ctypes.data)
                else:
                    for b in range(n_bytes):
                        _add_byte(of_row, at + b, tables.ctypes.data + 2 * b * _TABLE_BYTES)
        for row in range(n):
            scale = np.float64(scales[row, layer])
            for lane in range(_LANES):
                products[row, lane] += sums[row, lane] * scale
    tables[0, 0] = four[0, 0]  # keeps both alive, since their addresses alone do not


class BitProducts:
    """Multiplies vectors with the packed codes of several layers.

    Args:
        weights: the vectors, ``(Q, D)`` float32, D the values of the layers one after another.
        widths: values of each layer.
        bits: bits of a value's code, 1, 2, 4 or 8. A layer's codes fill whole bytes.
    """

    def __init__(self, weights: np.ndarray, widths: list[int], bits: int) -> None:
        self._bits, self._n_queries = bits, len(weights)
        n_bytes = [-(-width * bits // 8) for width in widths]
        self._stops = list(accumulate(n_bytes))  # of each layer, in bytes of the codes of all
        self._n_threads = torch.get_num_threads()
        self._threads = ThreadPoolExecutor(self._n_threads) if self._n_threads > 1 else None
        self._few = self._n_queries <= _MASK_QUERIES
        self._n_lanes = self._n_queries if self._few else _LANES
        self._blocks: list[np.ndarray] = []
        """``(lanes, V)`` for few vectors, ``(V, lanes)`` for more; V counts places in the bytes."""
        firsts = [(stop - n) * 8 // bits for stop, n in zip(self._stops, n_bytes, strict=True)]
        for query in range(0, self._n_queries, self._n_lanes):
            of_block = weights[query : query + self._n_lanes].T
            block, at = np.zeros((self._stops[-1] * 8 // bits, self._n_lanes), np.float32), 0
            for width, first in zip(widths, firsts, strict=True):
                block[first : first + width, : of_block.shape[1]] = of_block[at : at + width]
                at += width
            self._blocks.append(np.ascontiguousarray(block.T) if self._few else block)
        self._spans: dict[tuple[int, int], tuple[np.ndarray, list[np.ndarray]]] = {}

    def zeros(self, n: int) -> np.ndarray:
        """Return the products of ``n`` rows before anything is added: ``(blocks, n, lanes)``."""
        return np.zeros((len(self._blocks), n, self._n_lanes))

    def by_row(self, products: np.ndarray) -> np.ndarray:
        """Return finished products as ``(n, Q)`` float64."""
        return products.transpose(1, 0, 2).reshape(products.shape[1], -1)[:, : self._n_queries]

    def add(self, codes: np.ndarray, at: int, scales: np.ndarray, products: np.ndarray) -> None:
        """Add the products with some bytes of rows.

        Args:
            codes: ``(n, w)`` uint8: the bytes ``at`` to ``at + w`` of the rows' codes.
            at: a position in the codes of all layers.
            scales: ``(n, L)`` float32: the factor of each row's values in each layer.
            products: of ``zeros``, to which is added.
        """
        spans = self._spans_of(at, codes.shape[1])
        n_parts = min(self._n_threads, max(1, len(codes) // _ROWS_PER_THREAD))
        if n_parts == 1 or self._threads is None:
            self._add(spans, codes, scales, products)
            return
        cuts = np.linspace(0, len(codes), n_parts + 1).astype(int).tolist()
        parts = [
            self._threads.submit(self._add, spans, codes[a:b], scales[a:b], products[:, a:b])
            for a, b in pairwise(cuts)
        ]
        for part in parts:
            part.result()

    def _add(
        self,
        spans: tuple[np.ndarray, list[np.ndarray]],
        codes: np.ndarray,
        scales: np.ndarray,
        products: np.ndarray,
    ) -> None:
        bits, by_masks = self._bits, self._few or len(codes) < _TABLE_ROWS
        for weights, totals, of_block in zip(self._blocks, spans[1], products, strict=True):
            if by_masks:
                by_query = weights if self._few else weights.T
                _add_by_masks(codes, spans[0], by_query, totals, bits, scales, of_block)
            else:
                _add_by_tables(codes, spans[0], weights, bits, scales, of_block)

    def _spans_of(self, at: int, width: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return every layer's part of some bytes, and the sums of the weights of its bits.

        The parts are ``(start, stop, layer, first value)``: start and stop count from the first of
        these bytes, values in what ``_blocks`` hold. The sums are ``(parts, queries)`` float64 for
        each block.
        """
        if (at, width) not in self._spans:
            found, begin = [], 0
            for layer, end in enumerate(self._stops):
                start, stop = max(begin, at), min(end, at + width)
                if start < stop:
                    found.append((start - at, stop - at, layer, start * 8 // self._bits))
                begin = end
            totals = [np.empty((len(found), self._n_lanes)) for _ in self._blocks]
            for span, (start, stop, _, value) in enumerate(found):
                values = slice(value, value + (stop - start) * 8 // self._bits)
                for block, total in zip(self._blocks, totals, strict=True):
                    of_span = block[:, values].T if self._few else block[values]
                    total[span] = of_span.sum(axis=0, dtype=np.float64) * (2**self._bits - 1)
            self._spans[at, width] = np.array(found, np.int64).reshape(-1, 4), totals
        return self._spans[at, width]
