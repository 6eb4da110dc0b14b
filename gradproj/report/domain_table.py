"""The domains of a store as lines of text."""

import math
import textwrap

import numpy as np

from gradproj.analysis import MEANINGS, SIGN
from gradproj.formatting import one_line
from gradproj.report.domain_summary import DomainFacts, lost_text
from gradproj.report.number_format import digits, exponent_of, in_cell, scaled, whole
from gradproj.store import STATUS

MOST_IN_A_MATRIX = 24
"""A matrix of more columns is wider than a terminal."""
PAIRS = 8
_NAME = 26


def table_lines(facts: DomainFacts) -> list[str]:
    """What was compared and what the numbers mean, a line for each domain, and the two matrices."""
    matrix, counts = facts.matrix, facts.counts
    rest = [
        f"{counts.total(name):,} {'not computed yet' if name == 'missing' else name}"
        for name in STATUS
        if name != "ok" and counts.total(name)
    ]
    lost = lost_text(facts.n_lost, facts.output)
    lines = [
        f"rows       {facts.n_rows:,} of {facts.n_samples:,} documents{': ' if rest else ''}{', '.join(rest)}",
        *([f"damaged    {lost}"] if lost else []),
        *textwrap.wrap(
            f"{facts.score}: {MEANINGS[facts.score]}",
            118,
            initial_indent="score      ",
            subsequent_indent=" " * 11,
        ),
        f"           {SIGN}",
        "",
        f"{'no':>3}  {'domain':<{_NAME}} {'documents':>11} {'rows':>11} {'missing':>9} {'tokens':>13} "
        f"{'loss':>7} {'norm':>8} {'of mean':>8} {'eff. rank':>10}",
    ]
    places = {domain: number for number, domain in enumerate(facts.order, start=1)}
    of_mean = facts.norm_of_mean
    for domain, number in places.items():
        rank = "–"
        if matrix.n_drawn[domain]:
            rank = f"{matrix.effective_rank[domain]:.0f} of {matrix.n_drawn[domain]}"
        lines.append(
            f"{number:>3}  {one_line(matrix.names[domain], _NAME):<{_NAME}} {whole(counts.n_documents[domain]):>11} "
            f"{matrix.n_rows[domain]:>11,} {whole(counts.n_missing(domain)):>9} {matrix.n_tokens[domain]:>13,} "
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
    influence = "influence: mean score over all pairs of documents (also with themselves), one domain's as queries"
    if len(shown) > MOST_IN_A_MATRIX:
        return [
            *_pairs("cosine of the mean gradients", facts.matrix.cosine, facts, places),
            *_pairs(influence, facts.matrix.influence, facts, places),
        ]
    return [
        *_matrix("cosine of the mean gradients", facts.matrix.cosine, facts, places),
        *_matrix(influence, facts.matrix.influence, facts, places),
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
    """The extremes off the diagonal, where there are too many domains for a matrix."""
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
        f"{title}{unit}: the {PAIRS} highest and lowest of {len(pairs):,} pairs (all are in the JSON)",
    ]
    for value, i, j in [*pairs[:PAIRS], *pairs[-PAIRS:]]:
        first, second = (f"{one_line(facts.matrix.names[k], _NAME)} ({places[k]})" for k in (i, j))
        lines.append(f"  {scaled(value, exponent):>9}  {first:<{_NAME + 5}} {second}")
    return lines
