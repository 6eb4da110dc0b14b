"""Ending early and in order: signals ask the loop to stop, a second one ends the process at once."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from gradproj.errors import GradprojError, ReportedError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECOND_AFTER_S = 3.0
"""torchrun passes a signal on twice; only one that comes later than this is meant as a second."""
WATCH_INTERVAL_S = 0.5
ORPHAN_GRACE_S = 3.0
"""What a batch in flight still has once the launcher has died."""

PARENT_AT_IMPORT = os.getppid()


class Stopped(GradprojError):
    """A signal came before there was anything to save."""

    def __init__(self, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name} before the first unit; run the same command to go on"
        )
        self.exit_code = 128 + number


def _quietly(number: int) -> ReportedError:
    error = ReportedError()
    error.exit_code = 128 + number
    return error


class StopRequest:
    """False until somebody wants the job to stop. Call it to ask.

    Until ``begin`` is called a signal ends the process at once: it is still importing. Until ``drain`` is called a
    signal raises ``Stopped`` in the main thread: there is nothing to save yet. From then on it only asks, and the
    loop saves what it has.
    """

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self._attending = self._begun = self._draining = False
        self._speaks = False
        self.reason = ""
        self.exit_code = 0
        """128 + the signal's number, as a shell has it."""

    def __call__(self) -> bool:
        return self._asked_at is not None

    def attend(
        self, rank: int | None, launcher_died: Callable[[], bool] = lambda: False
    ) -> "StopRequest":
        """Take the signals of ``SIGNALS`` from now on, and leave with the launcher (main thread only; once is enough).

        Args:
            rank: as the launcher set it, None without a launcher. Rank 0 says on standard error that it stops.
            launcher_died: asked once: it may have died before this process could note who it was.
        """
        if not self._attending:
            self._attending, self._speaks = True, not rank
            for number in SIGNALS:
                signal.signal(number, self._on_signal)
            if rank is not None:
                self.watch_launcher(died_before=launcher_died)
        return self

    def begin(self) -> None:
        """From now on a signal unwinds what was begun."""
        self._begun = True

    def drain(self) -> None:
        """From now on there is something to save."""
        self._draining = True

    def ask(self, reason: str) -> None:
        """Ask the loop to stop after the batch in flight."""
        if self._asked_at is None:
            self._asked_at, self.reason = time.monotonic(), reason

    @contextmanager
    def asked_on_error(self) -> Iterator[None]:
        """An error in the loop asks the threads beside it to stop too."""
        try:
            yield
        except BaseException as error:
            self.ask(type(error).__name__)
            raise

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is not None:
            if time.monotonic() - self._asked_at > SECOND_AFTER_S:
                os._exit(128 + number)
            return
        self.ask(signal.Signals(number).name)
        self.exit_code = 128 + number
        if not self._begun:
            # An exception would come out of the middle of an import.
            if self._speaks:
                os.write(2, f"gradproj: {Stopped(number)}\n".encode())
            os._exit(self.exit_code)
        if not self._draining:
            raise Stopped(number) if self._speaks else _quietly(number)
        if self._speaks:
            # Not by print: the signal may have come in the middle of one.
            os.write(2, f"\ngradproj: {self.reason}: stopping after the batch in flight\n".encode())

    def watch_launcher(
        self,
        parent: int = PARENT_AT_IMPORT,
        parent_now: Callable[[], int] = os.getppid,
        died_before: Callable[[], bool] = lambda: False,
    ) -> None:
        """Leave within 5 s when the process that started this one has died, even if a batch takes longer.

        A worker whose launcher was killed by -9 hears of it in no other way.
        """

        def watch() -> None:
            lives = not died_before()
            while lives and parent_now() == parent:
                time.sleep(WATCH_INTERVAL_S)
            if self._draining:
                self.ask("the launcher has died")
                time.sleep(ORPHAN_GRACE_S)
            os._exit(1)

        threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def leave(code: int) -> NoReturn:
    """End this process now.

    Python's own way out takes a second or more with torch in it, and minds nothing on it: no second signal (the
    process dies of it, and torchrun takes a rank that has saved all for one that was killed), and no launcher's death.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
