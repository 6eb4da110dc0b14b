"""Measures exact curvature of a store's layers on a sample of its documents, group by group."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradproj.corpus.sampling import spread_order
from gradproj.curvature import layer_curvature
from gradproj.curvature.folder import CurvatureFolder
from gradproj.curvature.layer_curvature import Side
from gradproj.curvature.recorded_model import RecordedModel, SequenceVisit
from gradproj.distributed import choose_device
from gradproj.engine.layers import TargetLayer, sum_over_tokens
from gradproj.engine.whole_gradients import LayerBatch
from gradproj.errors import StoreError
from gradproj.flags import flag
from gradproj.formatting import count, human_bytes
from gradproj.job.recorded import config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.kernels.onednn import linear
from gradproj.model.sequences import TokenSequence
from gradproj.store import STATUS, ProjectionStore

_LOOKED_UP_AT_ONCE = 4096


@dataclass(frozen=True, kw_only=True)
class CurvatureConfig(RecordedRunArgs, title="curvature"):
    """Which layers' curvature to measure, and on how much text."""

    curvature_tokens: int = flag(
        "Target tokens of the sample: documents at equal steps through the corpus until they have "
        "so many.",
        131_072,
        minimum=1,
    )
    layers: tuple[str, ...] = flag(
        "Layers, by patterns as those of --proj_layers; default: the store's. A later call may "
        "add others of the model, such as its head.",
        (),
        metavar="NAME",
    )
    memory: float = flag(
        "GB of sums on the device at once; layers that do not fit take further passes over the "
        "sample. 0 = half of what is free.",
        0.0,
        minimum=0,
    )


def fit_curvature(config: CurvatureConfig, note: Callable[[str], None]) -> CurvatureFolder:
    """Compute what ``OUTPUT/curvature`` lacks: every layer's factors, then its second moments.

    Each group of layers takes a pass over the sample, and its files are written at the pass's end.
    Products of a batch are float32 and are summed in float64. ``note`` is called with lines on the
    sample, the groups and the sizes.

    Raises:
        StoreError: no row yet; the folder holds curvature of another model or sample; another
            process measures in it.
        ModelError: the model has changed, or a layer's gradients are not finite.
        CorpusError: the tars are not where the job found them, or have changed.
    """
    run = config_from(config)
    with (
        ProjectionStore(config.output) as store,
        CurvatureFolder(store).locked() as folder,
    ):
        sample_ids = _sample(folder, store, config.curvature_tokens)
        device, _ = choose_device(config.device, 0)
        recorded = RecordedModel(store, run, device, config.shards, config.layers)
        layers = list(recorded.targets)
        sequences = recorded.sequences(sample_ids)
        n_tokens = sum(sequence.n_targets for sequence in sequences)
        known = folder.recipe()["layers"] if folder.recipe_path.is_file() else []
        wanted = list(dict.fromkeys([*known, *layers]))
        folder.begin(config.curvature_tokens, sample_ids, n_tokens, wanted)
        note(f"sample: {count(len(sample_ids), 'document')}, {n_tokens:,} target tokens")
        budget = recorded.budget(config.memory)
        fit = _Fit(recorded, folder, sequences, n_tokens)
        for kind, size, task in (
            ("kfac", _factor_bytes, fit.factors),
            ("ekfac", _moment_bytes, fit.second_moments),
        ):
            lacking = folder.lacking(layers, kind)
            groups = split_layers(lacking, [size(recorded.targets[x]) for x in lacking], budget)
            for number, group in enumerate(groups, 1):
                note(
                    f"{kind}: group {number} of {len(groups)}, {count(len(group), 'layer')}, "
                    f"{human_bytes(sum(size(recorded.targets[name]) for name in group))} of sums"
                )
                task(group)
    return folder


def _sample(folder: CurvatureFolder, store: ProjectionStore, n_tokens: int) -> np.ndarray:
    """Return the sample that the folder began with, or a new one."""
    if not folder.recipe_path.is_file():
        return draw_sample(store, n_tokens)
    recipe = folder.recipe()
    if n_tokens != recipe["curvature_tokens"]:
        raise StoreError(
            f"{folder.path} was begun with --curvature_tokens {recipe['curvature_tokens']:,}, this "
            f"call has {n_tokens:,}: give that number, or delete the folder"
        )
    ids: np.ndarray = recipe["sample_ids"]
    return ids


