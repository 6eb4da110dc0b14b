"""The report's page: what it shows, as plain data, and the template that writes it.

Everything that a template writes is escaped by Jinja and cleaned of control characters first: keys, domains, texts, and
names in a store's attributes are strangers' words. The page has no script, asks for nothing from outside, and forbids
both to itself.
"""

import functools
from dataclasses import dataclass, field
from typing import Any

import jinja2
from markupsafe import Markup

from gradproj.formatting import clean
from gradproj.report.svg import Drawing


@dataclass(frozen=True)
class Document:
    """A document in a table."""

    value: str
    """Its score or norm, as it is shown."""
    sample_id: int
    key: str
    domain: str | None
    loss: str
    n_tokens: int
    excerpt: str | None
    """None where its text is not to be had."""


@dataclass(frozen=True)
class Table:
    """Documents that are outermost by some number."""

    title: str
    about: str
    column: str
    """What the number is, with its unit."""
    documents: list[Document]


@dataclass(frozen=True)
class QueryAnswer:
    """Both ends of the scores for one query."""

    name: str
    excerpt: str
    n_tokens: int
    loss: str
    unit: str
    """Of the scores: a power of ten, or nothing."""
    pairs: list[tuple[Document, Document]]
    """``(highest, lowest)``, rank by rank."""


@dataclass(frozen=True)
class DomainLine:
    """A domain in the table, as it is shown."""

    name: str
    cells: list[str]


@dataclass(frozen=True)
class Figure:
    """A picture and what is said under it."""

    drawing: Drawing
    caption: str


@dataclass(frozen=True)
class Page:
    """Everything on the page, ready to be written."""

    title: str
    made: str
    version: str
    verdict: str
    is_complete: bool
    facts: list[tuple[str, list[tuple[str, str]]]]
    """Groups of ``(what, value)``."""
    versions: str
    coverage: Figure
    missing: str
    """Ranges of ids."""
    statuses: list[tuple[str, str, str]]
    """``(status, documents, what it means)``."""
    throughput: Figure | None
    throughput_note: str
    histograms: list[Drawing]
    boxes: Figure | None
    domain_columns: list[str]
    domain_lines: list[DomainLine]
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
    """Why there are no excerpts, or only some; empty where there are."""
    notes: list[str] = field(default_factory=list)


def render(page: Page) -> bytes:
    """The page as one UTF-8 file."""
    text = _environment().get_template("report.html").render(page=page)
    return text.encode("utf-8")


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("gradproj.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_cleaned,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _cleaned(value: Any) -> Any:
    """Strangers' words without control characters; what Jinja has made markup of has been through here."""
    return clean(value) if isinstance(value, str) and not isinstance(value, Markup) else value
