"""Builds the page from a store. Queries need the model, so the caller answers them."""

import importlib.metadata
import time
from collections.abc import Callable

from gradproj.analysis import MEANINGS, SIGN, overview
from gradproj.analysis.scan import ScanOptions
from gradproj.formatting import count, one_line, ranges_text
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
from gradproj.report.domain_summary import check_any_row_is_readable, facts_from_matrix
from gradproj.report.figures import MAX_RANKS, throughput_chart
from gradproj.report.number_format import when
from gradproj.report.page import Figure, Page, QueryAnswer
from gradproj.report.run_summary import (
    coverage_figure,
    run_facts,
    statuses_of,
    verdict_of,
    versions_text,
)
from gradproj.report.throughput import UNKNOWN_RANK, UnitTimes, throughput, unit_times
from gradproj.store import ProjectionStore


def make_page(
    store: ProjectionStore,
    options: ScanOptions,
    excerpts: TextExcerpts,
    top_k: int,
    answers: Callable[[], tuple[list[QueryAnswer], str, str]] | None = None,
) -> Page:
    """Return the content of the page of a finished or unfinished store.

    ``options`` are arguments of the scan for matrices and outliers; a table has ``top_k``
    documents. ``answers`` returns the queries' answers, their score and a note.
    """
    counts, status = count_rows(store), _status_of(store)
    times = unit_times(store.path.parent) if status is not None else None
    seen = overview(store, top_k, **options)
    check_any_row_is_readable(seen.n_read, counts, store)
    matrix = seen.domains
    facts = None if matrix is None else facts_from_matrix(store, matrix, options, counts)
    missing = store.missing_ranges() if counts.total("missing") else []
    is_complete, verdict = verdict_of(store, counts, status, seen.n_read)
    spread, groups = spread_of(store, counts, top_k)
    queries, score, note = answers() if answers else ([], options["score"], "")
    speed, speed_note = throughput_figure(times)
    return Page(
        title=f"gradproj report: {one_line(str(store.path.parent), 200)}",
        made=when(time.time()),
        version=importlib.metadata.version("gradproj"),
        verdict=verdict,
        is_complete=is_complete,
        facts=run_facts(store, status, times),
        versions=versions_text(store.attributes),
        coverage=coverage_figure(len(store), missing),
        missing=ranges_text(missing, 40),
        statuses=statuses_of(counts),
        throughput=speed,
        throughput_note=speed_note,
        histograms=histograms_of(groups),
        boxes=boxes_of(groups),
        domain_columns=DOMAIN_COLUMNS,
        domain_lines=domain_lines(facts, groups),
        score=score,
        meaning=MEANINGS[score],
        sign=SIGN[0].upper() + SIGN[1:],
        matrix_score=options["score"],
        matrix_meaning=MEANINGS[options["score"]],
        matrices=matrices_of(facts),
        no_matrix=why_no_matrix(facts),
        outliers=outlier_tables(store, seen, spread, options["score"], excerpts),
        queries=queries,
        query_note=note,
        texts_note=excerpts.problem,
        notes=[] if status is None else [str(problem) for problem in status.problems],
    )


def _status_of(store: ProjectionStore) -> Status | None:
    """Return the job's status; None for other stores, such as a training run's."""
    if "wanted_units" not in store.attributes or "identity_hash" not in store.attributes:
        return None
    return read_status(store.path, rows=False)


def throughput_figure(times: UnitTimes | None) -> tuple[Figure | None, str]:
    """Return the figure of tokens a second, if any unit is timed, and a note on missing data."""
    speed = None if times is None else throughput(times)
    if times is None or speed is None:
        return None, "No unit's record has the time when it was computed."
    cut = ""
    if speed.pauses:
        n_pauses = count(len(speed.pauses), "pause")
        cut = f" Dashed lines: {n_pauses} in which no rank worked, cut out."
    many = ""
    if len(times.ranks) > MAX_RANKS:
        shown = "the fastest, median and slowest at each time are shown"
        many = f" Of {len(times.ranks):,} ranks, {shown}."
    caption = (
        f"Tokens a second, without padding, from {when(speed.from_s)} to {when(speed.to_s)} by the "
        f"hosts' own clocks. A unit's tokens are spread evenly over its time.{many}{cut}"
    )
    notes = []
    if times.n_untimed:
        notes.append(f"{times.n_untimed:,} units' records have no times.")
    if UNKNOWN_RANK in times.ranks:
        notes.append("The rank of some units is unknown: logs/ does not have it.")
    return Figure(throughput_chart(speed, times.ranks), caption), " ".join(notes)
