"""Selections of a stored row: the elements of some layers, and how they decode."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.store.encoding import decode_into, decode_rows
from gradproj.store.layout import LayerSlice, StoreLayout
from gradproj.store.packing import PackedDecoder


@dataclass(frozen=True)
class Piece:
    """Values ``first`` to ``stop`` of each of ``n_chunks`` neighbouring chunks across."""

    first_chunk: int
    n_chunks: int
    first: int
    stop: int

    @property
    def width(self) -> int:
        return self.n_chunks * (self.stop - self.first)


@dataclass(frozen=True)
class Selection:
    """Elements of a stored row: as ``[start, end)`` ranges, and as pieces of chunks."""

    ranges: tuple[tuple[int, int], ...]
    width: int
    """Elements of a stored row."""
    pieces: tuple[Piece, ...]
    proj_dtype: str
    packed: PackedDecoder | None = None
    """Decodes packed rows; None for dense ones."""

    @property
    def decoded_width(self) -> int:
        """Values of a decoded row."""
        return self.packed.width if self.packed else self.width

    def decode(self, stored: np.ndarray, row_scale: np.ndarray) -> np.ndarray:
        """Decode ``(n, width)`` elements to ``(n, decoded_width)`` float32."""
        if self.packed:
            return self.packed.decode(stored, row_scale)
        return decode_rows(stored, row_scale, self.proj_dtype)

    def decode_into(self, stored: np.ndarray, row_scale: np.ndarray, out: np.ndarray) -> None:
        """Decode ``(n, width)`` elements into ``out`` ``(n, decoded_width)`` float32."""
        if self.packed:
            self.packed.decode_into(stored, row_scale, out)
        else:
            decode_into(stored, row_scale, self.proj_dtype, out)


def select_layers(
    layout: StoreLayout, layers: Sequence[LayerSlice], names: Sequence[str] | None
) -> Selection:
    """Return the selection of the named ones of a store's layers, one after the other.

    Of packed rows it begins with the header. Without names it is the whole stored row.
    """
    number_of = {layer.name: number for number, layer in enumerate(layers)}
    numbers = list(range(len(layers))) if names is None else [number_of[name] for name in names]
    chosen, packed = [layers[number] for number in numbers], None
    spans = [(layer.stored_start, layer.stored_end) for layer in chosen]
    if layout.is_packed:
        packed = PackedDecoder(chosen, numbers, layout.header_width, layout.bits)
        spans.insert(0, (0, layout.header_width))
    if names is None:
        spans = [(0, layout.stored_width)]
    return select_elements(layout, tuple(spans), packed)


def select_elements(
    layout: StoreLayout,
    ranges: tuple[tuple[int, int], ...],
    packed: PackedDecoder | None = None,
) -> Selection:
    """Return the selection of ``[start, end)`` ranges of a stored row, one after the other."""
    width = layout.chunk_width
    pieces: list[Piece] = []
    for start, end in ranges:
        for chunk in range(start // width, -(-end // width)):
            piece = Piece(chunk, 1, max(start - chunk * width, 0), min(end - chunk * width, width))
            last = pieces[-1] if pieces else None
            whole = last and last.width + piece.width == (last.n_chunks + 1) * width
            if last and whole and chunk == last.first_chunk + last.n_chunks:
                pieces[-1] = Piece(last.first_chunk, last.n_chunks + 1, 0, width)
            else:
                pieces.append(piece)
    n = sum(end - start for start, end in ranges)
    return Selection(ranges, n, tuple(pieces), layout.proj_dtype, packed)
