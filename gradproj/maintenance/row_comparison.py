"""Compares a row that was computed again with the stored one."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gradproj.coordinator.units import UnitRows
from gradproj.errors import StoreError
from gradproj.formatting import escaped
from gradproj.maintenance.row_tolerance import (
    COMPUTED,
    ROUNDING,
    RowTolerance,
    tolerance_of,
    values_with_variance,
)
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.head_rows import decode_head
from gradproj.store.hidden_view import HiddenStates
from gradproj.store.layout import STATUS_NAMES, decode_key

FLOOR = 1e-2
"""Fraction of the median norm below which errors are relative to that fraction instead of the row.
The gradient of a memorised document is a difference of nearly equal numbers, mostly rounding."""
LOSS_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}

_NO_NUMBER = 1e30
"""Stands for an infinite or undefined error, for which JSON has no number."""
_EXACT = ("n_tokens", "domain", "tar", "key")
_WITHOUT_MEMORY = STATUS["out_of_memory"]


@dataclass(frozen=True)
class RowCheck:
    """A row that was computed again."""

    sample_id: int
    unit: int
    key: str
    status: str
    """Stored status."""
    error: float
    """``|again - stored| / |again|``, of ``values_with_variance`` after decoding both."""
    what: str
    """The difference; empty if there is none."""


def unreadable_row(sample_id: int, unit: int, error: StoreError) -> RowCheck:
    """Return the check of a row that is recorded and cannot be read."""
    return RowCheck(sample_id, unit, "", "missing", _NO_NUMBER, f"cannot be read: {error}")


@dataclass(frozen=True)
class RowComparison:
    """Compares recomputed rows with those of a store, hidden states and head rows included."""

    store: ProjectionStore
    model_dtype: str
    usual_norm: float
    """Median norm of ok rows."""
    hidden: HiddenStates | None

    @cached_property
    def tolerance(self) -> RowTolerance:
        """Differences that rounding explains."""
        return tolerance_of(self.store.layout, len(self.store.layers), self.model_dtype)

    @cached_property
    def _has_variance(self) -> np.ndarray:
        return values_with_variance(self.store, self.model_dtype)

    def __call__(self, sample_id: int, again: UnitRows) -> tuple[RowCheck, bool]:
        """Return ``(check, whether the document ran out of memory, here or in the job)``."""
        names = ("status", "loss", *_EXACT)
        stored = {name: v[0] for name, v in self.store.columns_at(names, [sample_id]).items()}
        computed = {name: again.record.columns[name][0] for name in names}
        status = int(stored["status"])
        without_memory = _WITHOUT_MEMORY in (status, int(computed["status"]))
        unit = again.record.unit
        try:
            row = self.store.rows([sample_id], missing="nan")[0]
        except StoreError as unreadable:
            return unreadable_row(sample_id, unit, unreadable), without_memory
        error, what = self._difference(row, self._decoded(again), status == STATUS["ok"])
        what = what or self._head_difference(sample_id, again, status == STATUS["ok"])
        what = what or self._hidden_difference(sample_id, again)
        if status != computed["status"]:
            what = f"has status {STATUS_NAMES[int(computed['status'])]} now"
        elif not what:
            what = self._column_difference(stored, computed)
        key = escaped(decode_key(stored["key"]))
        check = RowCheck(sample_id, unit, key, STATUS_NAMES[status], error, what)
        return check, without_memory

    def _decoded(self, rows: UnitRows) -> np.ndarray:
        """Return the row as a reader of the store decodes it, ``(D,)`` float32."""
        if rows.stored is None:
            return np.full(self.store.dim, np.nan, np.float32)
        return self.store.decode(rows.stored, rows.record.columns["row_scale"])[0]

    def _difference(self, stored: np.ndarray, again: np.ndarray, is_ok: bool) -> tuple[float, str]:
        if not is_ok:
            same = np.array_equal(stored, again, equal_nan=True)
            return 0.0, "" if same else "has another row now"
        exact, stored = again.astype(np.float64) * self._has_variance, stored * self._has_variance
        tiny = float(np.finfo(np.float32).tiny)
        norm = max(float(np.linalg.norm(exact)), FLOOR * self.usual_norm, tiny)
        error = float(np.linalg.norm(exact - stored)) / norm
        moved = float(np.linalg.norm(self._layer_norms(exact) - self._layer_norms(stored))) / norm
        if not np.isfinite(error):
            return _NO_NUMBER, "is not finite, or was not"
        if error > self.tolerance.row:
            return error, f"is {error:.1e} from its row now"
        if moved > self.tolerance.layer_norms:
            return error, f"has layers whose norms are {moved:.1e} from those now"
        return error, ""

    def _head_difference(self, sample_id: int, again: UnitRows, is_ok: bool) -> str:
        """Compare head rows as the sums of their entries, each with its scale and signs.

        Of a document that the model has memorised they are mostly rounding, as its row is.
        """
        if self.store.head is None or again.stored is None:
            return ""
        segment = self.store.head.segment
        both = np.concatenate(
            [
                self.store.head.stored(sample_id, sample_id + 1),
                again.stored[:, segment.stored_start : segment.stored_end],
            ]
        )
        if not is_ok:
            return "" if np.array_equal(*both) else "has other head rows now"
        if float(again.record.columns["grad_norm"][0]) < FLOOR * self.usual_norm:
            return ""
        decoded = decode_head(both, segment)
        values = decoded.values(segment.k).astype(np.float64)
        tokens, place = np.unique(decoded.ids, return_inverse=True)
        dense = np.zeros((2, len(tokens), segment.k))
        for side, of in enumerate(place.reshape(decoded.ids.shape)):
            np.add.at(dense[side], of, values[side])
        error = np.linalg.norm(dense[1] - dense[0]) / max(float(np.linalg.norm(dense[1])), 1e-30)
        if error <= self.tolerance.head:
            return ""
        return f"has head rows that are {error:.1e} from those now"

    def _hidden_difference(self, sample_id: int, again: UnitRows) -> str:
        if self.hidden is None:
            return ""
        none = np.full((1, self.hidden.dim), np.nan)
        now = none if again.hidden is None else again.hidden.astype(np.float64)
        stored = self.hidden.rows([sample_id], missing="nan").astype(np.float64)
        if np.isnan(now).all() and np.isnan(stored).all():
            return ""
        error = np.linalg.norm(now - stored) / max(float(np.linalg.norm(now)), 1e-30)
        if error <= ROUNDING["float16"] + COMPUTED[self.model_dtype]:
            return ""
        return f"has a hidden state that is {error:.1e} from its now"

    def _layer_norms(self, row: np.ndarray) -> np.ndarray:
        layers = self.store.layers
        return np.array([np.linalg.norm(row[x.slice_start : x.slice_end]) for x in layers])

    def _column_difference(
        self, stored: dict[str, np.ndarray], computed: dict[str, np.ndarray]
    ) -> str:
        for name in _EXACT:
            if not np.array_equal(stored[name], computed[name]):
                return f"has another {name} now"
        a, b = float(stored["loss"]), float(computed["loss"])
        if (np.isnan(a) and np.isnan(b)) or abs(a - b) <= LOSS_TOLERANCE[self.model_dtype] * max(
            abs(b), FLOOR
        ):
            return ""
        return f"has the loss {b:.6g} now, stored is {a:.6g}"
