"""The report's page as plain data, and its rendering by a Jinja template.

Keys, domains, texts and names in a store's attributes are untrusted. Every value that the template
writes is cleaned of control characters and escaped by Jinja. The page has no script and loads
nothing, and its Content-Security-Policy forbids both.
"""

import functools
from dataclasses import dataclass, field

import jinja2
from markupsafe import Markup

from gradproj.formatting import clean
from gradproj.report.svg import Drawing
from gradproj.report.token_shading import COLOURS, Shaded, Shading


@dataclass(frozen=True)
class DocumentLine:
    """A document in a table."""

    value: str
    """Formatted score or norm."""
    sample_id: int
    key: str
    domain: str | None
    loss: str
    n_tokens: int
    excerpt: str | None
    """None if its text cannot be read."""
    shading: Shading | None = None
    """Shown in place of the excerpt, if there is one."""


@dataclass(frozen=True)
class Table:
    """Documents ranked by a number."""

    title: str
    about: str
    column: str
    """Heading of the number, with its unit."""
    documents: list[DocumentLine]


@dataclass(frozen=True)
class QueryAnswer:
    """The highest and the lowest scores for one query."""

    name: str
    excerpt: str
    n_tokens: int
    loss: str
    unit: str
    """Power of ten that the scores are in units of; empty for 1."""
    pairs: list[tuple[DocumentLine, DocumentLine]]
    """``(highest, lowest)`` of each rank."""
    shaded: list[Shaded] = field(default_factory=list)
    """The excerpt by token, shown in its place; empty if no score was split."""


@dataclass(frozen=True)
class Figure:
    """A drawing and its caption."""

    drawing: Drawing
    caption: str


@dataclass(frozen=True)
class Page:
    """Content of the page, formatted."""

    title: str
    made: str
    version: str
    verdict: str
    is_complete: bool
    facts: list[tuple[str, list[tuple[str, str]]]]
    """``(heading, [(label, value), ...])``."""
    versions: str
    coverage: Figure
    missing: str
    """Ranges of sample ids."""
    statuses: list[tuple[str, str, str]]
    """``(status, documents, meaning)``."""
    throughput: Figure | None
    throughput_note: str
    histograms: list[Drawing]
    boxes: Figure | None
    domain_columns: list[str]
    domain_lines: list[list[str]]
    score: str
    meaning: str
    sign: str
    matrix_score: str
    matrix_meaning: str
    matrices: list[Figure]
    no_matrix: str
    outliers: list[Table]
    queries: list[QueryAnswer]
    query_note: str
    texts_note: str
    """Why excerpts are missing; empty if none is."""
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> bytes:
    """Return the page as UTF-8 HTML."""
    return (
        _environment()
        .get_template("report.html")
        .render(page=page, colours=COLOURS)
        .encode("utf-8")
    )


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("gradproj.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        # Markup was cleaned when Jinja made it.
        finalize=lambda v: clean(v) if isinstance(v, str) and not isinstance(v, Markup) else v,
        trim_blocks=True,
        lstrip_blocks=True,
    )
