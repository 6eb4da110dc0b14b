"""The command ``domains``: compares a store's domains as a table, JSON and a figure."""

import io
import json
import math
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradproj.analysis import MEANINGS, SIGN
from gradproj.analysis.score_types import DOMAIN_SCORES
from gradproj.cli.score_args import ScoreArgs, check_has_rows
from gradproj.distributed import choose_device
from gradproj.errors import StoreError
from gradproj.flags import DEVICES, flag, parse
from gradproj.formatting import one_line
from gradproj.job.recorded_args import ReadingArgs, output_flag
from gradproj.report.domain_figure import draw_domains
from gradproj.report.domain_summary import DomainFacts, as_json, domain_facts, lost_text
from gradproj.report.number_format import digits, exponent_of, in_cell, scaled, whole
from gradproj.storage.object_path import path_of
from gradproj.storage.results import make_folder, write_result
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.layout import DOMAINS_DIR

JSON_NAME, MEANS_NAME, FIGURE_NAME = "domains.json", "mean_rows.npy", "domains.png"
MAX_DOMAINS_IN_MATRIX = 24
"""Domains in a printed matrix: more columns are wider than a terminal."""
PAIRS = 8
_NAME = 26


@dataclass(frozen=True, kw_only=True)
class DomainsConfig(ScoreArgs, ReadingArgs, title="domains"):
    """Which store to read, and where the files go."""

    output: str = output_flag()
    output_dir: str = flag(
        "Directory for the files; default: OUTPUT/domains.", "", path="DIR", remote=True
    )
    format: str = flag("Output format.", "table", choices=("table", "json"))
    device: str = flag("Device on which rows are compared.", "auto", choices=DEVICES)


def domains_command(argv: list[str]) -> None:
    """``python -m gradproj domains OUTPUT``"""
    (config,) = parse(
        argv,
        "gradproj domains",
        DomainsConfig,
        description="Mean gradients, cosines and influences of a store's domains.",
    )
    config.apply()
    for line in domains(config):
        print(line)


def domains(config: DomainsConfig) -> list[str]:
    """Compare the domains and write the files; return the lines to print.

    Raises:
        ConfigError: the store has no domains, an unknown layer, or a score that is no mean over
            pairs of documents.
        StoreError: no store, no row yet, or an output directory that cannot be written.
    """
    with ProjectionStore(config.output) as store:
        device, _ = choose_device(config.device, 0)
        facts = domain_facts(store, config.fitted_options(store, device, DOMAIN_SCORES))
        if not facts.shown:
            check_has_rows(store)
            verify = f"python -m gradproj verify {store.path.parent}"
            raise StoreError(f"{store.path}: no row of any domain can be read; see {verify}")
        content = as_json(facts, store, MEANS_NAME)
        folder = path_of(config.output_dir or store.path.parent / DOMAINS_DIR)
    written = _write(folder, content, facts)
    if config.format == "json":
        return [json.dumps(content, indent=2, allow_nan=False)]
    return [*table_lines(facts), "", f"written    {', '.join(written)} in {folder}"]


def _write(folder: Path, content: dict[str, Any], facts: DomainFacts) -> list[str]:
    """Write the files; return their names."""
    means = io.BytesIO()
    np.save(means, facts.matrix.mean.astype(np.float32))
    make_folder("--output_dir", folder)
    write_result("--output_dir", folder / MEANS_NAME, [means.getvalue()])
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_result("--output_dir", folder / JSON_NAME, [text.encode()])
    draw_domains(facts, folder / FIGURE_NAME)
    return [JSON_NAME, MEANS_NAME, FIGURE_NAME]


# --- the table ---


