"""Parts of packed rows, and their decoding on a device."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from gradproj.kernels.device_copy import to_device
from gradproj.store import ProjectionStore

_SCALE = np.dtype("<f2")


def numbers_of(store: ProjectionStore, layers: Sequence[str]) -> list[int]:
    """Return the layers' positions among all of the store's."""
    position = {layer.name: number for number, layer in enumerate(store.layers)}
    return [position[name] for name in layers]


def scales_of(header: np.ndarray, numbers: Sequence[int]) -> np.ndarray:
    """Return the layers' scales ``(n, L)`` float32 from the headers ``(n, w)`` of rows."""
    with np.errstate(invalid="ignore"):  # signalling NaN, of rows that do not exist
        return header.view(_SCALE)[:, list(numbers)].astype(np.float32)


class DeviceDecoder:
    """Decodes packed rows by operations of torch, on whatever device they are.

    Args:
        store: its rows are packed.
        layers: names of the layers whose codes follow the header, in this order.
    """

    def __init__(self, store: ProjectionStore, layers: Sequence[str]) -> None:
        self._bits, self._header_width = store.layout.bits, store.layout.header_width
        self._numbers = torch.tensor(numbers_of(store, layers))
        widths = {x.name: x.slice_end - x.slice_start for x in store.layers}
        groups = groupby(widths[name] for name in layers)
        self._groups = [(width, len(list(group))) for width, group in groups]
        """Neighbours of one width: that, and how many."""

    def decode(self, stored: Tensor, row_scale: Tensor) -> Tensor:
        """Decode ``(n, bytes)`` uint8 with ``row_scale (n,)`` to ``(n, W)`` float32."""
        if self._numbers.device != stored.device:
            self._numbers = to_device(self._numbers, stored.device)
        header = stored[:, : self._header_width].contiguous().view(torch.float16)
        scales = header.index_select(1, self._numbers).float() * row_scale[:, None]
        shifts = torch.arange(0, 8, self._bits, dtype=torch.uint8, device=stored.device)
        rows, layer, at = [], 0, self._header_width
        for width, n_layers in self._groups:
            n_bytes = n_layers * -(-width * self._bits // 8)
            codes = stored[:, at : at + n_bytes].unflatten(1, (n_layers, -1))
            codes = (codes[..., None] >> shifts) & (2**self._bits - 1)
            values = codes.flatten(2)[:, :, :width].float() * 2 - (2**self._bits - 1)
            rows.append((values * scales[:, layer : layer + n_layers, None]).flatten(1))
            layer, at = layer + n_layers, at + n_bytes
        return torch.cat(rows, dim=1)
