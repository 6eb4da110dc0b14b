"""Facts of the run for the page: model, rows, corpus, work, completeness."""

from collections.abc import Mapping
from typing import Any

from gradproj.formatting import count, human_seconds
from gradproj.maintenance.status import Status
from gradproj.report.distributions import RowCounts
from gradproj.report.domain_summary import lost_text
from gradproj.report.figures import coverage_chart
from gradproj.report.number_format import digits, when
from gradproj.report.page import Figure
from gradproj.report.throughput import UnitTimes
from gradproj.store import STATUS, ProjectionStore

STATUS_MEANINGS = {
    "missing": "not computed yet",
    "ok": "has a row",
    "empty": "has no text",
    "no_target": "is a single token, which has no target; its row is zero",
    "not_selected": "of a domain that the job left out",
    "non_finite": "its gradient is not finite",
    "bad_input": "could not be read; see the ranks' logs for the reason",
    "out_of_memory": "did not fit the device's memory",
}
MODEL_FACTS = {
    "model": "model",
    "architecture": "architecture",
    "init": "weights",
    "revision": "revision",
    "tokenizer": "tokenizer",
    "special_tokens": "special tokens",
    "model_dtype": "precision",
    "max_length": "longest",
    "long_documents": "longer ones",
    "loss_reduction": "loss of a row",
}
Facts = list[tuple[str, list[tuple[str, str]]]]


def run_facts(store: ProjectionStore, status: Status | None, times: UnitTimes | None) -> Facts:
    """Return the facts that the store records, in groups."""
    facts = {
        "Model": _set_values(_part(store.attributes, "model"), MODEL_FACTS),
        "Rows": _rows(store),
        "Corpus": _corpus(store),
        "Work": _work(store, status, times),
    }
    return [(heading, group) for heading, group in facts.items() if group]


def versions_text(attributes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in _part(attributes, "versions").items())


def _part(attributes: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = attributes.get(name)
    return part if isinstance(part, Mapping) else {}


def _set_values(part: Mapping[str, Any], names: Mapping[str, str]) -> list[tuple[str, str]]:
    shown = ((label, part.get(key)) for key, label in names.items())
    return [(label, _text(value)) for label, value in shown if value not in (None, "", [], {})]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _rows(store: ProjectionStore) -> list[tuple[str, str]]:
    projection = _part(store.attributes, "projection")
    layout, compressor = store.layout, f"compressor {store.layout.compressor}"
    n_bytes = layout.row_bytes
    widths = sorted({layer.slice_end - layer.slice_start for layer in store.layers})
    each = f" of {widths[0]:,}" if len(widths) == 1 else ""
    return [
        ("values", f"{store.dim:,} in {count(len(store.layers), 'layer')}{each}"),
        ("stored as", f"{layout.stored_as}, {n_bytes:,} bytes a row, {compressor}"),
        *_set_values(projection, {"kind": "projection", "seed": "its seed", "layers": "layers"}),
        ("shards", f"{layout.n_units:,} of {layout.rows_per_shard:,} rows"),
    ]


def _corpus(store: ProjectionStore) -> list[tuple[str, str]]:
    names = {"n_tars": "tars", "tars": "in", "domain_field": "domain by"}
    return [
        ("documents", f"{len(store):,}"),
        ("domains", f"{len(store.domains):,}"),
        *_set_values(_part(store.attributes, "corpus"), {**names, "fingerprint": "fingerprint"}),
    ]


def _work(
    store: ProjectionStore, status: Status | None, times: UnitTimes | None
) -> list[tuple[str, str]]:
    if status is None:
        return [("job", "unknown: the store is not an output of gradproj.run")]
    facts = [
        ("units", f"{status.n_committed:,} of {status.n_units:,} committed"),
        ("merged", "yes" if status.merged else "not yet"),
    ]
    if times is not None and len(times.started):
        n_tokens, working = float(times.n_tokens.sum()), max(times.working_s, 1e-9)
        by_rank, of_ranks = n_tokens / max(times.rank_s, 1e-9), human_seconds(times.rank_s)
        facts += [
            ("started", when(times.started.min())),
            ("last unit", when(times.finished.max())),
            ("working time", f"{human_seconds(working)}; {of_ranks} over all ranks"),
            ("tokens", f"{n_tokens:,.0f}"),
            ("speed", f"{digits(n_tokens / working)} tokens/s, {digits(by_rank)} a rank"),
        ]
    if status.failed is not None:
        facts.append(("last failure", str(status.failed.get("error", "unknown"))))
    return facts


def verdict_of(
    store: ProjectionStore, counts: RowCounts, status: Status | None, n_read: int
) -> tuple[bool, str]:
    """Return whether the store is complete, and a sentence on it.

    ``n_read`` is the number of rows that the scan read.
    """
    n_ok, n_missing = counts.total("ok"), counts.total("missing")
    if n_read < n_ok:
        lost = lost_text(n_ok - n_read, str(store.path.parent))
        return False, f"Damaged: of {count(len(store), 'document')}, {lost}."
    rows = f"{n_ok:,} of {len(store):,} documents have a row"
    if n_missing:
        return False, f"Incomplete: {rows}; {n_missing:,} are not computed yet."
    if status is not None and not status.complete:
        way = "" if status.missing_units else f" (python -m gradproj merge {status.output} ends it)"
        return False, f"Not merged yet: {rows}{way}."
    rest = f"; {count(len(store) - n_ok, 'document')} without one" if n_ok < len(store) else ""
    return True, f"Complete: {rows}{rest}."


def statuses_of(counts: RowCounts) -> list[tuple[str, str, str]]:
    """Return ``(status, documents, meaning)`` of the statuses that occur."""
    totals = ((name, counts.total(name)) for name in STATUS)
    return [(name, f"{n:,}", STATUS_MEANINGS[name]) for name, n in totals if n]


def coverage_figure(n_samples: int, missing: list[tuple[int, int]]) -> Figure:
    n_missing = sum(stop - start for start, stop in missing)
    gaps = f"white: {n_missing:,} documents not computed yet" if n_missing else "nothing is missing"
    return Figure(coverage_chart(n_samples, missing), f"Documents by sample id; {gaps}.")
