"""Formats text for people: untrusted text for a terminal, numbers, tables, ranges and progress.

In pages, templates escape texts; in notebooks, ``html_table`` does. This module replaces characters
that no escaping makes safe to show.
"""

import html
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsFloat, SupportsIndex, TypeVar

from tqdm import tqdm

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_JOINERS = "\u200c\u200d"
"""Join letters of Persian or Hindi, and emoji. They have no shape or direction and are kept."""
_DROPPED = "\u00ad\u200b\ufeff"
"""Soft hyphen, zero-width space, byte order mark: invisible, and dropped."""


def clean(text: str) -> str:
    """Return a text as one line.

    White space becomes single blanks. Control characters, overrides of the writing direction, lone
    surrogates and unassigned characters become U+FFFD.
    """
    return "".join(_printable(character) for character in " ".join(text.split()))


def one_line(text: str, most: int) -> str:
    """Return the beginning of a text as one line of at most ``most`` characters."""
    # A document may have megabytes, and begin with as many blanks.
    line = clean(text.lstrip()[: 8 * most + 64])
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def clean_lines(text: str) -> str:
    """Replace the characters that ``clean`` replaces, and keep lines and blanks."""
    return "\n".join("".join(map(_printable, line)) for line in text.expandtabs().split("\n"))


def clean_piece(text: str) -> str:
    """Clean a part of a line: as ``clean``, with a blank for each white space, also at its ends."""
    return "".join(" " if c.isspace() else _printable(c) for c in text)


class Html(str):
    """Markup, every text in which is cleaned and escaped."""

    __slots__ = ()


def html_text(text: str) -> Html:
    """Return a text as markup: cleaned and escaped."""
    return Html(html.escape(clean(text)))


def html_table(
    headings: Sequence[str], rows: Iterable[Sequence[object]], caption: str = ""
) -> Html:
    """Return a table for a notebook: numbers are formatted, texts cleaned and escaped.

    A cell is a text, a number, None or ``Html``.
    """
    lines = [f"<caption>{html_text(caption)}</caption>"] if caption else []
    named = "".join(f'<th style="text-align:left">{html_text(name)}</th>' for name in headings)
    lines.append(f"<thead><tr>{named}</tr></thead><tbody>")
    lines += [f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in rows]
    return Html(f"<table>{''.join(lines)}</tbody></table>")


def _html_cell(value: object) -> str:
    if isinstance(value, str):
        markup = value if isinstance(value, Html) else html_text(value)
        return f'<td style="text-align:left">{markup}</td>'
    text = ""
    if isinstance(value, SupportsIndex):  # whole numbers, numpy's too
        text = f"{value.__index__():,}"
    elif isinstance(value, SupportsFloat) and math.isfinite(value):
        text = f"{float(value):.4g}"
    return f'<td style="text-align:right">{text}</td>'


def escaped(name: str) -> str:
    """Return a name of a tar with bytes that are not UTF-8 as ``\\xef``."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def listed(names: Iterable[str]) -> str:
    """Join names from a store for a message."""
    return ", ".join(map(clean, names))


def _printable(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return "" if character in _DROPPED else REPLACEMENT


MAX_RANGES_SHOWN = 20


def ranges_text(ranges: Sequence[Sequence[int]], most: int = MAX_RANGES_SHOWN) -> str:
    """Format at most ``most`` ranges ``[start, stop)`` as ``0-15, 32``, both ends included."""
    named = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in ranges[:most]]
    if len(ranges) > most:
        named.append(f"and {len(ranges) - most:,} more ranges")
    return ", ".join(named)


def count(n: int, what: str) -> str:
    """Return ``1 unit``, ``2 units``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def bounded(lines: Sequence[str], most: int, rest: str) -> list[str]:
    """Return at most ``most`` lines, and then ``rest`` with the number of the others."""
    return [*lines[:most], *([rest.format(len(lines) - most)] if len(lines) > most else [])]


def human_seconds(seconds: float) -> str:
    """Format a duration: 42 s, 3 min, 5.2 h, 2.1 d."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if size < 3600 else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def human_bytes(n: float) -> str:
    """Format a number of bytes in powers of 1000: 512 B, 1.5 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


LINE_EVERY_S = 10.0

T = TypeVar("T")


def shown(items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
    """Yield ``items`` and show progress on standard error: a bar, or lines if it is no terminal."""
    if sys.stderr.isatty():
        yield from tqdm(
            items, total=total, desc=label, unit=f" {unit}", file=sys.stderr, dynamic_ncols=True
        )
        return
    started = shown_at = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - shown_at >= LINE_EVERY_S:
            shown_at = now
            left_s = (now - started) * (total - done) / done
            print(
                f"{label}: {done:,} of {total:,} {unit} ({100 * done / total:.1f} %), "
                f"about {left_s:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or what the error is without one."""
    return (str(error).strip() or repr(error)).splitlines()[0]
