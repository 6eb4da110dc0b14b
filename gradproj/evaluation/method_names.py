"""Names of gradproj's own scores: which score of which rows."""

import re
from dataclasses import dataclass

from gradproj.analysis import SCORES
from gradproj.errors import ConfigError
from gradproj.store.layout import ENCODINGS

FULL = "full"
FORM = "SCORE@K[:DAMPING][/ENCODING[/random][/mean][/head|headequal|headonly][/rescoredN]]"
_SPECIFIED = re.compile(
    r"(?P<score>\w+)@(?P<k>\d+|full)(:(?P<damping>[\d.e-]+|auto))?(?P<options>(/\w+)*)"
)
_RESCORED = re.compile(r"rescored(\d+)")
_BASES, _REDUCTIONS = ("eigen", "random"), ("sum", "mean")
_HEADS = {"head": "plain", "headequal": "equal", "headonly": "only"}


@dataclass(frozen=True)
class RowKind:
    """A way to store documents' rows."""

    k: str
    """Values kept on each side of a layer, or ``full``."""
    encoding: str = "dense"
    basis: str = "random"
    loss_reduction: str = "mean"
    head: bool = False
    """Whether sparse rows of the vocabulary head follow those of the layers."""

    @property
    def name(self) -> str:
        """Name of files and folders. Rows of the first version have the one they always had."""
        if self == RowKind(self.k):
            return self.k
        parts = (self.k, self.encoding, self.basis, self.loss_reduction)
        return "-".join(parts + ("head",) * self.head)


@dataclass(frozen=True)
class GradientMethod:
    """One of gradproj's scores of one kind of rows."""

    score: str
    rows: RowKind
    damping: float | str = "auto"
    reduction: str = "mean"
    """Loss whose scores these are, the sum over a document's targets or their mean."""
    head: str = ""
    """Use of the head rows' scores: added ``plain``, or with ``equal`` deviation; or they alone,
    ``only``. Empty without."""
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
        options = _Options.of(name, match["options"].split("/")[1:])
        if options.head and (kind != "kfac" or options.encoding == "dense"):
            raise ConfigError(f"--methods: {name}: head rows are for kfac of packed rows")
        try:
            value = "auto" if damping in (None, "auto") else float(damping)
        except ValueError as error:
            raise ConfigError(f"--methods: {name}: {damping!r} is not a number") from error
        rows = options.rows(match["k"])
        return cls(kind, rows, value, options.reduction, options.head, options.rescored)


@dataclass
class _Options:
    """Options that follow K; by default the rows of the first version."""

    encoding: str = "dense"
    basis: str = "random"
    reduction: str = "mean"
    loss_reduction: str = "mean"
    head: str = ""
    rescored: int = 0

    @classmethod
    def of(cls, name: str, options: list[str]) -> "_Options":
        """Parse ``ENCODING`` and the options after it, none for rows of the first version."""
        if not options:
            return cls()
        # A mean is the sum over the number of targets, so both come from one store.
        found = cls(options[0], "eigen", "sum", "sum")
        valid = found.encoding in ENCODINGS
        for option in options[1:]:
            number = _RESCORED.fullmatch(option)
            if option in _BASES:
                found.basis = option
            elif option in _REDUCTIONS:
                found.reduction = option
            elif option in _HEADS:
                found.head = _HEADS[option]
            elif number:
                found.rescored = int(number[1])
            else:
                valid = False
        if not valid:
            raise ConfigError(
                f"--methods: {name}: write {FORM}, where ENCODING is one of {', '.join(ENCODINGS)}"
            )
        return found

    def rows(self, k: str) -> RowKind:
        return RowKind(k, self.encoding, self.basis, self.loss_reduction, bool(self.head))
