"""GradProjLora in a training loop: projected gradients of every sample, in a store."""

import shutil
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.inner_layers import InnerLayer
from gradproj.engine.loss import refuse_virtual_tokens
from gradproj.engine.projection import place_widths
from gradproj.engine.row_columns import finish_rows
from gradproj.engine.targets import LOSS_WEIGHTS, count_targets, loss_key
from gradproj.errors import ConfigError, StoreError
from gradproj.flags import flag_of
from gradproj.store.append_store import (
    AppendStore,
    check_same,
    choose_rows,
    create_row_store,
    holds_rows,
)
from gradproj.store.encoding import row_formula
from gradproj.store.layout import STATUS, STORE_NAME, StoreLayout, place_stored, plan_layout
from gradproj.store.writer import pack_matrices
from gradproj.training.engine_base import EngineContext, TrainingEngine

FOLDER = "projections"
"""In ``result_dir``."""

MAX_WAITING_BYTES = 64 * 2**20
"""Rows on the device above which they move to the host before they are due to be written."""


@dataclass
class _Waiting:
    """One batch with its rows still on the device."""

    rows: Tensor
    n_tokens: Tensor | None
    losses: Tensor | None
    step: int
    ids: Any


class GradProjLoraTraining(TrainingEngine):
    """Writes the rows of every batch to ``result_dir/projections``, each at its step's weights.

    No weight, gradient or random number differs from a run without it.

    Args:
        context: ``settings.result_dir`` holds the store. A store with rows is continued only with a
            ``resume_step``: then call ``load_state_dict`` before the first batch.

    Raises:
        ConfigError: no ``result_dir``, or impossible widths.
        ModelError: the model has no matching layer.
        StoreError: there are rows already, or they have other settings.
    """

    def __init__(self, context: EngineContext) -> None:
        super().__init__(context)
        settings = context.settings
        if not settings.result_dir:
            raise ConfigError(
                "--method GradProjLora writes rows to result_dir/projections: give a result_dir"
            )
        refuse_virtual_tokens(context.model, "--method GradProjLora")
        self._folder = Path(settings.result_dir) / FOLDER
        self._engine = GradProjLoraEngine(
            context.model, settings.proj_layers, settings.proj_rank_total,
            settings.proj_rank_min, settings.proj_seed, proj_kind=settings.proj_kind,
            include_embeddings=settings.include_embeddings, experts=settings.experts,
        )  # fmt: skip
        self._layers = place_widths(self._engine.targets, settings.projection)
        self._waiting: list[_Waiting] = []
        self._step = 0
        self._ids: np.ndarray | None = None
        self._labels: Tensor | None = None
        self._weights: Tensor | None = None
        self._unwritten_steps: set[int] = set()
        self._store = self._open_store()
        self._closed = False
        self._engine.attach()

    # --- batches ---

    def attach_train_batch(
        self,
        X: Tensor,
        Y: Tensor | None = None,
        iter_num: int | None = None,
        batch_idx: Any = None,
        weights: Tensor | None = None,
    ) -> None:
        """Remember step, ids, labels and weights. Without a step it is the next one."""
        self._weights = weights
        self._step = self._step + 1 if iter_num is None else int(iter_num)
        self._ids, self._labels = None if batch_idx is None else _of_batch(batch_idx, len(X), 0), Y
        if Y is None:
            self._engine.attach_train_batch(X)
        else:
            # For a loss of the loop's own. per_sample_loss reports its weights itself.
            self._engine.attach_train_batch(X, labels=Y, loss_reduction="mean")

    def aggregate_and_log(self, losses: Tensor | None = None) -> None:
        """Collect the last backward pass's rows; they stay on the device until they are due."""
        labels, ids = self._labels, self._ids
        self._labels = self._ids = None
        has_weights = loss_key(self.context.model) in LOSS_WEIGHTS
        n_tokens = None if labels is None else count_targets(self.context.model, labels)
        rows, weights = self._engine.collect_batch(), self._weights
        if weights is not None:
            rows = rows * weights[:, None]  # collect_batch undoes the factors of a loss
            self._weights = None
        if not has_weights:
            # The loss is a mean over the batch, divided by the number of accumulated batches.
            rows = rows * self.context.settings.grad_accumulation
        if n_tokens is None and self.context.settings.loss_reduction == "mean":
            raise ConfigError(
                "--loss_reduction mean divides a row by its number of targets: give "
                "attach_train_batch the labels, or use --loss_reduction sum"
            )
        self._waiting.append(_Waiting(rows, n_tokens, losses, self._step, ids))
        self._unwritten_steps.add(self._step)
        if sum(batch.rows.nbytes for batch in self._waiting) > MAX_WAITING_BYTES:
            self._to_host()

    def clear_gradients(self) -> None:
        self._engine.clear_gradients()

    # --- rows to disk ---

    def should_save_metrics(self, iter_num: int) -> bool:
        interval = self.context.settings.proj_save_interval
        return bool(interval) and len(self._unwritten_steps) >= interval

    def save_metrics(self, iter_num: int) -> None:
        self._to_host()
        self._store.flush()
        self._unwritten_steps.clear()

    def detach_for_evaluation(self) -> None:
        self._engine.detach_for_evaluation()

    def reattach_after_evaluation(self) -> None:
        self._engine.reattach_after_evaluation()

    def cleanup(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._engine.detach()
        self._to_host()
        self._store.close()

    def state_dict(self) -> dict[str, Any]:
        self.save_metrics(self._step)
        self._store.fsync()
        return {"n_rows": self._store.n_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        # Checkpoints that keep no state_dict give the step instead.
        n_rows = self._store.n_rows_to(state["step"]) if "step" in state else state.get("n_rows", 0)
        self._store.cut(n_rows)
        self.context.world.barrier()
        self._store.extend()

    def _to_host(self) -> None:
        """Append every waiting batch's rows and columns to the store, in order."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        rows = torch.cat([batch.rows for batch in waiting]).cpu().numpy()
        sizes = [len(batch.rows) for batch in waiting]

        def column(field: str, unknown: float) -> np.ndarray:
            pairs = zip(waiting, sizes, strict=True)
            return np.concatenate([_of_batch(getattr(b, field), n, unknown) for b, n in pairs])

        columns = {
            "n_tokens": column("n_tokens", 0),
            "loss": column("losses", np.nan),
            "step": np.repeat(np.array([batch.step for batch in waiting], np.int64), sizes),
            "sample_id": column("ids", -1).astype(np.int64),
        }
        has_labels = np.repeat([batch.n_tokens is not None for batch in waiting], sizes)
        no_target = has_labels & (columns["n_tokens"] == 0)
        columns["status"] = np.where(no_target, STATUS["no_target"], STATUS["ok"])
        losses, reduction = columns["loss"], self.context.settings.loss_reduction
        columns["loss"], columns["grad_norm"] = finish_rows(rows, losses, columns, reduction)
        self._store.add(rows, columns)

    def _open_store(self) -> AppendStore:
        layout = self._layout()
        self._layers = place_stored(self._layers, layout)
        world, attributes, folder = self.context.world, self._attributes(layout), self._folder
        # All ranks look before rank 0 creates it.
        exists, empty = (folder / STORE_NAME).exists(), not holds_rows(folder)
        world.barrier()
        if exists and not empty:
            if self.context.resume_step is None:
                raise StoreError(
                    f"{folder} holds rows of another run: continue it (--resume), or give a new "
                    "result_dir"
                )
            check_same(folder, attributes)
        elif world.rank == 0:
            shutil.rmtree(folder / STORE_NAME, ignore_errors=True)
            drawn = self._engine.projection_matrices.items()
            matrices = {name: (p_i.cpu().numpy(), p_o.cpu().numpy()) for name, (p_i, p_o) in drawn}
            packed = pack_matrices(self._layers, matrices)
            create_row_store(folder, layout, attributes, packed)
        world.barrier()
        return AppendStore(folder, world.rank, world.size)

    def _layout(self) -> StoreLayout:
        settings, world = self.context.settings, self.context.world
        widths = [layer.slice_end - layer.slice_start for layer in self._layers]
        row_bytes = plan_layout(1, widths, 1, settings.store).row_bytes
        rows_per_step = settings.batch_size * settings.grad_accumulation
        height = settings.rows_per_shard
        height = height or choose_rows(row_bytes, rows_per_step, settings.max_steps, world.size)
        store = replace(settings.store, rows_per_shard=height)
        layout = plan_layout(height * world.size, widths, 1, store)
        # One chunk of each column per unit, so that a unit's files belong to one rank.
        return replace(layout, column_rows=height)

    def _attributes(self, layout: StoreLayout) -> dict[str, Any]:
        settings = self.context.settings
        # Stores of version 1 do not name the encoding, which is dense.
        encoding = {"--encoding": layout.encoding} if layout.is_packed else {}
        projection = settings.projection
        flags = {f"--{flag_of(f)}": getattr(projection, f.name) for f in fields(projection)}
        if not any(isinstance(x.module, InnerLayer) for x in self._engine.targets):
            del flags["--experts"]  # of no effect, and stores of version 1 do not name it
        return {
            "layers": [asdict(layer) for layer in self._layers],
            "domains": [],
            "projection": asdict(projection),
            "selection": asdict(self._engine.coverage),
            "how_to_read": f"{row_formula(layout)}, of sample sample_id[i] at step[i]; status 1 = "
            "ok",
            "identity": {
                **flags,
                **encoding,
                "--proj_dtype": settings.proj_dtype,
                "--compressor": settings.compressor,
                "--loss_reduction": settings.loss_reduction,
                "ranks": self.context.world.size,
                "layers": [layer.name for layer in self._layers],
            },
        }


def _of_batch(values: Any, n: int, unknown: float) -> np.ndarray:
    """Return ``(n,)`` values of a batch's samples on the host; ``unknown`` for None."""
    if values is None:
        return np.full(n, unknown)
    if isinstance(values, Tensor):
        # numpy has no bfloat16.
        values = values.detach().float() if values.is_floating_point() else values
        values = values.cpu().numpy()
    array = np.asarray(values)
    if array.shape != (n,):
        raise ConfigError(
            f"a batch of {n} samples was given {array.shape} ids or losses; give one for each"
        )
    return array
