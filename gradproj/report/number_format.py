"""Formats numbers for tables and figures."""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime

import numpy as np

NONE = "–"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def whole(value: int | None) -> str:
    """Format ``12,345``; a dash for None."""
    return NONE if value is None else f"{value:,}"


def digits(value: float | None, n: int = 3) -> str:
    """Format n significant digits, without an exponent from 0.001 to a million."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        places = max(0, n - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{places}f}"
    return f"{value:.{n - 1}e}"


def exponent_of(values: Iterable[float]) -> int:
    """Return the power of ten, a multiple of 3, that scales the largest value to 1 to 1,000.

    It is 0 for values whose largest is between 0.01 and 1,000.
    """
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if largest == 0 or 0.01 <= largest < 1000:
        return 0
    return 3 * math.floor(math.log10(largest) / 3)


def scaled(value: float, exponent: int, places: int = 3, sign: bool = True) -> str:
    """Format ``value / 10^exponent``; a dash if not finite."""
    if not math.isfinite(value):
        return NONE
    return f"{value / 10.0**exponent:{'+' if sign else ''},.{places}f}"


def places_for(values: Iterable[float], exponent: int) -> int:
    """Return the decimals that show the largest of ``values / 10^exponent`` in four digits."""
    largest = max((abs(v) for v in values if math.isfinite(v)), default=0.0) / 10.0**exponent
    return 3 if largest < 10 else 2 if largest < 100 else 1


def minus(text: str) -> str:
    """Replace the hyphen by the minus sign, which is as wide as a plus."""
    return text.replace("-", "−")


def in_cell(value: float) -> str:
    """Format a number from -999 to 999 with its sign, in at most four characters."""
    if not math.isfinite(value):
        return ""
    size = abs(value)
    if size < 0.005:
        return "0"
    places = 2 if size < 0.995 else 1 if size < 9.95 else 0
    return f"{value:+.{places}f}".replace("+0.", "+.").replace("-0.", "-.")


def power(exponent: int) -> str:
    """Format ``10⁻⁶``; empty for 10^0."""
    return "" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def when(seconds: float) -> str:
    """Format seconds since 1970 as UTC to the minute."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def json_numbers(values: np.ndarray | Sequence[float]) -> list:
    """Convert numbers (any shape) to lists for strict JSON; not finite becomes null."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [json_numbers(row) for row in array]
    return [v if math.isfinite(v) else None for v in array.tolist()]
