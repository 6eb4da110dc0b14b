"""Rankings as a table and as JSON lines, with the same facts in both."""

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from gradproj.analysis import MEANINGS, SCORES, SIGN, TopDocuments
from gradproj.analysis.preconditioner import auto_damping
from gradproj.analysis.ranking import Ranking, overlap
from gradproj.analysis.reduction import DEFAULT_REDUCTION
from gradproj.analysis.scan import ScanOptions
from gradproj.cli.query_rescore import FirstStage
from gradproj.formatting import clean_lines, escaped, listed, one_line
from gradproj.query import QueryRows
from gradproj.store import ProjectionStore
from gradproj.store.layer_view import Sample
from gradproj.text.ranking import MEANING, MEANING_WITH_TEXT, TEXT, WITH_TEXT

JSON_TEXT_CHARACTERS = 1000
"""Longest text in the JSON lines; the table has one line of it."""
_WIDTH = 118
_NAME = 200
"""Longest name of a query, key or domain in the table."""
_RANGES_SHOWN, _LAYERS_SHOWN = 4, 8
_LABEL = 9
_COLUMN = 12
_STATUS_WORDS = {"missing": "not computed yet", "no_target": "with no target token"}


Columns = dict[str, dict[tuple[int, int], float]]
"""Title of a column of scores -> (number of the query, sample id) -> value."""


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

    def lines(self, dampings: Sequence[float | str | None]) -> list[str]:
        """Describe the rows compared and the score's meaning, sign, unit and damping."""
        layers = self.options["layers"]
        lines = [_labelled("store", str(self.store.path)), _labelled("rows", self._rows())]
        if layers is not None:
            names = list(layers[:_LAYERS_SHOWN])
            if len(layers) > _LAYERS_SHOWN:
                names.append(f"and {len(layers) - _LAYERS_SHOWN} more")
            lines.append(_labelled("layers", ", ".join(names)))
        if self.options.get("head") is not None:
            how = self.options.get("head_sum")
            lines.append(
                _labelled("head rows", f"their score is added ({how}), with the store's damping")
            )
        lines += self._score_lines()
        if dampings != [None]:
            lines.append(_labelled("damping", "; ".join(self._damping(d) for d in dampings)))
        return [line for labelled in lines for line in labelled.splitlines()]

    @property
    def has_wide_range(self) -> bool:
        """True if scores are not numbers around 1."""
        return self.name == TEXT or bool(self.name in SCORES and SCORES[self.name].unit)

    def _score_lines(self) -> list[str]:
        if self.name == TEXT:
            return [_labelled("score", f"{TEXT}: {MEANING}")]
        score = self.options["score"]
        variant = f" by {self.kind}" if SCORES[score].any_curvature else ""
        variant += ", all layers jointly" if self.joint else ""
        meaning = f"{score}{variant}: {MEANINGS[score]}"
        if self.name not in WITH_TEXT:
            reduction = self.options.get("reduction", DEFAULT_REDUCTION)
            loss = f"{reduction} over a document's target tokens (--reduction)"
            lines = [_labelled("score", meaning), _labelled("", SIGN)]
            return lines + [_labelled("loss", loss)] * SCORES[score].is_inner_product
        parts = [f"{self.name}: {MEANING_WITH_TEXT}", meaning, f"{TEXT}: {MEANING}"]
        return [_labelled("" if n else "score", part) for n, part in enumerate(parts)]

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
        if n_lost > 0 and not domains:
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


def describe(
    store: ProjectionStore, rankings: Sequence[Ranking], read_text: Callable[[int], str] | None
) -> dict[int, Sample]:
    """Return the columns of every ranked document, with the beginning of its text if wanted."""
    ends = [end for ranking in rankings for end in (ranking.top, ranking.bottom)]
    ids = sorted({int(i) for end in ends for i in np.asarray(end.ids).flat})
    samples = {sample.sample_id: sample for sample in store.samples(ids)}
    if read_text is None:
        return samples
    return {i: replace(s, text=read_text(i)[:JSON_TEXT_CHARACTERS]) for i, s in samples.items()}


# --- table ---


def table_lines(
    summary: Summary,
    queries: QueryRows,
    rankings: Sequence[Ranking],
    samples: Mapping[int, Sample],
    first: FirstStage | None,
    columns: Columns,
) -> Iterator[str]:
    """Yield the lines of the table, with control characters of texts and keys replaced."""
    yield from summary.lines([ranking.damping for ranking in rankings])
    if first is not None:
        yield from rescored_lines(first)
    for ranking in rankings:
        for number in range(len(queries.names)):
            yield ""
            yield from _query_lines(queries, number, ranking.damping if len(rankings) > 1 else None)
            for name, end in (("top", ranking.top), ("bottom", ranking.bottom)):
                if end.ids.shape[1]:
                    # Rescored, it is an influence, whatever the score of the scan is.
                    wide = first is not None or summary.has_wide_range
                    yield from _end_lines(name, end, number, samples, first, columns, wide)
    if len(rankings) > 1:
        yield ""
        yield from overlap_lines(rankings)


