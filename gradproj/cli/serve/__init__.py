"""``gradproj serve``: outputs in a browser, answered by the sessions of ``query``."""

from gradproj.cli.serve.command import serve_command

__all__ = ["serve_command"]
