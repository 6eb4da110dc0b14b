"""Subject of an answer: the rows compared, the score and its damping."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gradproj.analysis import MEANINGS, SCORES, SIGN
from gradproj.analysis.preconditioner import auto_damping
from gradproj.analysis.query_sets import QuerySets
from gradproj.analysis.reduction import DEFAULT_REDUCTION
from gradproj.analysis.scan import ScanOptions
from gradproj.cli.query.lines import labelled
from gradproj.formatting import listed
from gradproj.query.hidden import HIDDEN
from gradproj.query.hidden import MEANING as HIDDEN_MEANING
from gradproj.store import ProjectionStore
from gradproj.text.ranking import MEANING, MEANING_WITH_TEXT, TEXT, WITH_TEXT

_RANGES_SHOWN, _LAYERS_SHOWN = 4, 8
_STATUS_WORDS = {"missing": "not computed yet", "no_target": "with no target token"}


@dataclass(frozen=True)
class Summary:
    """Facts about an answer that hold for all its queries."""

    store: ProjectionStore
    options: ScanOptions
    kind: str | None
    """Kind of the score's preconditioner."""
    counts: Mapping[str, int]
    """Samples of the store by status."""
    n_scored: int
    name: str
    """The score: that of ``options``, or a text score."""
    joint: bool = False
    """One second moment over all layers."""
    contrast: str = ""
    """File of the control set."""
    query_model: str = ""
    """Folder of the checkpoint that projected the queries; empty for the job's own."""
    checkpoints: str = ""
    """The outputs whose scores are added, with their factors; empty for one output."""

    def lines(self, dampings: Sequence[float | str | None]) -> list[str]:
        """Describe the rows compared and the score's meaning, sign, unit and damping."""
        layers = self.options["layers"]
        lines = [labelled("store", str(self.store.path)), labelled("rows", self._rows())]
        if self.query_model:
            theirs = f"queries by {self.query_model}, documents by the job's model"
            lines.append(labelled("models", theirs))
        if layers is not None:
            names = list(layers[:_LAYERS_SHOWN])
            if len(layers) > _LAYERS_SHOWN:
                names.append(f"and {len(layers) - _LAYERS_SHOWN} more")
            lines.append(labelled("layers", ", ".join(names)))
        if self.store.head is not None and self.name != TEXT:
            how = self.options.get("head_sum")
            added = f"their score is added ({how}), with the store's damping"
            is_added = self.options.get("head") is not None
            lines.append(labelled("head", f"head rows: {added if is_added else 'left out'}"))
        lines += self._score_lines()
        if self.checkpoints:
            lines.append(labelled("sum", f"{self.checkpoints}; losses are those of the first"))
        sets = self.options.get("sets")
        if sets is not None:
            lines.append(labelled("sets", self._sets(sets)))
        if dampings != [None]:
            lines.append(labelled("damping", "; ".join(self._damping(d) for d in dampings)))
        return [line for text in lines for line in text.splitlines()]

    @property
    def has_wide_range(self) -> bool:
        """True if scores are not numbers around 1."""
        return self.name == TEXT or bool(self.name in SCORES and SCORES[self.name].unit)

    def _score_lines(self) -> list[str]:
        if self.name == TEXT:
            return [labelled("score", f"{TEXT}: {MEANING}")]
        if self.name == HIDDEN:
            return [labelled("score", f"{HIDDEN}: {HIDDEN_MEANING}")]
        score = self.options["score"]
        variant = f" by {self.kind}" if SCORES[score].any_curvature else ""
        variant += ", all layers jointly" if self.joint else ""
        meaning = f"{score}{variant}: {MEANINGS[score]}"
        if self.name not in WITH_TEXT:
            reduction = self.options.get("reduction", DEFAULT_REDUCTION)
            loss = f"{reduction} over a document's target tokens (--reduction)"
            lines = [labelled("score", meaning), labelled("", SIGN)]
            return lines + [labelled("loss", loss)] * SCORES[score].is_inner_product
        parts = [f"{self.name}: {MEANING_WITH_TEXT}", meaning, f"{TEXT}: {MEANING}"]
        return [labelled("" if n else "score", part) for n, part in enumerate(parts)]

    def _sets(self, sets: QuerySets) -> str:
        how = {"none": "single queries", "mean": "mean of queries", "max": "maximum of queries"}
        text = how[sets.aggregate]
        if sets.unit:
            text += ", each of unit length in the score's own metric"
        if sets.n_control:
            text += f"; less the mean of the {sets.n_control:,} of {self.contrast}"
        return text

    def _rows(self) -> str:
        domains = self.options["domains"]
        of_domains = f" of {listed(domains)}" if domains else ""
        text = f"{self.n_scored:,} documents{of_domains} compared"
        absent = [
            f"{n:,} {_STATUS_WORDS.get(status, status)}"
            for status, n in self.counts.items()
            if n and status != "ok"
        ]
        if absent:
            text += f"; without a row: {', '.join(absent)}"
        n_lost = self.counts["ok"] - self.n_scored
        if n_lost > 0 and self.checkpoints and not domains:
            text += f"; {n_lost:,} without a row at another checkpoint"
        elif n_lost > 0 and not domains:
            verify = f"python -m gradproj verify {self.store.path.parent}"
            text += f"; {n_lost:,} are recorded and their shard is gone: {verify}"
        ranges = self.store.missing_ranges() if self.counts["missing"] else []
        if ranges:
            spans = ", ".join(
                f"{a:,} to {b - 1:,}" if b - a > 1 else f"{a:,}" for a, b in ranges[:_RANGES_SHOWN]
            )
            text += f" (ids {spans}{', ...' if len(ranges) > _RANGES_SHOWN else ''})"
        return text

    def _damping(self, damping: float | str | None) -> str:
        if damping != "auto":
            return f"{damping:g} times each matrix's mean diagonal"
        names = self.options["layers"]
        chosen = [x for x in self.store.layers if names is None or x.name in names]
        widths = [x.slice_end - x.slice_start for x in chosen]
        widths = [sum(widths)] if self.joint else widths
        values = sorted({auto_damping(self.kind or "", width) for width in widths})
        by_width = " or ".join(f"{value:g}" for value in values)
        note = f"auto{', by width' if len(values) > 1 else ''}"
        return f"{by_width} times each matrix's mean diagonal ({note})"