def table_lines(facts: DomainFacts) -> list[str]:
    """Return counts, the score's meaning, a line for each domain, and the two matrices."""
    matrix, counts = facts.matrix, facts.counts
    rest = [
        f"{counts.total(name):,} {'not computed yet' if name == 'missing' else name}"
        for name in STATUS
        if name != "ok" and counts.total(name)
    ]
    lost = lost_text(facts.n_lost, facts.output)
    unread = f"{': ' if rest else ''}{', '.join(rest)}"
    lines = [
        f"rows       {facts.n_rows:,} of {facts.n_samples:,} documents{unread}",
        *([f"damaged    {lost}"] if lost else []),
        *textwrap.wrap(
            f"{facts.score}: {MEANINGS[facts.score]}",
            118,
            initial_indent="score      ",
            subsequent_indent=" " * 11,
        ),
        f"           {SIGN}",
        "",
        f"{'no':>3}  {'domain':<{_NAME}} {'documents':>11} {'rows':>11} {'missing':>9} "
        f"{'tokens':>13} {'loss':>7} {'norm':>8} {'of mean':>8} {'eff. rank':>10}",
    ]
    places = {domain: number for number, domain in enumerate(facts.order, start=1)}
    of_mean = facts.norm_of_mean
    for domain, number in places.items():
        rank = "–"
        if matrix.n_drawn[domain]:
            rank = f"{matrix.effective_rank[domain]:.0f} of {matrix.n_drawn[domain]}"
        lines.append(
            f"{number:>3}  {one_line(matrix.names[domain], _NAME):<{_NAME}} "
            f"{whole(counts.n_documents[domain]):>11} {matrix.n_rows[domain]:>11,} "
            f"{whole(counts.n_missing(domain)):>9} {matrix.n_tokens[domain]:>13,} "
            f"{digits(matrix.loss[domain], 4):>7} {digits(matrix.grad_norm[domain]):>8} "
            f"{digits(of_mean[domain]):>8} {rank:>10}"
        )
    return [
        *lines,
        "",
        "loss: nats per target token; norm: mean norm of the rows; of mean: norm of the mean row;",
        "eff. rank: of so many rows scaled to length 1",
        *_matrices(facts, places),
    ]


def _matrices(facts: DomainFacts, places: dict[int, int]) -> list[str]:
    shown = facts.shown
    if len(shown) < 2:
        return []
    influence = (
        "influence: mean score over all pairs of documents (each with itself too), one domain's as "
        "queries"
    )
    lines_of = _pairs if len(shown) > MAX_DOMAINS_IN_MATRIX else _matrix
    return [
        *lines_of("cosine of the mean gradients", facts.matrix.cosine, facts, places),
        *lines_of(influence, facts.matrix.influence, facts, places),
    ]


def _matrix(
    title: str, values: np.ndarray, facts: DomainFacts, places: dict[int, int]
) -> list[str]:
    shown = facts.shown
    exponent = exponent_of(values[np.ix_(shown, shown)].ravel().tolist())
    unit = f", in 1e{exponent:+03d}" if exponent else ""
    lines = ["", f"{title}{unit}", " " * (5 + _NAME) + "".join(f"{places[i]:>5}" for i in shown)]
    for i in shown:
        cells = "".join(f"{in_cell(values[i, j] / 10.0**exponent):>5}" for j in shown)
        lines.append(f"{places[i]:>3}  {one_line(facts.matrix.names[i], _NAME):<{_NAME}}{cells}")
    return lines


def _pairs(title: str, values: np.ndarray, facts: DomainFacts, places: dict[int, int]) -> list[str]:
    """Return the extremes off the diagonal, for too many domains to print a matrix."""
    shown = facts.shown
    pairs = sorted(
        (
            (values[i, j], i, j)
            for a, i in enumerate(shown)
            for j in shown[a + 1 :]
            if math.isfinite(values[i, j])
        ),
        reverse=True,
    )
    exponent = exponent_of(value for value, _, _ in pairs)
    unit = f", in 1e{exponent:+03d}" if exponent else ""
    lines = [
        "",
        f"{title}{unit}: the {PAIRS} highest and lowest of {len(pairs):,} pairs "
        "(all are in the JSON)",
    ]
    for value, i, j in [*pairs[:PAIRS], *pairs[-PAIRS:]]:
        first, second = (f"{one_line(facts.matrix.names[k], _NAME)} ({places[k]})" for k in (i, j))
        lines.append(f"  {scaled(value, exponent):>9}  {first:<{_NAME + 5}} {second}")
    return lines
