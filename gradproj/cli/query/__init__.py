"""``gradproj query``: rank a store's documents by a text, a query file or another store."""

from gradproj.cli.query.answer import Answer
from gradproj.cli.query.command import query, query_command, stop_signals
from gradproj.cli.query.config import QueryConfig

__all__ = ["Answer", "QueryConfig", "query", "query_command", "stop_signals"]
