"""``gradproj query``: rank a store's documents by a text, a query file or another store."""

from gradproj.cli.query.answer import Answer
from gradproj.cli.query.command import answer, query, query_command, stop_signals
from gradproj.cli.query.config import QueryConfig
from gradproj.cli.query.session import AnswerWatch, Session

__all__ = [
    "Answer",
    "AnswerWatch",
    "QueryConfig",
    "Session",
    "answer",
    "query",
    "query_command",
    "stop_signals",
]
