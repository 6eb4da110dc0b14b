"""The table of inner products, and the Shapley values summed from it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradproj.errors import ConfigError, StoreError
from gradproj.store.append_table import AppendTable, refuse_gap

Row = Mapping[str, np.ndarray]


class DotRows:
    """Rows since the last write, their table, and the run's values.

    Without a ``folder`` no rows are kept. A table with rows is continued from ``resume_step``;
    ``StoreError`` without one, or if it is of another model.
    """

    def __init__(
        self,
        folder: Path | None,
        parameter_names: list[str],
        save_interval: int,
        resume_step: int | None,
    ) -> None:
        self.values: dict[int, float] = {}
        """Sample id -> sum of its values, nats."""
        self._interval = save_interval
        self._waiting: list[Row] = []
        self._steps: set[int] = set()
        self._table: AppendTable | None = None
        if folder is not None:
            self._table = AppendTable(
                folder,
                {
                    **dict.fromkeys(("step", "sample_id"), (np.dtype(np.int64), None)),
                    **dict.fromkeys(("total", "value"), (np.dtype(np.float32), None)),
                    "per_parameter": (np.dtype(np.float32), len(parameter_names)),
                },
                {"method": "GradDotProd", "parameters": parameter_names},
            )
            self._resume(self._table, resume_step)

    def _resume(self, table: AppendTable, resume_step: int | None) -> None:
        if table.n_rows and resume_step is None:
            raise StoreError(
                f"{table.path} has {table.n_rows} rows of another run: resume that run, or give "
                "another result_dir"
            )
        if resume_step is not None:
            steps = table.read("step")
            refuse_gap(table.path, int(steps.max(initial=-1)), resume_step)
            later = np.flatnonzero(steps > resume_step)
            table.cut(int(later[0]) if len(later) else table.n_rows)
            self._sum({name: table.read(name) for name in ("sample_id", "value")})

    def add(self, of_ranks: list[Row]) -> None:
        """Add a batch's rows, one entry for each rank."""
        for row in of_ranks:
            self._sum(row)
            if self._table is not None:
                self._waiting.append(row)
            self._steps.update(row["step"].tolist())

    def _sum(self, row: Row) -> None:
        """Add values to the sums, but not those without a sample id (-1) or not finite."""
        for sample_id, value in zip(row["sample_id"].tolist(), row["value"].tolist(), strict=True):
            if sample_id >= 0 and np.isfinite(value):
                self.values[sample_id] = self.values.get(sample_id, 0.0) + value

    def is_due(self) -> bool:
        return bool(self._interval) and len(self._steps) >= self._interval

    def write(self) -> Path | None:
        """Append the waiting rows; return the table's folder, None if nothing was written."""
        self._steps = set()
        if self._table is None or not self._waiting:
            return None
        rows = self._waiting
        self._table.append({name: np.concatenate([row[name] for row in rows]) for name in rows[0]})
        self._waiting = []
        return self._table.path


def check_ids(sample_ids: Any, n: int) -> np.ndarray:
    """Return a batch's sample ids, ``(n,)`` int64; -1 where none are given."""
    if sample_ids is None:
        return np.full(n, -1)
    ids = np.asarray(torch.as_tensor(sample_ids).cpu(), np.int64)
    if ids.shape != (n,):
        raise ConfigError(
            f"attach_train_batch: {n} samples and batch_idx of shape {ids.shape}; give one id a "
            "sample"
        )
    return ids