def draw_sample(store: ProjectionStore, n_tokens: int) -> np.ndarray:
    """Return sorted ids of documents with a row, spread over the store, with enough tokens.

    All documents, if they have fewer target tokens together.

    Raises:
        StoreError: no document has a row.
    """
    chosen: list[int] = []
    order = spread_order(len(store))
    left = n_tokens
    while left > 0 and (ids := [i for i, _ in zip(order, range(_LOOKED_UP_AT_ONCE), strict=False)]):
        columns = store.columns_at(("status", "n_tokens"), np.array(ids, np.int64))
        for sample_id, status, n in zip(ids, columns["status"], columns["n_tokens"], strict=True):
            if left > 0 and status == STATUS["ok"]:
                chosen.append(sample_id)
                left -= int(n)
    if not chosen:
        raise StoreError(f"{store.path} has no row yet, so there is no document to sample")
    return np.sort(np.array(chosen, np.int64))


def split_layers(layers: Sequence[str], sizes: Sequence[int], budget: int) -> list[list[str]]:
    """Split layers, in order, into groups whose sizes add up to at most ``budget``; 1 at least."""
    groups: list[list[str]] = []
    left = 0
    for layer, size in zip(layers, sizes, strict=True):
        if not groups or size > left:
            groups.append([])
            left = budget
        groups[-1].append(layer)
        left -= size
    return groups


def _side_values(width: int) -> int:
    return width**2 if width <= layer_curvature.MAX_SIDE else width


def _factor_bytes(layer: TargetLayer) -> int:
    return 8 * sum(map(_side_values, layer.widths))


def _moment_bytes(layer: TargetLayer) -> int:
    n_i, n_o = layer.widths
    return 4 * sum(map(_side_values, layer.widths)) + 8 * n_i * n_o


@dataclass(frozen=True)
class _Fit:
    """The two passes over the sample, each for a group of layers."""

    recorded: RecordedModel
    folder: CurvatureFolder
    sequences: Sequence[TokenSequence]
    n_tokens: int

    def factors(self, layers: Sequence[str]) -> None:
        """Sum ``a a^T`` and ``g g^T`` over the sample's target tokens; write eigenvectors."""
        sums: list[tuple[Tensor, Tensor]] = []

        def begin() -> SequenceVisit:
            sums.clear()  # first: memory may have run out
            sums[:] = [
                (self._zeros(n_i), self._zeros(n_o))
                for n_i, n_o in (self.recorded.targets[name].widths for name in layers)
            ]
            return add

        def add(number: int, batch: LayerBatch, _: np.ndarray) -> None:
            for part in batch.parts():
                # A position without a target counts no token; its output gradient is 0.
                # One that is routed to several experts counts one, by the mean of its inputs.
                counted = batch.mask[part].unsqueeze(-1) * batch.positions**-0.5
                a = batch.inputs(part) * counted
                for total, x in zip(sums[number], (a, batch.g[part].float()), strict=True):
                    _add_gram(total, x.flatten(0, 1))

        self.recorded.run(layers, self.sequences, "factors", begin)
        for name, pair in zip(layers, sums, strict=True):
            what = (f"inputs of {name}", f"output gradients of {name}")
            i, o = (
                Side.of(total / self.n_tokens, text) for total, text in zip(pair, what, strict=True)
            )
            self.folder.write_factors(name, i, o)

    def _zeros(self, width: int) -> Tensor:
        shape = (width, width) if width <= layer_curvature.MAX_SIDE else (width,)
        return torch.zeros(shape, dtype=torch.float64, device=self.recorded.device)

    def second_moments(self, layers: Sequence[str]) -> None:
        """Sum ``(U_o^T G U_i)^2`` over the sample's sequences."""
        device = self.recorded.device
        factors_sums = [self.folder.factors_sum(name) for name in layers]
        sides = [
            (curvature.i.to(device), curvature.o.to(device))
            for curvature in (self.folder.read(name, "kfac") for name in layers)
        ]
        sums: list[Tensor] = []

        def begin() -> SequenceVisit:
            sums.clear()
            sums[:] = [
                torch.zeros(len(o.values), len(i.values), dtype=torch.float64, device=device)
                for i, o in sides
            ]
            return add

        def add(number: int, batch: LayerBatch, _: np.ndarray) -> None:
            i, o = sides[number]
            for part in batch.parts():
                # Tokens are rotated before they are summed, at the cost of one more product each.
                coordinates = sum_over_tokens(
                    i.rotate(batch.inputs(part)), o.rotate(batch.g[part].float())
                )
                sums[number] += coordinates.square_().sum(0)

        self.recorded.run(layers, self.sequences, "second moments", begin)
        for name, total, factors_sum in zip(layers, sums, factors_sums, strict=True):
            self.folder.write_second_moments(name, total / self.n_tokens, factors_sum)


def _add_gram(total: Tensor, x: Tensor) -> None:
    """Add ``x^T x``, or its diagonal, to float64 sums."""
    if total.dim() == 1:
        total += x.square().sum(0, dtype=torch.float64)
        return
    transposed = x.T.contiguous()
    total += linear(transposed, transposed)
