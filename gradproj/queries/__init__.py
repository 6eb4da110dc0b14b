"""Queries: what is asked about, from a file or a command line to rows as the store's job would have made them."""

from gradproj.queries.reading import EXCERPT_CHARACTERS, Query, read_queries
from gradproj.queries.rows import QueryProjector, QueryRows, check_rows_fit

__all__ = ["EXCERPT_CHARACTERS", "Query", "QueryProjector", "QueryRows", "check_rows_fit", "read_queries"]
