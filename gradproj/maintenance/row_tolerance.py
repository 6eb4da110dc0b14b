"""The difference that rounding explains between a stored row and the same row computed again."""

from dataclasses import dataclass

import numpy as np

from gradproj.store import ProjectionStore
from gradproj.store.layout import StoreLayout

ROUNDING = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
"""``--proj_dtype`` -> largest relative error of one stored value."""
STEPS = {"signs": 2.0, "int2": 1.0, "int4": 0.34, "int8": 0.08}
"""``--encoding`` -> distance of two levels, in units of the root mean square of a layer's values;
of int8 if the largest is ten times that."""
_MARGIN = 4
"""Codes that may differ: so many times the expected ones, and so many more."""
COMPUTED = {"float32": 1e-4, "bfloat16": 5e-2}
"""``--model_dtype`` -> largest relative difference of a row computed in another batch, on another
device or with another version of torch."""
NO_VARIANCE = {"float32": 1e-9, "bfloat16": 1e-4}
"""``--model_dtype`` -> eigenvalue of a basis, relative to the largest of its side, below which the
values of the direction are rounding alone, as their codes then are."""


@dataclass(frozen=True)
class RowTolerance:
    """Largest differences of two decoded rows, relative to the row's norm."""

    row: float
    """Of the norm of their difference."""
    layer_norms: float
    """Of the norm of the difference of their layers' norms, which few other codes hardly move."""
    head: float
    """Of the difference of their head rows, relative to those: one entry may make up most of them,
    and its scale, rounded to half octaves, moves by 0.41 if it is rounded the other way."""


def tolerance_of(layout: StoreLayout, n_layers: int, model_dtype: str) -> RowTolerance:
    """Return the tolerance for a row that was computed again and encoded, after decoding both.

    A packed value that lies nearer to the middle of two levels than it was computed exactly may
    have another code now, which is a whole step away. If values have the relative error e, and a
    step is d of their root mean square, then about 0.8 e / d of the codes differ: the mean error of
    a normal distribution over the step. A few codes more may differ by chance, in the part of the
    layers that makes up most of the row.
    """
    computed = COMPUTED[model_dtype]
    if not layout.is_packed:
        row = ROUNDING[layout.proj_dtype] + computed
        return RowTolerance(row, row, head=0.0)
    step, width = STEPS[layout.encoding], layout.dim / n_layers
    differing = _MARGIN * (0.8 * computed / step + n_layers**0.5 / layout.dim)
    of_scales = computed + 2 * ROUNDING["float16"]
    # The norm of signs is their scale's; another code changes a norm by up to twice a step.
    of_codes = 0.0 if layout.bits == 1 else 2 * step * (differing / width) ** 0.5
    return RowTolerance(
        of_scales + step * differing**0.5, of_scales + of_codes, 0.42 + 4 * computed
    )


def values_with_variance(store: ProjectionStore, model_dtype: str) -> np.ndarray:
    """Return which values of a row can be compared, ``(D,)`` bool: all of a random basis.

    The gradients at a softmax router's output add up to zero, and an expert that gets no token has
    none. If a router's side is as wide as its experts are many, the basis of a pilot has directions
    for that, which no gradient reaches, and each sign stored there is one of rounding.
    """
    compared = np.ones(store.dim, bool)
    for layer in store.layers:
        if store.basis_eigenvalues is not None:
            e_i, e_o = (e >= NO_VARIANCE[model_dtype] * e.max()
                        for e in store.basis_eigenvalues[layer.name])  # fmt: skip
            compared[layer.slice_start : layer.slice_end] = np.outer(e_o, e_i).ravel()
    return compared
