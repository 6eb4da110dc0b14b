"""Text that strangers wrote, made harmless for a screen: documents, keys, names of domains and layers.

Escaping it for HTML is the template's business; this is about characters that no escaping makes safe to show.
"""

from collections.abc import Iterable

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
