"""``--bytes_per_document``: the layers and widths that answer best in rows of so many bytes.

The rule follows ``MEASURED``, a table of linear datamodeling scores (LDS, the rank
correlation of scores with what retraining shows; ``gradproj lds``). Signs in the eigenbasis
lose nothing to 16 bits a value, so an allocation chooses only whose signs are kept:

- those of all layers of ``--proj_layers``, if each can have 64 x 64 (the least that was measured on
  a trained model, where leaving layers out cost 0.06);
- else those of the MLPs' output projections, which with 128 x 128 on small models answer better
  than all layers in as many bytes. Below 128 x 128, and on trained models, that is not measured:
  the rule extrapolates.

More than 128 x 128 was not measured and is not given. The bytes are those of a whole row: signs,
the layers' scales, head rows and padding.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from gradproj.engine.inner_layers import InnerLayer
from gradproj.engine.layers import TargetLayer
from gradproj.engine.loss import output_head
from gradproj.engine.patterns import EXCLUDES, folded, matches
from gradproj.engine.projection import ProjectionConfig, choose_ki_ko
from gradproj.engine.selection import find_layers
from gradproj.errors import ConfigError
from gradproj.job.config import RunConfig
from gradproj.store import ProjectionStore
from gradproj.store.basis import DAMPING
from gradproj.store.chunk_shapes import packed_widths

ENCODING, BASIS = "signs", "eigen"
ALL_FROM_K = 64
"""All layers are taken if each can have this width on both sides."""
MIN_K, MAX_K, STEP = 16, 128, 4
"""Widths of a side; with steps of 4 the signs of a layer are whole bytes."""
OVERSAMPLING = 2
"""Width of a side over its effective dimension that counts as enough. The theorem has a constant of
this kind that it does not name."""

_SIZES = {"": 1, "k": 1024, "m": 1024**2}


@dataclass(frozen=True)
class Measured:
    """LDS of sign rows with ``k x k`` values a layer, on ``BENCHMARKS`` as far as measured."""

    layers: str
    k: int
    scores: tuple[float, ...]


ALL, OUTPUTS = "all layers", "the MLPs' output projections"
BENCHMARKS = ("GPT-2 3 x 128", "GPT-2 3 x 384", "SmolLM2-135M")
"""The models of the scores; the first two were trained from scratch for each subset, the last
fine-tuned. The errors over queries are 0.03. Measured in trials before this code; ``gradproj lds``
has not repeated them yet."""
MEASURED = (
    Measured(ALL, 16, (0.351, 0.290)),
    Measured(ALL, 64, (0.567, 0.472, 0.498)),
    Measured(OUTPUTS, 128, (0.638, 0.507)),
)


@dataclass(frozen=True)
class Allocation:
    """The layers and widths that a number of bytes a document buys."""

    layers: str
    """``ALL`` or ``OUTPUTS``."""
    n_layers: int
    k: int
    patterns: tuple[str, ...]
    """``--proj_layers``."""

    def lines(self) -> list[str]:
        """Return the allocation and its expected quality as lines of text."""
        flags = f"--proj_layers {','.join(self.patterns)} --proj_rank_total {self.k**2}"
        lines = [
            f"allocation    {self.k} x {self.k} signs of {self.layers} ({self.n_layers}), as by "
            f"{flags} --encoding {ENCODING}"
        ]
        same = (m for m in MEASURED if m.layers == self.layers)
        nearest = min(same, key=lambda m: abs(m.k - self.k))
        pairs = zip(nearest.scores, BENCHMARKS, strict=False)
        scores = ", ".join(f"{score:.2f} on {name}" for score, name in pairs)
        other = "" if nearest.k == self.k else "not measured at this width; nearest: "
        what = f"{nearest.k} x {nearest.k} signs of {nearest.layers}"
        return [*lines, f"quality       {other}{what}, LDS {scores}"]


def read_bytes(text: str) -> int:
    """Return the number of ``24k`` or ``1.5k``: k is 1,024.

    Raises:
        ConfigError: it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)b?", text.strip().lower())
    if match is None or not float(match[1]):
        raise ConfigError(f"--bytes_per_document is {text!r}; give a number such as 800, 5k or 24k")
    return int(float(match[1]) * _SIZES[match[2]])


