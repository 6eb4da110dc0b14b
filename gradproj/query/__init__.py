"""Queries: texts, completions or token ids, projected to rows of a store's kind."""

from gradproj.query.projector import QueryProjector, QueryRows, check_rows_fit
from gradproj.query.queries import EXCERPT_CHARACTERS, Query, read_queries

__all__ = [
    "EXCERPT_CHARACTERS",
    "Query",
    "QueryProjector",
    "QueryRows",
    "check_rows_fit",
    "read_queries",
]
