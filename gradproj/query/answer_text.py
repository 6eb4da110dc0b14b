"""Answers as a table for people and as JSON lines for programs: the same facts in both."""

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradproj.analysis import MEANINGS, SIGN, TopDocuments
from gradproj.analysis.preconditioner import auto_damping
from gradproj.analysis.ranking import Ranking, in_common
from gradproj.formatting import clean_lines, listed, one_line
from gradproj.query import QueryRows
from gradproj.store import ProjectionStore
from gradproj.store.layer_view import Sample

JSON_TEXT_CHARACTERS = 1000
"""Of a document, as it is; the table has a line of it."""
_WIDTH = 118
_NAME = 200
"""Most characters of a query's name, a key, a domain."""
_RANGES_SHOWN, _LAYERS_SHOWN = 4, 8
_LABEL = 9


@dataclass(frozen=True)
class About:
    """What an answer is, for all queries."""

    store: ProjectionStore
    score: str
    kind: str | None
    """Of the curvature that the score is made with."""
    layers: Sequence[str] | None
    """Those asked for; None: all."""
    domains: Sequence[str] | None
    counts: Mapping[str, int]
    """Samples of the store by status."""
    n_scored: int
    joint: bool = False
    """One matrix for all layers."""

    def lines(self, dampings: Sequence[float | str | None]) -> list[str]:
        """What was compared, what a score means, its sign, unit and damping."""
        lines = [_labelled("store", str(self.store.path)), _labelled("rows", self._rows())]
        if self.layers is not None:
            more = (
                [f"and {len(self.layers) - _LAYERS_SHOWN} more"]
                if len(self.layers) > _LAYERS_SHOWN
                else []
            )
            lines.append(_labelled("layers", ", ".join([*self.layers[:_LAYERS_SHOWN], *more])))
        by = (
            f" by {self.kind}"
            if self.score == "relatif"
            else ", all layers jointly"
            if self.joint
            else ""
        )
        lines += [
            _labelled("score", f"{self.score}{by}: {MEANINGS[self.score]}"),
            _labelled("", SIGN),
        ]
        if dampings != [None]:
            lines.append(_labelled("damping", "; ".join(self._damping(d) for d in dampings)))
        return [line for labelled in lines for line in labelled.splitlines()]

    def _rows(self) -> str:
        of = f" of {listed(self.domains)}" if self.domains else ""
        text = f"{self.n_scored:,} documents{of} compared"
        others = [f"{n:,} {_STATUS_WORDS.get(name, name)}" for name, n in self.counts.items() if n]
        absent = [words for words in others if not words.endswith(" ok")]
        if absent:
            text += f"; without a row: {', '.join(absent)}"
        n_lost = self.counts["ok"] - self.n_scored
        if n_lost > 0 and not self.domains:
            way_out = f"python -m gradproj verify {self.store.path.parent}"
            text += f"; {n_lost:,} are recorded and their shard is gone: {way_out}"
        ranges = self.store.missing_ranges() if self.counts["missing"] else []
        if ranges:
            shown = ", ".join(
                f"{a:,} to {b - 1:,}" if b - a > 1 else f"{a:,}" for a, b in ranges[:_RANGES_SHOWN]
            )
            text += f" (ids {shown}{', ...' if len(ranges) > _RANGES_SHOWN else ''})"
        return text

    def _damping(self, damping: float | str | None) -> str:
        if damping != "auto":
            return f"{damping:g} times each matrix's mean diagonal"
        chosen = [x for x in self.store.layers if self.layers is None or x.name in self.layers]
        widths = [x.slice_end - x.slice_start for x in chosen]
        values = sorted(
            {
                auto_damping(self.kind or "", width)
                for width in ([sum(widths)] if self.joint else widths)
            }
        )
        by_width = " or ".join(f"{value:g}" for value in values)
        return f"{by_width} times each matrix's mean diagonal (auto{', by width' if len(values) > 1 else ''})"


_STATUS_WORDS = {"missing": "not computed yet", "no_target": "with no target token"}


def describe(
    store: ProjectionStore, answers: Sequence[Ranking], read_text: Callable[[int], str] | None
) -> dict[int, Sample]:
    """What the store knows of every document in the answers, and the beginnings of their texts."""
    ids = sorted(
        {int(i) for a in answers for end in (a.top, a.bottom) for i in np.asarray(end.ids).flat}
    )
    found = {sample.sample_id: sample for sample in store.samples(ids)}
    if read_text is None:
        return found
    return {i: replace(s, text=read_text(i)[:JSON_TEXT_CHARACTERS]) for i, s in found.items()}