def allocate(
    n_bytes: int,
    head_bytes: int,
    targets: Sequence[TargetLayer],
    patterns: Sequence[str],
    model: nn.Module,
) -> Allocation:
    """Choose layers and widths for rows of at most ``n_bytes`` bytes.

    Args:
        n_bytes: the budget of a row.
        head_bytes: those of it that head rows take.
        targets: the layers to choose from.
        patterns: ``--proj_layers``, which takes them.
        model: the model, of which the returned patterns take the chosen layers.

    Raises:
        ConfigError: the budget is too small for any allocation.
    """
    k = _width(n_bytes, head_bytes, targets)
    outputs = [target for target in targets if _is_mlp_output(target)]
    if k >= ALL_FROM_K or not outputs:
        layers = targets
        chosen = Allocation(ALL, len(targets), k, tuple(patterns))
    else:
        layers, names = outputs, _patterns_of(outputs, patterns, model)
        chosen = Allocation(OUTPUTS, len(outputs), _width(n_bytes, head_bytes, outputs), names)
    if chosen.k < MIN_K:
        of_head = f" and {head_bytes:,} bytes of --head_rows" if head_bytes else ""
        fewer = "--proj_layers that takes fewer" + (" or fewer --head_rows" if head_bytes else "")
        raise ConfigError(
            f"--bytes_per_document {n_bytes:,} is too little for the signs of {chosen.layers} "
            f"({chosen.n_layers}){of_head}: give at least "
            f"{_row_bytes(MIN_K, head_bytes, layers):,}, or {fewer}"
        )
    return chosen


def _width(n_bytes: int, head_bytes: int, layers: Sequence[TargetLayer]) -> int:
    """Return the largest ``k`` whose rows fit, by steps of ``STEP``; 0 if that of MIN_K is none."""
    widths = range(MAX_K, MIN_K - 1, -STEP)
    return next((k for k in widths if _row_bytes(k, head_bytes, layers) <= n_bytes), 0)


def _row_bytes(k: int, head_bytes: int, layers: Sequence[TargetLayer]) -> int:
    """Return the bytes of a row with ``k x k`` signs of every layer: all that the store keeps."""
    rank_min = ProjectionConfig.rank_min
    shapes = {layer.widths for layer in layers}
    kept = {shape: math.prod(choose_ki_ko(*shape, k**2, rank_min)) for shape in shapes}
    return packed_widths([kept[layer.widths] for layer in layers], 1, head_bytes)[1]


def _is_mlp_output(target: TargetLayer) -> bool:
    """Return whether a layer leads from an MLP's inner width back to the model's."""
    n_i, n_o = target.widths
    if isinstance(target.module, InnerLayer):
        return target.module.weight_name == "down_proj"
    return n_i > n_o and any(matches("mlp", name) for name in target.uses)


def _patterns_of(
    layers: Sequence[TargetLayer], given: Sequence[str], model: nn.Module
) -> tuple[str, ...]:
    """Return short patterns that take these layers alone: ``mlp.down_proj``.

    ``given``: patterns that take more than them.
    """
    names = [name for layer in layers for name in layer.uses]
    wanted = sorted(layer.name for layer in layers)
    excluded = [pattern for pattern in given if pattern.startswith(EXCLUDES)]
    form = "separate" if any(layer.expert is not None for layer in layers) else "joint"
    for length in (1, 2, 3):
        ends = [name.split(".")[-length:] for name in names]
        short = sorted({".".join(part for part in end if not part.isdigit()) for end in ends})
        taken = find_layers(model, [*short, *excluded], experts=form)
        if sorted(target.name for target in taken) == wanted:
            return (*short, *excluded)
    return (*wanted,)


