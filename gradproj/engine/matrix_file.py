"""Projection matrices of one's own: the file of ``--matrices``; do matrices fit a layer?"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from gradproj.errors import ConfigError
from gradproj.formatting import count, listed
from gradproj.store.layout import LayerSlice

Matrices = Mapping[str, tuple[Tensor, Tensor]] | Mapping[str, tuple[np.ndarray, np.ndarray]]
"""Layer -> ``(P_i (k_i, n_i), P_o (k_o, n_o))``, float32."""


def read_matrices(path: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return layer -> ``(P_i (k_i, n_i), P_o (k_o, n_o))``, float32 on the CPU.

    Raises:
        ConfigError: the file cannot be read, a matrix lacks its other side, is none, or holds
            values that are not finite.
    """
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"--matrices {path} cannot be read: {error}") from error
    for key, tensor in tensors.items():
        layer, _, side = key.rpartition(".")
        if not layer or side not in ("p_i", "p_o"):
            raise ConfigError(f"--matrices {path}: {key!r} is not named LAYER.p_i or LAYER.p_o")
        other = f"{layer}.{'p_o' if side == 'p_i' else 'p_i'}"
        if other not in tensors:
            raise ConfigError(f"--matrices {path}: it holds {key}, but no {other}")
        if tensor.dim() != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
            raise ConfigError(
                f"--matrices {path}: {key} is {tensor.dtype} {tuple(tensor.shape)}; it must be a "
                "matrix of floating-point numbers"
            )
        if not torch.isfinite(tensor.float()).all():
            raise ConfigError(f"--matrices {path}: {key} holds values that are not finite")
    layers = dict.fromkeys(key.rpartition(".")[0] for key in tensors)
    return {x: (tensors[f"{x}.p_i"].float(), tensors[f"{x}.p_o"].float()) for x in layers}


def given_widths(matrices: Matrices, layer: str, n_i: int, n_o: int) -> tuple[int, int]:
    """Return ``(k_i, k_o)`` of given matrices; ``ConfigError`` if they do not fit the layer."""
    if layer not in matrices:
        raise ConfigError(
            f"the given matrices have none for layer {layer}: add {layer}.p_i and {layer}.p_o, or "
            "choose fewer layers by --proj_layers"
        )
    p_i, p_o = matrices[layer]
    if len(p_i.shape) != 2 or len(p_o.shape) != 2 or (p_i.shape[1], p_o.shape[1]) != (n_i, n_o):
        raise ConfigError(
            f"the given matrices of layer {layer} are {tuple(p_i.shape)} and {tuple(p_o.shape)}; "
            f"p_i must be (k_i, {n_i}) and p_o (k_o, {n_o})"
        )
    return p_i.shape[0], p_o.shape[0]


def unused_lines(matrices: Matrices, layers: Sequence[LayerSlice]) -> list[str]:
    """Return the plan's line on matrices of layers that a row has not; their names may be wrong."""
    unused = sorted(set(matrices) - {layer.name for layer in layers})
    if not unused:
        return []
    names = listed(unused[:4]) + (" and more" if unused[4:] else "")
    return [f"matrices      {count(len(unused), 'layer')} not chosen, so not used: {names}"]


def matrices_digest(matrices: Matrices, layers: Sequence[LayerSlice]) -> str:
    """Return a 32-character digest of the layers' matrices."""
    digest = hashlib.sha256()
    for layer in layers:
        for matrix in matrices[layer.name]:
            digest.update(f"{layer.name} {tuple(matrix.shape)}".encode())
            digest.update(np.asarray(matrix).tobytes())
    return digest.hexdigest()[:32]
