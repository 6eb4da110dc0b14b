"""``query OUTPUT1 OUTPUT2 ...``: the stores of one corpus at several checkpoints of a model."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from gradproj.errors import ConfigError
from gradproj.flags import flag
from gradproj.job.recorded_args import RecordedRunArgs

SUM, TABLE = "sum", "table"


@dataclass(frozen=True, kw_only=True)
class CheckpointArgs(RecordedRunArgs, title="several checkpoints"):
    """Further stores, and how their scores are combined."""

    others: tuple[str, ...] = flag(
        "Outputs of the same corpus and layers at other checkpoints, whose scores are added.",
        (),
        name="OUTPUT2",
        positional=True,
        path="DIR",
        remote=True,
    )
    combine: str = flag(
        "With several outputs: rank by the sum of their scores; table also shows each listed "
        "document's score at each checkpoint.",
        SUM,
        choices=(SUM, TABLE),
    )
    learning_rates: tuple[float, ...] = flag(
        "With several outputs: factor of each one's scores in the sum, such as the learning rate "
        "there; default: 1 each.",
        (),
    )

    def check_checkpoints(self, *refused: str) -> None:
        """Raise ``ConfigError`` for flags that do not fit, such as any of ``refused`` but ""."""
        if not self.others:
            given = [
                f"--{name}"
                for name, default in (("combine", SUM), ("learning_rates", ()))
                if getattr(self, name) != default
            ]
            if given:
                raise ConfigError(f"{given[0]} requires several outputs: query OUTPUT OUTPUT2 ...")
            return
        if len({os.path.realpath(output) for output in self.outputs}) < len(self.outputs):
            raise ConfigError("an output is given twice; name each checkpoint's once")
        if self.learning_rates and len(self.learning_rates) != len(self.outputs):
            raise ConfigError(
                f"--learning_rates has {len(self.learning_rates)} numbers for {len(self.outputs)} "
                "outputs; give one for each"
            )
        if not all(map(math.isfinite, self.learning_rates)):
            raise ConfigError("--learning_rates has a number that is not finite")
        given = [flag for flag in refused if flag]
        if given:
            raise ConfigError(f"with several outputs, leave {given[0]} out")

    @property
    def outputs(self) -> list[str]:
        """All outputs, in the order given."""
        return [self.output, *self.others]

    @property
    def sum_of_checkpoints(self) -> str:
        """The outputs and the factors of their scores; empty for one output."""
        if not self.others:
            return ""
        titles = titles_of(self.outputs)
        return " + ".join(f"{x:g} {y}" for x, y in zip(self.rates, titles, strict=True))

    @property
    def rates(self) -> list[float]:
        """The factor of each output's scores."""
        return list(self.learning_rates) or [1.0] * (1 + len(self.others))


def titles_of(outputs: Sequence[str]) -> list[str]:
    """Return short names of outputs: the parts of their paths in which they differ."""
    parts = [output.rstrip("/").split("/") for output in outputs]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-n:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(outputs)
