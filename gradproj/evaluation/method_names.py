"""Names of gradproj's own scores: which score of which rows."""

import re
from dataclasses import dataclass

from gradproj.analysis import SCORES
from gradproj.errors import ConfigError
from gradproj.store.layout import ENCODINGS

FULL = "full"
FORM = "SCORE@K[:DAMPING][/ENCODING[/random][/mean][/rescoredN]]"
_SPECIFIED = re.compile(
    r"(?P<score>\w+)@(?P<k>\d+|full)(:(?P<damping>[\d.e-]+|auto))?(?P<options>(/\w+)*)"
)
_RESCORED = re.compile(r"rescored(\d+)")
_BASES, _REDUCTIONS = ("eigen", "random"), ("sum", "mean")


@dataclass(frozen=True)
class RowKind:
    """A way to store documents' rows."""

    k: str
    """Values kept on each side of a layer, or ``full``."""
    encoding: str = "dense"
    basis: str = "random"
    loss_reduction: str = "mean"

    @property
    def name(self) -> str:
        """Name of files and folders. Rows of the first version have the one they always had."""
        if self == RowKind(self.k):
            return self.k
        return "-".join((self.k, self.encoding, self.basis, self.loss_reduction))


@dataclass(frozen=True)
class GradientMethod:
    """One of gradproj's scores of one kind of rows."""

    score: str
    rows: RowKind
    damping: float | str = "auto"
    reduction: str = "mean"
    """Loss whose scores these are, the sum over a document's targets or their mean."""
    rescored: int = 0
    """Number of a query's best documents that have ``exact_ekfac``'s scores instead."""

    @classmethod
    def of(cls, name: str) -> "GradientMethod | None":
        """Parse ``FORM``; None for names of another form.

        Without an encoding, rows are those of the first version: dense values of random projections
        of the mean loss. With one, they are in the eigenbasis and of the summed loss.
        """
        match = _SPECIFIED.fullmatch(name)
        if match is None:
            return None
        kind, damping = match["score"], match["damping"]
        if kind not in SCORES:
            raise ConfigError(
                f"--methods: {name}: there is no score {kind!r}; choose one of {', '.join(SCORES)}"
            )
        if damping is not None and SCORES[kind].curvature is None:
            raise ConfigError(
                f"--methods: {name}: {kind} has no damping; write "
                f"{name.replace(':' + damping, '', 1)}"
            )
        if match["k"] != FULL and int(match["k"]) < 1:
            raise ConfigError(f"--methods: {name}: K must be at least 1")
        rows, reduction, rescored = _rows(name, match["k"], match["options"].split("/")[1:])
        try:
            value = "auto" if damping in (None, "auto") else float(damping)
        except ValueError as error:
            raise ConfigError(f"--methods: {name}: {damping!r} is not a number") from error
        return cls(kind, rows, value, reduction, rescored)


def _rows(name: str, k: str, options: list[str]) -> tuple[RowKind, str, int]:
    """Return the rows that options name, the loss's reduction, and how many are rescored."""
    if not options:
        return RowKind(k), "mean", 0
    encoding, *others = options
    basis, reduction, rescored = "eigen", "sum", 0
    for option in others:
        number = _RESCORED.fullmatch(option)
        if option in _BASES:
            basis = option
        elif option in _REDUCTIONS:
            reduction = option
        elif number:
            rescored = int(number[1])
        else:
            encoding = ""
    if encoding not in ENCODINGS:
        raise ConfigError(
            f"--methods: {name}: write {FORM}, where ENCODING is one of {', '.join(ENCODINGS)}"
        )
    # A mean is the sum over the number of targets, so both come from one store.
    return RowKind(k, encoding, basis, "sum"), reduction, rescored
