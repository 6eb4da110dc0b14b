"""Lines of the table: a label and its text, folded."""

import textwrap

from gradproj.formatting import clean_lines

WIDTH = 118
NAME = 200
"""Longest name of a query, key or domain in the table."""
_LABEL = 9


def labelled(label: str, text: str) -> str:
    """Return a text that begins with its label, folded to the width of the table."""
    return textwrap.fill(
        clean_lines(text),
        WIDTH,
        initial_indent=f"{label:<{_LABEL}}",
        subsequent_indent=" " * _LABEL,
        break_long_words=False,
    )
