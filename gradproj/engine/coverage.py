"""Lists what ``--proj_layers`` takes of a model's blocks and what it leaves out."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from gradproj.engine.layers import TargetLayer, every_layer, without_wrappers
from gradproj.engine.patterns import folded
from gradproj.engine.selection import block_layers

MAX_NAMED = 8
"""Names of a kind in the printed lines; the store's attributes have all."""


@dataclass(frozen=True)
class LeftOut:
    """Layers or weights of the blocks that are not projected, under one name."""

    name: str
    """Dotted name, numbers folded to ``*``. That of layers is a pattern for ``--proj_layers``."""
    n: int
    """Number of layers, or of weights that have no rule."""
    fraction: float
    """Their part of the blocks' weights."""


@dataclass(frozen=True)
class Coverage:
    """The projected part of the blocks' linear layers.

    Blocks are the model's numbered modules, or the whole model if it has none. Weights are entries
    of matrices: biases and norms never have a part in a row.
    """

    n_layers: int
    n_selected: int
    fraction: float
    """Part of the blocks' weights that is projected."""
    not_selected: list[LeftOut]
    """Layers that ``--proj_layers`` could take."""
    not_projectable: list[LeftOut]
    """Matrices that no rule describes, such as convolutions."""
    not_reached: list[LeftOut] = field(default_factory=list)
    """Layers through which no text passes, such as those of a vision tower."""

    def lines(self) -> list[str]:
        """Return the coverage as lines of text for people."""
        if not (self.not_selected or self.not_reached or self.not_projectable):
            return [f"layers        all {self.n_layers:,} linear layers of the blocks"]
        return [
            f"layers        {self.n_selected:,} of {self.n_layers:,} linear layers of the blocks, "
            f"{100 * self.fraction:.1f} % of their weights",
            *_left_out_lines("not selected", self.not_selected),
            *_left_out_lines("not reached", self.not_reached),
            *_left_out_lines("no rule for", self.not_projectable),
        ]


def _left_out_lines(label: str, left_out: list[LeftOut]) -> list[str]:
    largest = sorted(left_out, key=lambda each: -each.fraction)
    named = [f"{x.name} ({x.n:,}: {100 * x.fraction:.1f} %)" for x in largest[:MAX_NAMED]]
    more = [f"and {len(largest) - MAX_NAMED} more"] if len(largest) > MAX_NAMED else []
    return [f"{label:<14}{', '.join([*named, *more])}"] if named else []


def coverage_of(
    model: nn.Module, targets: Sequence[TargetLayer], unreached: Sequence[TargetLayer] = ()
) -> Coverage:
    """Compare the targets with all linear layers of the model's blocks.

    ``unreached`` are those that the targets lack because the loss of a text never reaches them.
    """
    model, chosen = without_wrappers(model), {target.name for target in targets}
    is_separate = any(target.expert is not None for target in targets)
    every = every_layer(model, "separate" if is_separate else "joint")
    with_rule = {id(p) for layer in every for m in layer.holders for p in m.parameters(False)}
    layers = {x.name: x for x in block_layers(every)}
    has_blocks = any("*" in folded(name) for name in layers)
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if id(p) not in with_rule
        and sum(width > 1 for width in p.shape) > 1
        and ("*" in folded(name) or not has_blocks)
    }
    sizes = {name: layer.n_weights for name, layer in layers.items()}
    total = (sum(sizes.values()) + sum(p.numel() for p in matrices.values())) or 1
    selected = [name for name in layers if name in chosen]
    aside = {layer.name for layer in unreached}
    taken, others = set(map(folded, selected)), layers.keys() - set(selected)
    rest = [(n, _shortest_name(folded(n), taken), sizes[n]) for n in layers if n in others]
    return Coverage(
        n_layers=len(layers),
        n_selected=len(selected),
        fraction=sum(sizes[name] for name in selected) / total,
        not_selected=_left_out([each[1:] for each in rest if each[0] not in aside], total),
        not_reached=_left_out([each[1:] for each in rest if each[0] in aside], total),
        not_projectable=_left_out([(folded(n), p.numel()) for n, p in matrices.items()], total),
    )


def _left_out(named_sizes: Iterable[tuple[str, int]], total: int) -> list[LeftOut]:
    sizes: dict[str, list[int]] = {}
    for name, size in named_sizes:
        sizes.setdefault(name, []).append(size)
    return [LeftOut(name, len(each), sum(each) / total) for name, each in sizes.items()]


def _shortest_name(name: str, taken: Iterable[str]) -> str:
    """Return the outermost part of a layer's name that holds no layer that is taken."""
    parts = name.split(".")
    outer = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((o for o in outer if not any(f"{t}.".startswith(f"{o}.") for t in taken)), name)
