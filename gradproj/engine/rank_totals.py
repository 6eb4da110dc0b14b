"""``--proj_rank_total``: how many values each layer keeps, one number or by patterns of names."""

from collections.abc import Iterable
from dataclasses import dataclass

from gradproj.engine.patterns import EXCLUDES, matches
from gradproj.errors import ConfigError, ModelError
from gradproj.flags import split_list

EXAMPLE = "--proj_rank_total 4096, or by layer down_proj:16384,o_proj:4096,-q_proj"


@dataclass(frozen=True)
class RankTotals:
    """The most values that are kept of each layer, ``k_i * k_o``."""

    default: int
    by_pattern: tuple[tuple[str, int], ...] = ()
    """The first pattern that matches a layer's name decides."""
    excluded: tuple[str, ...] = ()
    """Patterns of layers to leave out, with their dash."""

    @classmethod
    def parse(cls, value: str | int, default: int) -> "RankTotals":
        """Read ``4096`` or ``down_proj:16384,4096,-q_proj``, where a number stands for the rest.

        ``default`` is the number if there is none. ``ConfigError`` for anything else.
        """
        numbers: list[int] = []
        by_pattern: list[tuple[str, int]] = []
        excluded: list[str] = []
        for item in split_list(str(value)):
            pattern, colon, number = item.rpartition(":")
            if item.startswith(EXCLUDES) and not colon and not item[1:].isdigit():
                excluded.append(item)
            elif not colon:
                numbers.append(_number(number))
            elif pattern:
                by_pattern.append((pattern, _number(number)))
            else:
                raise ConfigError(f"--proj_rank_total: {item!r} names no layer; give {EXAMPLE}")
        if len(numbers) > 1 or not (numbers or by_pattern or excluded):
            raise ConfigError(f"--proj_rank_total {value} is not one number; give {EXAMPLE}")
        return cls(numbers[0] if numbers else default, tuple(by_pattern), tuple(excluded))

    def __str__(self) -> str:
        """Return the flag's value that names the default as well."""
        by_pattern = [f"{pattern}:{number}" for pattern, number in self.by_pattern]
        return ",".join([*by_pattern, str(self.default), *self.excluded])

    def of(self, name: str) -> int:
        """Return the most values of the layer of this name."""
        return next((n for pattern, n in self.by_pattern if matches(pattern, name)), self.default)

    def check_used(self, names: Iterable[str]) -> None:
        """Raise ``ModelError`` if a pattern matches none of the projected layers' names."""
        names = list(names)
        for pattern, _ in self.by_pattern:
            if not any(matches(pattern, name) for name in names):
                raise ModelError(
                    f"--proj_rank_total: no projected layer matches {pattern!r}; they are "
                    f"{', '.join(names[:8])}{' and more' if names[8:] else ''}"
                )


def _number(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise ConfigError(f"--proj_rank_total: {text!r} is no number; give {EXAMPLE}") from None
    if number < 1:
        raise ConfigError(f"--proj_rank_total must be at least 1, got {number}")
    return number
