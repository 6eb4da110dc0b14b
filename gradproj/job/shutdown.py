"""Ending early and in order: a signal requests a stop, a second one ends the process at once."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from gradproj.errors import Ended, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECOND_AFTER_S = 3.0
"""torchrun forwards a signal twice; only one that comes later than this counts as a second."""
WATCH_INTERVAL_S = 0.5
ORPHAN_GRACE_S = 3.0
"""Time for the batch in flight after the launcher has died."""

PARENT_AT_IMPORT = os.getppid()


class StopRequest:
    """Stop flag set by signals. Calling it returns whether a stop was requested.

    Until ``begin``, a signal ends the process at once, since it is still importing. Until
    ``drain``, a signal raises ``Stopped`` in the main thread, since there is nothing to save. After
    that it only sets the flag, and the loop saves its rows.
    """

    def __init__(self) -> None:
        self._requested_at: float | None = None
        self._attending = self._begun = self._draining = False
        self._announces = False
        self.reason = ""
        self.exit_code = 0
        """128 + the signal's number, as in a shell."""
        self._handlers: dict[int, Any] = {}
        self._wakeup = -1

    def __call__(self) -> bool:
        return self._requested_at is not None

    def attend(
        self, rank: int | None, launcher_died: Callable[[], bool] = lambda: False
    ) -> "StopRequest":
        """Handle ``SIGNALS`` from now on, and exit when the launcher dies. Call in the main thread.

        The launcher sets the rank (None without one); only rank 0 announces the stop on standard
        error. ``launcher_died`` is called once: it may have died before this process noted its pid.
        """
        if not self._attending:
            self._attending, self._announces = True, not rank
            self._handlers = {n: signal.signal(n, self._on_signal) for n in SIGNALS}
            self._listen()
            if rank is not None:
                self.watch_launcher(died_before=launcher_died)
        return self

    def release(self) -> None:
        """Restore the handlers that were there before ``attend``."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if self._attending:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)  # which ends the thread
            self._listener.join(SECOND_AFTER_S)

    def _listen(self) -> None:
        """Let a thread end the process at a second signal.

        The main thread may be inside a library that waits for a device or another rank: Python runs
        no handler until it returns.
        """
        heard, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)

        def listen() -> None:
            first_at = None
            # Signals that are read together count as one: on a busy machine this thread may run
            # long after them, and then nothing tells when each came.
            while numbers := os.read(heard, 64):
                stops = [number for number in numbers if number in SIGNALS]
                if not stops:  # of a program that embeds the job
                    continue
                if first_at is None:
                    asked_otherwise = not self.exit_code and self._requested_at
                    first_at = asked_otherwise or time.monotonic()
                if time.monotonic() - first_at > SECOND_AFTER_S:
                    os._exit(128 + stops[-1])
            os.close(heard)

        self._listener = threading.Thread(target=listen, name="signals", daemon=True)
        self._listener.start()

    def begin(self) -> None:
        """From now on, let a signal raise an exception."""
        self._begun = True

    def drain(self) -> None:
        """From now on, let a signal only set the flag: there is something to save."""
        self._draining = True

    def request(self, reason: str) -> None:
        """Request a stop after the batch in flight."""
        if self._requested_at is None:
            self._requested_at, self.reason = time.monotonic(), reason

    @contextmanager
    def requested_on_error(self) -> Iterator[None]:
        """Request a stop if the body raises, so that the threads beside it stop too."""
        try:
            yield
        except BaseException as error:
            self.request(type(error).__name__)
            raise

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._requested_at is not None:
            return
        self.request(signal.Signals(number).name)
        self.exit_code = 128 + number
        if not self._begun:
            # An exception would be raised in the middle of an import.
            if self._announces:
                os.write(2, f"gradproj: {Stopped(number)}\n".encode())
            os._exit(self.exit_code)
        if not self._draining:
            raise Stopped(number) if self._announces else Ended(exit_code=128 + number)
        if self._announces:
            # os.write, since the signal may have interrupted a print.
            os.write(2, f"\ngradproj: {self.reason}: stopping after the batch in flight\n".encode())

    def watch_launcher(
        self,
        parent: int = PARENT_AT_IMPORT,
        parent_now: Callable[[], int] = os.getppid,
        died_before: Callable[[], bool] = lambda: False,
    ) -> None:
        """Exit within 5 s after the parent process has died, even if a batch takes longer.

        A worker whose launcher was killed with SIGKILL gets no signal.
        """

        def watch() -> None:
            lives = not died_before()
            while lives and parent_now() == parent:
                time.sleep(WATCH_INTERVAL_S)
            if self._draining:
                self.request("the launcher has died")
                time.sleep(ORPHAN_GRACE_S)
            os._exit(1)

        threading.Thread(target=watch, name="launcher watch", daemon=True).start()


def leave(code: int) -> NoReturn:
    """End this process now.

    Python's own exit takes a second or more with torch loaded, and in that time handles neither a
    second signal (the process dies of it, and torchrun takes a rank that has saved everything for a
    killed one) nor the launcher's death.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader is gone
            stream.flush()
    os._exit(code)