# ---- A table


def table_lines(
    about: About, asked: QueryRows, answers: Sequence[Ranking], samples: Mapping[int, Sample]
) -> Iterator[str]:
    """The answer for people; control characters of texts and keys are replaced."""
    yield from about.lines([a.damping for a in answers])
    for answer in answers:
        for number in range(len(asked.names)):
            yield ""
            yield from _query_lines(asked, number, answer.damping if len(answers) > 1 else None)
            for name, end in (("top", answer.top), ("bottom", answer.bottom)):
                if end.ids.shape[1]:
                    yield from _end_lines(name, end, number, samples, about.score)
    if len(answers) > 1:
        yield ""
        yield from overlap_lines(answers)


def overlap_lines(answers: Sequence[Ranking]) -> Iterator[str]:
    """How far the answers by several dampings agree."""
    names = [_damping_name(a.damping) for a in answers]
    k = max(a.top.ids.shape[1] or a.bottom.ids.shape[1] for a in answers)
    end = "top" if answers[0].top.ids.shape[1] else "bottom"
    yield f"share of the {end} {k} in common, by damping, mean over the queries"
    yield " " * 10 + "".join(f"{name:>8}" for name in names)
    for name, shares in zip(names, in_common(answers), strict=True):
        yield f"{name:>10}" + "".join(f"{share:>8.2f}" for share in shares)


def _query_lines(asked: QueryRows, number: int, damping: float | str | None) -> Iterator[str]:
    facts = (
        f"{asked.n_tokens[number]:,} target tokens, loss {asked.loss[number]:.3f} nats per token"
    )
    by = "" if damping is None else f"; damping {_damping_name(damping)}"
    yield from _labelled(
        "query", f"{one_line(asked.names[number], _NAME)}: {facts}{by}"
    ).splitlines()
    if asked.excerpts[number]:
        yield from _labelled("", asked.excerpts[number]).splitlines()


def _end_lines(
    name: str, end: TopDocuments, number: int, samples: Mapping[int, Sample], score: str
) -> Iterator[str]:
    yield f"{name:<6}{'score':>11}  {'id':>9}  {'loss':>6}  {'domain':<18}  key"
    ids, scores = end.ids[number].tolist(), end.scores[number].tolist()
    for rank, (sample_id, value) in enumerate(zip(ids, scores, strict=True), start=1):
        sample = samples[sample_id]
        shown = f"{value:+.4f}" if score == "cosine" else f"{value:+.3e}"
        yield (
            f"{rank:>5} {shown:>11}  {sample_id:>9}  {sample.loss:>6.3f}  {one_line(sample.domain or '-', _NAME):<18}  "
            f"{one_line(sample.key, _NAME)}"
        )
        if sample.text is not None:
            yield f"      {one_line(sample.text, _WIDTH - 6)}"


def _labelled(label: str, text: str) -> str:
    before, after = f"{label:<{_LABEL}}", " " * _LABEL
    return textwrap.fill(
        clean_lines(text),
        _WIDTH,
        initial_indent=before,
        subsequent_indent=after,
        break_long_words=False,
    )


def _damping_name(damping: float | str | None) -> str:
    return damping if isinstance(damping, str) else f"{damping:g}"


# ---- JSON


def json_lines(
    asked: QueryRows, answers: Sequence[Ranking], samples: Mapping[int, Sample]
) -> Iterator[str]:
    """An object for each document in an answer, all with the same keys: what ``pandas.read_json(lines=True)`` takes."""
    with_text = any(sample.text is not None for sample in samples.values())
    for answer in answers:
        for number, name in enumerate(asked.names):
            for end_name, end in (("top", answer.top), ("bottom", answer.bottom)):
                ids, scores = end.ids[number].tolist(), end.scores[number].tolist()
                for rank, (sample_id, value) in enumerate(zip(ids, scores, strict=True), start=1):
                    sample = samples[sample_id]
                    fields: dict[str, Any] = {
                        "query": name,
                        "end": end_name,
                        "rank": rank,
                        "score": _finite(value),
                        "id": sample_id,
                        "key": sample.key,
                        "domain": sample.domain,
                        "loss": _finite(sample.loss),
                        "n_tokens": sample.n_tokens,
                        "query_loss": _finite(float(asked.loss[number])),
                        "query_n_tokens": int(asked.n_tokens[number]),
                        "damping": answer.damping,
                    }
                    if with_text:
                        fields["text"] = sample.text
                    yield json.dumps(fields, allow_nan=False)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
