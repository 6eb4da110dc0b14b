"""Answers to queries: which documents stand at the ends of the scores, kept in files, compared and shown."""

from gradproj.answers.ends import Ends, find_ends, save_and_find_ends
from gradproj.answers.kept import curvature_for
from gradproj.answers.saved import check_scores_path
from gradproj.answers.shown import About, describe, json_lines, overlap_lines, table_lines
from gradproj.answers.stored import rows_of_query_store

__all__ = [
    "About",
    "Ends",
    "check_scores_path",
    "curvature_for",
    "describe",
    "find_ends",
    "json_lines",
    "overlap_lines",
    "rows_of_query_store",
    "save_and_find_ends",
    "table_lines",
]
