"""Tables of documents with their excerpts, and the tables of outliers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gradproj.analysis import Overview
from gradproj.errors import GradprojError
from gradproj.formatting import escaped, one_line
from gradproj.report.distributions import Distributions
from gradproj.report.number_format import digits, exponent_of, minus, places_for, power, scaled
from gradproj.report.page import DocumentLine, Table
from gradproj.report.token_shading import Shading
from gradproj.store import ProjectionStore

EXCERPT_CHARACTERS = 320
BESIDE_CHARACTERS = 200
"""Length of an excerpt in a table with two documents a row."""


@dataclass
class TextExcerpts:
    """Beginnings of documents, where their text can be read."""

    read: Callable[[int], str] | None
    """Returns the text of a sample id; None if no text can be read."""
    problem: str = ""
    """The first reason why a text is not shown."""

    def of(self, sample_id: int, most: int = EXCERPT_CHARACTERS) -> str | None:
        """Return one line of at most ``most`` characters; None if the text cannot be read."""
        if self.read is None:
            return None
        try:
            return one_line(self.read(sample_id), most) or "(no visible text)"
        except (GradprojError, OSError) as error:
            self.problem = self.problem or f"Some texts are not shown: {error}"
            return None


def documents_of(
    store: ProjectionStore,
    ids: np.ndarray,
    values: Sequence[str],
    excerpts: TextExcerpts,
    most: int = EXCERPT_CHARACTERS,
    shading: Callable[[int], Shading | None] | None = None,
) -> list[DocumentLine]:
    """Return documents ready for a table, with their shading if it is known."""
    lines = []
    for sample, value in zip(store.samples(ids), values, strict=True):
        shaded = None if shading is None else shading(sample.sample_id)
        lines.append(
            DocumentLine(
                value=value,
                sample_id=sample.sample_id,
                key=one_line(escaped(sample.key), 80),
                domain=None if sample.domain is None else one_line(sample.domain, 60),
                loss=digits(sample.loss, 4),
                n_tokens=sample.n_tokens,
                excerpt=excerpts.of(sample.sample_id, most) if shaded is None else None,
                shading=shaded,
            )
        )
    return lines


def scaled_values(*arrays: np.ndarray, sign: bool = False) -> tuple[list[list[str]], str]:
    """Format columns of numbers in units of one power of ten; return them and that power."""
    numbers = [value for values in arrays for value in values.ravel().tolist()]
    exponent = exponent_of(numbers)
    places = places_for(numbers, exponent)
    columns = [[minus(scaled(v, exponent, places, sign)) for v in a.tolist()] for a in arrays]
    return columns, power(exponent)


def outlier_tables(
    store: ProjectionStore,
    seen: Overview,
    spread: Distributions,
    score: str,
    excerpts: TextExcerpts,
) -> list[Table]:
    """Return the documents with the largest norms, and those with the largest self-influence."""
    (norms,), unit = scaled_values(spread.largest_norms)
    tables = [
        Table(
            "Largest gradients",
            "Documents with the largest norms of their rows. They weigh most in every score that "
            "is not normalised; often they are short, broken or in another language.",
            f"norm, {unit}" if unit else "norm",
            documents_of(store, spread.largest_ids, norms, excerpts),
        )
    ]
    if score in ("dot", "cosine"):
        return tables  # a document's score with itself is the norm's square, or 1
    (values,), unit = scaled_values(seen.self_influence)
    if len(seen.ids):
        about = (
            f"Documents with the largest {score} score with themselves: how much training on one "
            "would lower its own loss. It is high for documents unlike the rest of the corpus, "
            "such as noise, tables, or rare formats."
        )
        column = f"self-influence, {unit}" if unit else "self-influence"
        documents = documents_of(store, seen.ids, values, excerpts)
        tables.append(Table("Largest self-influence", about, column, documents))
    return tables
