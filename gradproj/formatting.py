"""Text that strangers wrote, made harmless for a screen: documents, keys, names of domains and layers.

Escaping it for HTML is the template's business; this is about characters that no escaping makes safe to show.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_JOINERS = "\u200c\u200d"
"""Of letters in Persian or Hindi, and of emoji: without a shape or a direction of their own."""
_DROPPED = "\u00ad\u200b\ufeff"
"""Soft hyphen, zero-width space, byte order mark: nothing is lost with them."""


def clean(text: str) -> str:
    """A text as one line, whole.

    White space is joined. Control characters, overrides of the writing direction, lone surrogates and characters that
    Unicode has not assigned become U+FFFD.
    """
    return "".join(_seen(character) for character in " ".join(text.split()))


def one_line(text: str, most: int) -> str:
    """The same of a text's beginning: at most ``most`` characters."""
    # A document may be megabytes long, and may begin with as many blanks.
    line = clean(text.lstrip()[: 8 * most + 64])
    return line if len(line) <= most else line[: most - 1].rstrip() + "…"


def clean_lines(text: str) -> str:
    """A text of several lines as it is, but for what ``clean`` replaces; blanks and the ends of its lines stay."""
    return "\n".join("".join(map(_seen, line)) for line in text.expandtabs().split("\n"))


def listed(names: Iterable[str]) -> str:
    """Names of a store in a message, each on the line that it is in."""
    return ", ".join(map(clean, names))


def _seen(character: str) -> str:
    if character.isprintable() or character in _JOINERS:
        return character
    return "" if character in _DROPPED else REPLACEMENT


MOST_RANGES_SHOWN = 20


def ranges_text(ranges: Sequence[Sequence[int]], most: int = MOST_RANGES_SHOWN) -> str:
    """``[start, stop)`` ranges as ``0-15, 32``, both ends included; at most so many of them."""
    named = [str(a) if b - a == 1 else f"{a}-{b - 1}" for a, b in ranges[:most]]
    if len(ranges) > most:
        named.append(f"and {len(ranges) - most:,} more ranges")
    return ", ".join(named)


def count(n: int, what: str) -> str:
    """``1 unit``, ``2 units``."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def human_seconds(seconds: float) -> str:
    """A duration for people: 42 s, 3 min, 5.2 h, 2.1 d."""
    for limit, unit, size in ((90, "s", 1), (5400, "min", 60), (172800, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.0f} {unit}" if size < 3600 else f"{seconds / size:.1f} {unit}"
    return f"{seconds / 86400:.1f} d"


def human_bytes(n: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if n < 1000 or unit == "TB":
            return f"{n:.0f} B" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    raise AssertionError("unreachable")


LINE_EVERY_S = 10.0


T = TypeVar("T")


def shown(items: Iterable[T], total: int, label: str, unit: str) -> Iterator[T]:
    """``items``, with their progress on standard error: a bar on a terminal, else a line every 10 s."""
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
                f"{label}: {done:,} of {total:,} {unit} ({100 * done / total:.1f} %), about {left_s:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )
