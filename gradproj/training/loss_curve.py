"""The loss curve of a run: ``loss.csv``, ``loss.png`` and progress lines."""

import csv
import math
import sys
import time
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from gradproj.files import explain_os_errors
from gradproj.formatting import human_seconds

PROGRESS_EVERY_S = 5.0
SHOWN_STEPS = 20


@dataclass(frozen=True)
class TrainResult:
    """Result of a run."""

    loss: float
    """Mean nats per target token over the last 20 steps."""
    n_tokens: int
    seconds: float
    n_steps: int
    """Fewer than ``max_steps`` if a stop was requested."""


@dataclass(frozen=True)
class Point:
    """One step."""

    step: int
    tokens: int
    """Tokens of all ranks up to and including this step."""
    loss: float
    """Mean nats per target token of the step's batches."""
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    val_loss: float | None
    seconds: float
    """Since the run's start, without the time between a stop and its resumption."""

    def as_text(self) -> list[str]:
        cells = ("" if value is None else value for value in astuple(self))
        return [f"{cell:.8g}" if isinstance(cell, float) else str(cell) for cell in cells]


COLUMNS = [f.name for f in fields(Point)]


class LossCurve:
    """The loss of each step, written to ``folder`` and printed if ``visible`` (on rank 0).

    It begins with a checkpoint's ``points``, or with none.
    """

    def __init__(
        self, folder: Path, max_steps: int, points: list[dict[str, Any]], visible: bool
    ) -> None:
        self._path, self._max_steps, self._visible = folder / "loss.csv", max_steps, visible
        self.points = [Point(**point) for point in points]
        self._first = self._last
        self._started_s = self._shown_s = time.monotonic()
        if visible:
            self._write("w", [COLUMNS, *(point.as_text() for point in self.points)])

    @property
    def _last(self) -> Point:
        """The newest point; before the first step one of step 0."""
        return self.points[-1] if self.points else Point(0, 0, math.nan, 0.0, 0.0, None, 0.0)

    def _write(self, mode: str, rows: list[list[str]]) -> None:
        with explain_os_errors(self._path), self._path.open(mode, newline="") as file:
            csv.writer(file).writerows(rows)

    def add(
        self, loss: float, rate: float, norm: float, n_tokens: int, val_loss: float | None = None
    ) -> None:
        """Append a step to ``loss.csv``, and print it now and then."""
        now_s = time.monotonic()
        total = n_tokens + self._last.tokens
        seconds = round(self._first.seconds + now_s - self._started_s, 2)
        point = Point(len(self.points) + 1, total, loss, rate, norm, val_loss, seconds)
        self.points.append(point)
        if not self._visible:
            return
        self._write("a", [point.as_text()])
        due = now_s - self._shown_s > PROGRESS_EVERY_S
        if due or point.step in (1, self._max_steps) or val_loss is not None:
            self._shown_s = now_s
            self._show(point, now_s - self._started_s)

    def _show(self, point: Point, seconds: float) -> None:
        left = seconds / (point.step - self._first.step) * (self._max_steps - point.step)
        rate = (point.tokens - self._first.tokens) / max(seconds, 1e-9)
        evaluated = "" if point.val_loss is None else f", validation {point.val_loss:.3f}"
        line = (
            f"step {point.step:,} of {self._max_steps:,}: loss {self.result().loss:.3f} nats per "
            f"token{evaluated}, {rate:,.0f} tokens/s, about {human_seconds(left)} left"
        )
        print(line, file=sys.stderr, flush=True)

    def result(self) -> TrainResult:
        recent = [point.loss for point in self.points[-SHOWN_STEPS:]]
        mean = sum(recent) / max(1, len(recent))
        return TrainResult(mean, self._last.tokens, self._last.seconds, len(self.points))


def draw_curve(points: list[Point], path: Path) -> None:
    """Draw training loss, its running mean and validation loss over steps."""
    # Imported here, since it is slow to import.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, losses = [p.step for p in points], [p.loss for p in points]
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
    half = len(points) // 40
    parts = [losses[max(0, i - half) : i + half + 1] for i in range(len(losses))]
    means = [sum(part) / len(part) for part in parts]
    if half:
        label = f"training, mean of {2 * half + 1} steps"
        axes.plot(steps, means, color="#08519c", linewidth=1.8, label=label)
    validated = [(p.step, p.val_loss) for p in points if p.val_loss is not None]
    if validated:
        pairs = zip(*validated, strict=True)
        axes.plot(*pairs, "o-", color="#d94801", markersize=4, label="validation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per target token)")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with explain_os_errors(path):
        figure.savefig(path)