def rescored_lines(first: FirstStage) -> list[str]:
    """Describe the second stage, as lines of the summary."""
    columns = "scan: place and score in the scan"
    columns += "" if first.text is None else "; text: place by shared text"
    return [*_labelled("rescored", first.note).splitlines(), _labelled("", columns)]


def overlap_lines(rankings: Sequence[Ranking]) -> Iterator[str]:
    """Yield a table of how far the rankings by several dampings agree."""
    names = [_damping_name(ranking.damping) for ranking in rankings]
    k = max(ranking.top.ids.shape[1] or ranking.bottom.ids.shape[1] for ranking in rankings)
    end = "top" if rankings[0].top.ids.shape[1] else "bottom"
    yield f"share of the {end} {k} in common, by damping, mean over the queries"
    yield " " * 10 + "".join(f"{name:>8}" for name in names)
    for name, fractions in zip(names, overlap(rankings), strict=True):
        yield f"{name:>10}" + "".join(f"{fraction:>8.2f}" for fraction in fractions)


def _query_lines(queries: QueryRows, number: int, damping: float | str | None) -> Iterator[str]:
    n_tokens, loss = queries.n_tokens[number], queries.loss[number]
    text = f"{one_line(queries.names[number], _NAME)}: {n_tokens:,} target tokens"
    text += "" if math.isnan(loss) else f", loss {loss:.3f} nats per token"
    text += "" if damping is None else f"; damping {_damping_name(damping)}"
    yield from _labelled("query", text).splitlines()
    if queries.excerpts[number]:
        yield from _labelled("", queries.excerpts[number]).splitlines()


def _end_lines(
    name: str,
    end: TopDocuments,
    number: int,
    samples: Mapping[int, Sample],
    first: FirstStage | None,
    columns: Columns,
    wide: bool,
) -> Iterator[str]:
    titles = "" if first is None else first.header()
    titles += "".join(f"{title:>{_COLUMN}}" for title in columns)
    yield f"{name:<6}{'score':>11}{titles}  {'id':>9}  {'loss':>6}  {'domain':<18}  key"
    ids, scores = end.ids[number].tolist(), end.scores[number].tolist()
    for place, (sample_id, value) in enumerate(zip(ids, scores, strict=True), start=1):
        sample = samples[sample_id]
        text = f"{f'{value:+.3e}' if wide else f'{value:+.4f}':>11}"
        text += "" if first is None else first.columns(number, sample_id)
        for column in columns.values():
            text += f"{column[number, sample_id]:>{_COLUMN}.3e}"
        domain, key = one_line(sample.domain or "-", _NAME), one_line(escaped(sample.key), _NAME)
        yield f"{place:>5} {text}  {sample_id:>9}  {sample.loss:>6.3f}  {domain:<18}  {key}"
        if sample.text is not None:
            yield f"      {one_line(sample.text, _WIDTH - 6)}"


def _labelled(label: str, text: str) -> str:
    return textwrap.fill(
        clean_lines(text),
        _WIDTH,
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
    )


def _damping_name(damping: float | str | None) -> str:
    return damping if isinstance(damping, str) else f"{damping:g}"


# --- JSON lines ---


def json_lines(
    queries: QueryRows,
    rankings: Sequence[Ranking],
    samples: Mapping[int, Sample],
    first: FirstStage | None,
    columns: Columns,
) -> Iterator[str]:
    """Yield one object per ranked document, all with the same keys.

    ``pandas.read_json(lines=True)`` reads them.
    """
    with_text = any(sample.text is not None for sample in samples.values())
    for ranking in rankings:
        for number, name in enumerate(queries.names):
            for end_name, end in (("top", ranking.top), ("bottom", ranking.bottom)):
                ids, scores = end.ids[number].tolist(), end.scores[number].tolist()
                for place, (sample_id, value) in enumerate(zip(ids, scores, strict=True), start=1):
                    sample = samples[sample_id]
                    fields = {
                        "query": name,
                        "end": end_name,
                        "rank": place,
                        "score": _finite(value),
                        "id": sample_id,
                        "key": escaped(sample.key),
                        "domain": sample.domain,
                        "loss": _finite(sample.loss),
                        "n_tokens": sample.n_tokens,
                        "query_loss": _finite(float(queries.loss[number])),
                        "query_n_tokens": int(queries.n_tokens[number]),
                        "damping": ranking.damping,
                    }
                    if first is not None:
                        fields |= first.fields(number, sample_id)
                    for title, column in columns.items():
                        fields[title.replace(" ", "_")] = _finite(column[number, sample_id])
                    if with_text:
                        fields["text"] = sample.text
                    yield json.dumps(fields, allow_nan=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
