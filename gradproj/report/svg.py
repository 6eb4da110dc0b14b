"""Pictures as lists of shapes, which the page's template writes as SVG and escapes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Shape:
    """One SVG element: its name, its attributes, and its text or what a pointer over it shows."""

    tag: str
    attributes: dict[str, Any]
    text: str = ""
    hover: str = ""


@dataclass
class Drawing:
    """A picture with its own coordinates, x to the right and y down; ``title`` and ``description`` are read aloud."""

    width: float
    height: float
    title: str
    description: str
    shapes: list[Shape] = field(default_factory=list)

    def rect(
        self, x: float, y: float, width: float, height: float, hover: str = "", **look: Any
    ) -> None:
        """A rectangle; nothing of no size."""
        if width > 0 and height > 0:
            place = {
                "x": _short(x),
                "y": _short(y),
                "width": _short(width),
                "height": _short(height),
            }
            self.shapes.append(Shape("rect", place | _dashed(look), hover=hover))

    def line(self, x1: float, y1: float, x2: float, y2: float, **look: Any) -> None:
        """A straight line."""
        place = {"x1": _short(x1), "y1": _short(y1), "x2": _short(x2), "y2": _short(y2)}
        self.shapes.append(Shape("line", place | _dashed(look)))

    def text(self, x: float, y: float, text: str, hover: str = "", **look: Any) -> None:
        """A line of text whose baseline begins (or ends, or has its middle) at the point."""
        self.shapes.append(
            Shape("text", {"x": _short(x), "y": _short(y)} | _dashed(look), text, hover)
        )

    def path(self, points: Sequence[tuple[float, float]], **look: Any) -> None:
        """A line through points."""
        d = "M" + "L".join(f"{_short(x)},{_short(y)}" for x, y in points)
        self.shapes.append(Shape("path", {"d": d} | _dashed(look)))


def _short(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _dashed(look: dict[str, Any]) -> dict[str, Any]:
    return {name.rstrip("_").replace("_", "-"): value for name, value in look.items()}


@dataclass(frozen=True)
class Scale:
    """Where a number lies between two ends of a picture; logarithmic, or in proportion."""

    low: float
    high: float
    first: float
    last: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The coordinate; what is beyond the ends lies at them."""
        low, high, at = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return self.first + (self.last - self.first) * (at - low) / (high - low)

    def ticks(self) -> list[float]:
        """A few round numbers between the ends."""
        if not self.log:
            return round_numbers(self.low, self.high)
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        step = max(1, len(decades) // 6)
        chosen = [
            m * 10.0**d
            for d in decades
            for m in ((1, 2, 5) if len(decades) <= 3 else (1,))
            if d % step == 0
        ]
        return [t for t in chosen if self.low <= t * (1 + 1e-9) and t <= self.high * (1 + 1e-9)]


def round_numbers(low: float, high: float, about: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, about so many of them."""
    if not high > low:
        return [low]
    raw = (high - low) / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def scale_for(least: float, most: float, first: float, last: float, log: bool) -> Scale:
    """A scale that holds numbers from ``least`` to ``most``, with some room where they are all the same.

    A logarithmic one ends eight decades below ``most``: a single zero would squeeze everything else.
    """
    if log:
        least = max(least, most * 1e-8)
        least, most = (
            (least, most) if most > least > 0 else (max(least, 1e-30) / 2, max(most, 1e-30) * 2)
        )
    elif not most > least:
        least, most = least - 0.5, most + 0.5
    return Scale(float(least), float(most), first, last, log)


def colour(share: float) -> str:
    """From white at 0 to blue at 1 and to orange at -1; the blue is darker, so that the sign shows in grey too."""
    share = float(np.clip(share, -1, 1))
    end = (33, 92, 158) if share > 0 else (224, 130, 40)
    parts = (round(255 + (channel - 255) * abs(share)) for channel in end)
    return "#" + "".join(f"{part:02x}" for part in parts)


def is_dark(code: str) -> bool:
    """Whether white is easier to read on a colour (``#rrggbb``) than black, by WCAG's contrast."""
    channels = (int(code[i : i + 2], 16) / 255 for i in (1, 3, 5))
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05


def colour_limit(matrix: np.ndarray) -> float:
    """The value at which a matrix' colours end: a little beyond the largest off the diagonal, which is another matter.

    Not far below the diagonal either: small numbers would look like large ones.
    """
    largest = float(np.abs(matrix).max(initial=0.0))
    off = float(np.abs(matrix[~np.eye(len(matrix), dtype=bool)]).max(initial=0.0))
    return max(1.2 * off, 0.2 * largest) or 1.0
