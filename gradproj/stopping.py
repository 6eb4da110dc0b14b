"""Ending early and in order: signals ask the loop to stop, a second one ends the process at once."""

import os
import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECOND_AFTER_S = 3.0
"""torchrun passes a signal on twice; only one that comes later than this is meant as a second."""
ORPHAN_GRACE_S = 3.0


class StopRequest:
    """False until somebody wants the job to stop. Call it to ask."""

    def __init__(self) -> None:
        self._asked_at: float | None = None
        self.reason = ""

    def __call__(self) -> bool:
        return self._asked_at is not None

    def listen(self) -> "StopRequest":
        """Take the signals of ``SIGNALS`` from now on (main thread only)."""
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def ask(self, reason: str) -> None:
        """Ask the loop to stop after the batch in flight."""
        if self._asked_at is None:
            self._asked_at, self.reason = time.monotonic(), reason

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is not None and time.monotonic() - self._asked_at > SECOND_AFTER_S:
            os._exit(128 + number)
        self.ask(signal.Signals(number).name)

    def on_orphaned(self) -> None:
        """The launcher has died: stop, and leave even if the batch in flight takes longer."""
        self.ask("the launcher has died")
        timer = threading.Timer(ORPHAN_GRACE_S, os._exit, args=(1,))
        timer.daemon = True
        timer.start()
