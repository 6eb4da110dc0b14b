"""From a store to the page's data: everything but queries, which need the model."""

import importlib.metadata
import time
from collections.abc import Callable

from gradproj.analysis import MEANINGS, SIGN, overview
from gradproj.analysis.scan import ScanOptions
from gradproj.formatting import one_line
from gradproj.maintenance.status import Status, read_status
from gradproj.report.distributions import count_rows
from gradproj.report.document_tables import TextExcerpts, outlier_tables
from gradproj.report.domain_charts import (
    DOMAIN_COLUMNS,
    boxes_of,
    domain_lines,
    histograms_of,
    matrices_of,
    spread_of,
    why_no_matrix,
)
from gradproj.report.domain_summary import facts_of, refuse_nothing
from gradproj.report.figures import MOST_RANKS, throughput_chart
from gradproj.report.number_format import when
from gradproj.report.page import Figure, Page, QueryAnswer
from gradproj.report.run_summary import (
    coverage_figure,
    missing_text,
    run_facts,
    statuses_of,
    verdict_of,
    versions_text,
)
from gradproj.report.throughput import UNKNOWN_RANK, UnitTimes, throughput, unit_times
from gradproj.store import ProjectionStore


def make_page(
    store: ProjectionStore,
    how: ScanOptions,
    excerpts: TextExcerpts,
    top_k: int,
    answers: Callable[[], tuple[list[QueryAnswer], str, str]] | None = None,
) -> Page:
    """Everything on the page.

    Args:
        store: finished or not.
        how: of the scan for matrices and outliers.
        excerpts: where texts come from.
        top_k: documents in a table.
        answers: gives the queries' answers, their score and a note on them.

    Raises:
        ConfigError: an unknown layer, a damping without an inverse.
        StoreError: what the score needs is not there, or a record is damaged.
    """
    counts, status = count_rows(store), _status_of(store)
    times = unit_times(store.path.parent) if status is not None else None
    seen = overview(store, top_k, **how)
    refuse_nothing(seen.n_read, counts, store)
    found = None if seen.domains is None else facts_of(store, seen.domains, how, counts)
    missing = store.missing_ranges() if counts.total("missing") else []
    is_complete, verdict = verdict_of(store, counts, status, seen.n_read)
    spread, groups = spread_of(store, counts, top_k)
    outliers = outlier_tables(store, seen, spread, how["score"], excerpts)
    queries, score, note = answers() if answers is not None else ([], how["score"], "")
    picture, throughput_note = _throughput(times)
    return Page(
        title=f"gradproj report: {one_line(str(store.path.parent), 200)}",
        made=when(time.time()),
        version=importlib.metadata.version("gradproj"),
        verdict=verdict,
        is_complete=is_complete,
        facts=run_facts(store, status, times),
        versions=versions_text(store.attributes),
        coverage=coverage_figure(len(store), missing),
        missing=missing_text(missing),
        statuses=statuses_of(counts),
        throughput=picture,
        throughput_note=throughput_note,
        histograms=histograms_of(groups),
        boxes=boxes_of(groups),
        domain_columns=DOMAIN_COLUMNS,
        domain_lines=domain_lines(found, groups),
        score=score,
        meaning=MEANINGS[score],
        sign=SIGN[0].upper() + SIGN[1:],
        matrix_score=how["score"],
        matrix_meaning=MEANINGS[how["score"]],
        matrices=matrices_of(found),
        no_matrix=why_no_matrix(found),
        outliers=outliers,
        queries=queries,
        query_note=note,
        texts_note=excerpts.problem,
        notes=[] if status is None else [str(problem) for problem in status.problems],
    )


def _status_of(store: ProjectionStore) -> Status | None:
    """None for a store that no job made, such as a training run's."""
    if "wanted_units" not in store.attributes or "identity_hash" not in store.attributes:
        return None
    return read_status(store.path, rows=False)


# --- throughput ---


def _throughput(times: UnitTimes | None) -> tuple[Figure | None, str]:
    found = None if times is None else throughput(times)
    if times is None or found is None:
        return None, "No unit's record says when it was computed."
    cut = (
        f" Dashed lines: time in which no rank worked, cut out ({len(found.pauses)} times)."
        if found.pauses
        else ""
    )
    many = (
        f" Of {len(times.ranks):,} ranks, the fastest, median and slowest at each time."
        if len(times.ranks) > MOST_RANKS
        else ""
    )
    caption = (
        f"Tokens of documents, without padding, a second, from {when(found.from_s)} to {when(found.to_s)} by the "
        f"hosts' own clocks; a unit's tokens are spread evenly over the time it took.{many}{cut}"
    )
    notes = []
    if times.n_untimed:
        notes.append(f"{times.n_untimed:,} units' records do not say when they were computed.")
    if UNKNOWN_RANK in times.ranks:
        notes.append("Which rank computed a unit stands in logs/, which lacks some or all of them.")
    return Figure(throughput_chart(found, times.ranks), caption), " ".join(notes)
