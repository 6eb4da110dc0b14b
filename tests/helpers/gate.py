"""A gate at which running jobs wait for the test, so that no speed of a machine decides.

A rank that is started in ``Gate.environment`` stops after some batches until the test lets it go
on. A training run (``Ranks.start(..., gate=FOLDER)``) stops after a step.
"""

import itertools
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import gradproj

LOOK_S = 0.01
LIMIT = "limit"
"""File with the number of batches that each rank may do in all. Without it the gate is open."""
DEAF = "deaf"
"""File beside it: a stop request does not open the gate, as if the batch in flight took longer."""
START = "from helpers.gate import hold_job\nhold_job(__file__)\n"
"""Code that a rank's Python runs first."""


class Gate:
    """A gate for the ranks of a job. Each one waits after ``batches`` batches of its own."""

    def __init__(self, folder: Path, batches: int, deaf: bool = False) -> None:
        self.folder = folder
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(START)
        if deaf:
            (folder / DEAF).touch()
        self.admit(batches)
        path = [folder, Path(__file__).parents[1], Path(gradproj.__file__).parents[1]]
        self.python_path = os.pathsep.join(map(str, path))

    @property
    def environment(self) -> dict[str, str]:
        # Not at the top: every Python of a job imports this module first.
        from helpers.jobs import ENVIRONMENT

        return {**ENVIRONMENT, "PYTHONPATH": self.python_path}

    def admit(self, batches: int) -> None:
        """Let each rank go on until it has done so many batches in all."""
        self._batches = batches
        (self.folder / "next").write_text(str(batches))
        os.replace(self.folder / "next", self.folder / LIMIT)

    def open(self) -> None:
        """Let all ranks go on, for good."""
        (self.folder / LIMIT).unlink()

    def wait_for(
        self, ranks: int, lives: Callable[[], bool] = lambda: True, said: Callable[[], str] = str
    ) -> None:
        """Return when so many ranks wait. ``said`` tells what a job that ended has printed."""
        from helpers.jobs import PATIENCE_S

        until = time.monotonic() + PATIENCE_S
        while len(list(self.folder.glob(f"*.{self._batches}"))) < ranks:
            assert lives(), said()
            assert time.monotonic() < until, said()
            time.sleep(LOOK_S)


# --- in the rank's process ---


def hold_job(place: str) -> None:
    """Wait at the gate whose folder this file is in, whenever a batch is done."""
    from gradproj.coordinator import fault_points

    folder, done = Path(place).parent, itertools.count(1)
    fault_points.reach = lambda step: step == "batch done" and _wait(folder, next(done))


def hold_training(folder: Path) -> None:
    """Wait at the gate whenever a training step is done; the limit counts all steps of the run."""
    from gradproj.training.loss_curve import LossCurve

    add = LossCurve.add

    def add_and_wait(curve, *point):
        add(curve, *point)
        _wait(folder, len(curve.points))

    LossCurve.add = add_and_wait


def _wait(folder: Path, done: int) -> None:
    while (limit := _limit(folder)) is not None and done >= limit:
        if _stop_requested() and not (folder / DEAF).exists():
            return
        (folder / f"{os.getpid()}.{limit}").touch()
        time.sleep(LOOK_S)


def _limit(folder: Path) -> int | None:
    with suppress(FileNotFoundError):
        return int((folder / LIMIT).read_text())
    return None


def _stop_requested() -> bool:
    """Return whether the process's ``StopRequest``, which handles its signals, was made."""
    request = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return request is not None and request()
