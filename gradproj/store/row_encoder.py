"""Encoding of float32 rows for storage, in torch, on the device that holds the rows.

Readers do not import this module: they decode in numpy (``packing.py``, ``encoding.py``).
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from gradproj.store.chunk_shapes import SCALE_BYTES
from gradproj.store.layout import NAN_BITS, LayerSlice, StoreLayout

_HALF_STEPS = {2: 0.4978, 4: 0.1676}
"""Bits -> half the step of the best uniform quantizer of a Gaussian of deviation 1 (J. Max,
Quantizing for minimum distortion, 1960)."""
_VALUES_PER_STEP = 2**18  # on the CPU, where the temporaries then stay in the cache
_VALUES_PER_STEP_ON_DEVICE = 2**24  # three temporaries of 64 MB
_MIN_EXPONENT = -126  # of a normal float32: a denormal scale could be flushed to zero


class RowEncoder:
    """Encodes rows of one store.

    Dense rows: float16 rows are divided by a power of two that brings their largest magnitude into
    [2^14, 2^15), so that rows of any size keep 11 bits, and division and multiplication are exact.
    The scale is at least 2^-126 (for a largest magnitude under 2^-111). bfloat16 rows are rounded
    to nearest even, and have scale 1 as float32 rows do.

    Packed rows have a header of the layers' scales and codes of b bits; see ``packing.py``. The
    scale of a layer is mean |x| (b = 1), the half step of the best uniform quantizer of a Gaussian
    with the layer's root mean square (b = 2, 4), or max |x| / 255 (b = 8). ``row_scale`` is the
    power of two that brings the largest of them into [2^14, 2^15).

    Rows of zeros and rows with a NaN or infinity have scale 1. What is stored of the latter means
    nothing: callers fill them with ``layout.fill``.

    Args:
        layout: of the store.
        layers: all layers, placed by ``place_stored``.
    """

    def __init__(self, layout: StoreLayout, layers: Sequence[LayerSlice]) -> None:
        self._layout = layout
        self._groups: list[_Group] = []
        number = 0
        for width, group in groupby(layers, lambda x: x.slice_end - x.slice_start):
            members = list(group)
            self._groups.append(_Group(number, members, width, layout.bits))
            number += len(members)

    def encode(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Encode ``(n, D)`` float32 rows.

        Returns:
            The stored rows ``(n, stored_width)`` on the rows' device (bfloat16 as uint16 bits;
            float32 rows are not copied) and ``row_scale`` ``(n,)`` float32.
        """
        row_scale = torch.ones(len(rows), device=rows.device)
        if self._layout.proj_dtype == "float32":
            return rows, row_scale
        dtype = {"float16": torch.float16, "bfloat16": torch.uint16}
        stored = torch.zeros(
            (len(rows), self._layout.stored_width),
            dtype=dtype.get(self._layout.proj_dtype, torch.uint8),
            device=rows.device,
        )
        encode = self._encode_packed if self._layout.is_packed else self._encode_dense
        for step in _steps(rows):
            encode(rows[step], stored[step], row_scale[step])
        return stored, row_scale

    def _encode_dense(self, rows: Tensor, stored: Tensor, row_scale: Tensor) -> None:
        if self._layout.proj_dtype == "bfloat16":
            bits = rows.to(torch.bfloat16).view(torch.int16)
            stored.view(torch.int16).copy_(bits.masked_fill_(rows.isnan(), NAN_BITS))
            return
        exponents, scalable = _exponents(rows)
        exponents = torch.where(scalable, (exponents - 15).clamp_min(_MIN_EXPONENT), 0)
        row_scale.copy_(_power_of_two(exponents))
        stored.copy_(rows * _power_of_two(-exponents)[:, None])

    def _encode_packed(self, rows: Tensor, stored: Tensor, row_scale: Tensor) -> None:
        # Rows are brought near 1 first: squares of small ones would vanish, of large ones overflow.
        exponents, scalable = _exponents(rows)
        exponents = torch.where(scalable, exponents, 0).clamp(_MIN_EXPONENT, -_MIN_EXPONENT)
        rows = rows * _power_of_two(-exponents)[:, None]
        n_layers = sum(group.n for group in self._groups)
        scales = torch.empty(len(rows), n_layers, device=rows.device)
        for group in self._groups:
            scales[:, group.numbers] = group.scales(rows)
        largest, scalable = _exponents(scales)
        shift = torch.where(scalable, (exponents + largest - 15).clamp_min(_MIN_EXPONENT), 0)
        row_scale.copy_(_power_of_two(shift))
        halves = (scales * _power_of_two(exponents - shift)[:, None]).to(torch.float16)
        stored[:, : SCALE_BYTES * n_layers] = halves.view(torch.uint8)
        scales = halves.float() * _power_of_two(shift - exponents)[:, None]
        for group in self._groups:
            stored[:, group.places] = group.codes(rows, scales[:, group.numbers])


class _Group:
    """Neighbouring layers of one width: the scales and codes of all of them at once."""

    def __init__(self, number: int, layers: list[LayerSlice], width: int, bits: int) -> None:
        self.n, self._width, self._bits = len(layers), width, bits
        self.numbers = slice(number, number + self.n)
        self.places = slice(layers[0].stored_start, layers[-1].stored_end)
        self._values = slice(layers[0].slice_start, layers[-1].slice_end)

    def _of(self, rows: Tensor) -> Tensor:
        """Return the layers' values ``(n, layers, width)``."""
        return rows[:, self._values].unflatten(1, (self.n, self._width))

    def scales(self, rows: Tensor) -> Tensor:
        """Return the layers' scales ``(n, layers)``, not rounded."""
        values = self._of(rows)
        if self._bits == 1:
            return torch.linalg.vector_norm(values, 1, dim=2) / self._width
        if self._bits == 8:
            return torch.linalg.vector_norm(values, torch.inf, dim=2) / 255
        rms = torch.linalg.vector_norm(values, 2, dim=2) / self._width**0.5
        return rms * _HALF_STEPS[self._bits]

    def codes(self, rows: Tensor, scales: Tensor) -> Tensor:
        """Return the layers' packed codes ``(n, bytes)``, each that of the nearest level."""
        values, half = self._of(rows), 2 ** (self._bits - 1)
        if self._bits == 1:
            codes = (values >= 0).to(torch.uint8)
        else:
            steps = 2 * torch.where(scales > 0, scales, 1)
            codes = (values / steps[:, :, None]).floor_().add_(half)
            codes = codes.clamp_(0, 2 * half - 1).to(torch.uint8)
        each = 8 // self._bits
        codes = torch.nn.functional.pad(codes, (0, -self._width % each))
        packed = codes[:, :, ::each].clone()
        for place in range(1, each):
            packed |= codes[:, :, place::each] << (self._bits * place)
        return packed.flatten(1)


def _exponents(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exponent of each row's largest magnitude, int32, and whether it has one.

    The magnitude is in ``[2^(exponent - 1), 2^exponent)``. Rows of zeros and rows with a NaN or
    infinity have none.
    """
    largest = torch.linalg.vector_norm(rows, torch.inf, dim=1)
    return torch.frexp(largest).exponent, largest.isfinite() & (largest > 0)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Return ``2^exponents`` float32, exactly, for int32 exponents from -126 to 127."""
    return ((exponents + 127) << 23).view(torch.float32)


def _steps(rows: Tensor) -> Iterator[slice]:
    values = _VALUES_PER_STEP if rows.device.type == "cpu" else _VALUES_PER_STEP_ON_DEVICE
    n = max(1, values // max(1, rows.shape[1]))
    return (slice(start, start + n) for start in range(0, len(rows), n))
