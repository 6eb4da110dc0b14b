"""Queries: what is asked about, from a file or a command line to rows as the store's job would have made them."""

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
