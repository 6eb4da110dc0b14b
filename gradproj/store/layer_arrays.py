"""Flat arrays that hold two small arrays a layer: one of its input, one of its output."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from gradproj.store.layout import LayerSlice

Pair = tuple[np.ndarray, np.ndarray]
Shapes = tuple[tuple[int, ...], tuple[int, ...]]

LAYER_ARRAYS: dict[str, tuple[np.dtype, Callable[[LayerSlice], Shapes]]] = {
    "projection_matrices": (np.dtype(np.float32), lambda x: ((x.k_i, x.n_i), (x.k_o, x.n_o))),
    "basis_matrices": (np.dtype(np.float32), lambda x: ((x.k_i, x.k_i), (x.k_o, x.k_o))),
    "basis_eigenvalues": (np.dtype(np.float64), lambda x: ((x.k_i,), (x.k_o,))),
}
"""Array -> its type, and the shapes of a layer's two parts: ``P_i``, ``P_o``; ``R_i``, ``R_o``;
``E_i``, ``E_o``."""


def pack_layers(name: str, layers: Sequence[LayerSlice], pairs: Mapping[str, Pair]) -> np.ndarray:
    """Join every layer's two arrays, in order, to the flat array ``name``.

    Raises:
        ValueError: an array's shape is not the layer's.
    """
    dtype, shapes = LAYER_ARRAYS[name]
    parts = [np.empty(0, dtype)]
    for layer in layers:
        pair = pairs[layer.name]
        if tuple(part.shape for part in pair) != shapes(layer):
            raise ValueError(
                f"{name} of {layer.name} are {pair[0].shape} and {pair[1].shape}, but it is {layer}"
            )
        parts += [np.asarray(part, dtype).reshape(-1) for part in pair]
    return np.concatenate(parts)


def unpack_layers(name: str, layers: Sequence[LayerSlice], flat: np.ndarray) -> dict[str, Pair]:
    """Split what ``pack_layers`` joined: each layer's two arrays, by its name.

    Raises:
        ValueError: the flat array is too short.
    """
    _, shapes = LAYER_ARRAYS[name]
    pairs, at = {}, 0
    for layer in layers:
        parts = []
        for shape in shapes(layer):
            end = at + int(np.prod(shape))
            if end > len(flat):
                raise ValueError(f"it ends before those of layer {layer.name}")
            parts.append(flat[at:end].reshape(shape))
            at = end
        pairs[layer.name] = (parts[0], parts[1])
    return pairs
