"""The page's figures and table of domains."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.formatting import one_line
from gradproj.report.distributions import (
    HISTOGRAM_COLUMNS,
    Distributions,
    Histogram,
    RowCounts,
    distributions,
)
from gradproj.report.domain_summary import DomainFacts
from gradproj.report.figures import boxes_chart, histogram_chart, matrix_chart
from gradproj.report.number_format import digits, whole
from gradproj.report.page import Figure
from gradproj.report.svg import Drawing
from gradproj.store import ProjectionStore

MAX_CHARTED_DOMAINS = 30
"""Domains shown one by one, those with the most rows; the others are grouped."""
BOX_CAPTION = (
    "Line: 5 % to 95 % quantile of the documents; box: the middle half; heavy mark: the median. "
    "Documents without a row are left out."
)
DOMAIN_COLUMNS = [
    "domain", "documents", "with a row", "missing", "target tokens", "loss, nats/token",
    "median loss", "mean norm", "norm of mean", "effective rank",
]  # fmt: skip


@dataclass(frozen=True)
class Group:
    """Documents of one row of a figure: of one domain, or of several."""

    label: str
    domains: list[int]
    """Codes of the domains; -1 is no domain."""
    loss: Histogram
    grad_norm: Histogram


def spread_of(
    store: ProjectionStore, counts: RowCounts, top_k: int
) -> tuple[Distributions, list[Group]]:
    """Return losses and norms of each large domain, of the others, and of no domain."""
    largest = sorted(np.flatnonzero(counts.n_rows).tolist(), key=lambda i: -counts.n_rows[i])
    shown, rest = largest[:MAX_CHARTED_DOMAINS], largest[MAX_CHARTED_DOMAINS:]
    wanted = [(store.domains[i], [i]) for i in shown]
    wanted += [(f"{len(rest)} other domains", rest)] if rest else []
    wanted += [("no domain", [-1])]
    spread = distributions(store, [domains for _, domains in wanted], top_k)
    groups = [
        Group(label, domains, *(spread.groups[column][number] for column in HISTOGRAM_COLUMNS))
        for number, (label, domains) in enumerate(wanted)
    ]
    return spread, [group for group in groups if group.loss.n or group.grad_norm.n]


def histograms_of(groups: Sequence[Group]) -> list[Drawing]:
    """Return the histograms of losses and norms of all documents."""
    if not groups:
        return []
    losses = Histogram(np.sum([group.loss.counts for group in groups], axis=0))
    norms = Histogram(np.sum([group.grad_norm.counts for group in groups], axis=0))
    return [
        histogram_chart(losses, "loss", "nats per target token", log=False),
        histogram_chart(norms, "norm of the row", "as projected", log=True),
    ]


def boxes_of(groups: Sequence[Group]) -> Figure | None:
    """Return the quantiles of each group; None for fewer than two groups."""
    if len(groups) < 2:
        return None
    panels = [
        ("loss, nats per target token", False, [group.loss for group in groups]),
        ("norm of the row", True, [group.grad_norm for group in groups]),
    ]
    labels = [group.label for group in groups]
    chart = boxes_chart(labels, panels, "Quantiles of loss and norm for each domain.")
    return Figure(chart, BOX_CAPTION)


def domain_lines(facts: DomainFacts | None, groups: Sequence[Group]) -> list[list[str]]:
    """Return the cells of a row for each domain, those with the most rows first."""
    if facts is None:
        return []
    matrix, counts, of_mean = facts.matrix, facts.counts, facts.norm_of_mean
    single = [group for group in groups if len(group.domains) == 1]
    medians = {group.domains[0]: group.loss.quantile(0.5) for group in single}
    lines = []
    for i in sorted(range(len(matrix.names)), key=lambda i: (-matrix.n_rows[i], matrix.names[i])):
        n_drawn = matrix.n_drawn[i]
        rank = f"{matrix.effective_rank[i]:.0f} of {n_drawn}" if n_drawn else "–"
        cells = [
            one_line(matrix.names[i], 60),
            whole(counts.n_documents[i]),
            whole(int(matrix.n_rows[i])),
            whole(counts.n_missing(i)),
            whole(int(matrix.n_tokens[i])),
            digits(float(matrix.loss[i]), 4),
            digits(medians.get(i), 4),
            digits(float(matrix.grad_norm[i])),
            digits(float(of_mean[i])),
            rank,
        ]
        lines.append(cells)
    return lines


def matrices_of(facts: DomainFacts | None) -> list[Figure]:
    """Return the two matrices; none for fewer than two domains with rows."""
    if facts is None or len(facts.shown) < 2:
        return []
    shown = facts.largest(MAX_CHARTED_DOMAINS)
    names = [facts.matrix.names[i] for i in shown]
    left_out = len(facts.shown) - len(shown)
    rest = f" {left_out} domains with fewer rows are left out." if left_out else ""
    figures = []
    for title, values, about in (
        (
            "Cosine of the mean gradients",
            facts.matrix.cosine,
            "Cosine of two domains' mean rows, without unit",
        ),
        (
            f"Influence between domains ({facts.score})",
            facts.matrix.influence,
            "Mean score over all pairs of a document of one domain and a query document of the "
            "other (on the diagonal, including each document with itself)",
        ),
    ):
        drawing, unit = matrix_chart(title, names, values[np.ix_(shown, shown)])
        scale = f", in units of {unit}" if unit else ""
        caption = (
            f"{about}{scale}. Blue is above 0, orange below; colours end beyond the largest value "
            f"off the diagonal. Similar domains are neighbours.{rest}"
        )
        figures.append(Figure(drawing, caption))
    return figures


def why_no_matrix(facts: DomainFacts | None) -> str:
    """Return why the page has no matrix; empty if it has one."""
    if facts is None:
        return "The corpus names no domains."
    if not facts.shown:
        return "No document of any domain has a row yet."
    if len(facts.shown) == 1:
        only = one_line(facts.matrix.names[facts.shown[0]], 60)
        return f"All rows are of one domain, {only}: there is no other to compare with."
    return ""