def with_allocation(
    config: RunConfig, model: nn.Module, targets: Sequence[TargetLayer] | None = None
) -> tuple[RunConfig, list[str]]:
    """Return the settings with the flags that ``--bytes_per_document`` stands for, and lines.

    ``targets`` are the layers to choose from; by default, all that ``--proj_layers`` takes.

    Without that flag they are as they were. The returned settings are explicit, so that a store
    records what its rows are and not by which rule that was chosen.

    Raises:
        ConfigError: one of those flags was given as well, or the bytes are too few.
    """
    projection, store = config.projection, config.store
    if not projection.bytes_per_document:
        return config, []
    for name, value, default, ours in (
        ("encoding", store.encoding, type(store).encoding, ENCODING),
        ("basis", projection.basis, type(projection).basis, BASIS),
    ):
        if value not in (default, ours):
            raise ConfigError(
                f"--bytes_per_document chooses --{name} {ours}: leave out --{name} {value}, or "
                "choose --proj_rank_total yourself"
            )
    if targets is None:
        targets = find_layers(
            model, projection.patterns, projection.include_embeddings, projection.experts
        )
    n_bytes = read_bytes(projection.bytes_per_document)
    vocabulary: Any = output_head(model)
    head = config.head.segment(len(vocabulary.weight)) if vocabulary is not None else None
    head_bytes = head.n_bytes if head else 0
    chosen = allocate(n_bytes, head_bytes, targets, projection.patterns, model)
    projection = replace(
        projection,
        layers=",".join(chosen.patterns),
        rank_total=chosen.k**2,
        basis=BASIS,
        bytes_per_document="",
    )
    config = replace(config, projection=projection, store=replace(store, encoding=ENCODING))
    return config, chosen.lines()


# --- effective dimensions ---


def effective_dimension(eigenvalues: np.ndarray, damping: float = DAMPING) -> float:
    """Return ``sum E / (E + damping mean(E))`` of a covariance's eigenvalues ``(k,)``.

    A sketch keeps damped influence up to an error that falls with its width over this number, for
    Kronecker factors side by side (arXiv:2602.10449). Of a covariance that was itself projected to
    k dimensions it is a lower bound, close to k if k is too small.
    """
    kept = np.clip(np.asarray(eigenvalues, np.float64), 0, None)
    scale = damping * kept.mean()
    return float((kept / (kept + scale)).sum()) if kept.any() else 0.0


def dimension_lines(store: ProjectionStore, most: int = 12) -> list[str]:
    """Return the effective dimensions of a store's layers, and the widths that are enough.

    Layers of all blocks are one line, with the largest of their dimensions.
    """
    groups: dict[str, list[tuple[float, ...]]] = {}
    eigenvalues = store.basis_eigenvalues or {}
    for layer in store.layers:
        if layer.name in eigenvalues:
            e_i, e_o = (effective_dimension(e) for e in eigenvalues[layer.name])
            # Wider than the layer is not possible.
            wide = [min(n, _enough(e)) for e, n in ((e_i, layer.n_i), (e_o, layer.n_o))]
            sides = (e_i, layer.k_i, e_o, layer.k_o, *wide)
            groups.setdefault(folded(layer.name), []).append(sides)
    lines = []
    for name, group in groups.items():
        e_i, k_i, e_o, k_o, wide_i, wide_o = map(max, zip(*group, strict=True))
        is_enough = wide_i <= k_i and wide_o <= k_o
        lines.append(
            f"dimension     {name}: A {e_i:.0f} of {k_i}, S {e_o:.0f} of {k_o}; "
            f"{wide_i} x {wide_o} {'is' if is_enough else 'or more would be'} enough"
        )
    more = [f"dimension     and {len(lines) - most} more names"] if len(lines) > most else []
    return lines[:most] + more


def _enough(dimension: float) -> int:
    """Return the width of a side that is enough for an effective dimension."""
    return int(np.ceil(OVERSAMPLING * dimension / STEP) * STEP)
