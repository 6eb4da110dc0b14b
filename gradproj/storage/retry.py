"""One rule for how often and how long a request is tried again.

obstore itself repeats a request that ended in 5xx, 408 or 429, or in a connection that was refused
or reset, a few times in a few seconds, and continues a body that was cut from where it stopped,
given an etag. ``retried`` goes on after that, and after a 409 and a write whose reply was lost.
"""

import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from gradproj.storage.address import Address
from gradproj.storage.failures import RETRIED, Reason, reason_of

T = TypeVar("T")

NOTICE_S = 10.0
"""A request that fails for longer is reported as waiting, once an outage."""
FIRST_S = 10.0
"""Stores that cannot be reached are given up after so long if none has answered this process yet:
then an address or the endpoint is wrong rather than the store down."""
_OF_CLIENT = 4, 5.0
"""Tries of obstore at one request, and the seconds after which none of them begins."""


@dataclass(frozen=True)
class RetryPolicy:
    """Pauses are uniform between 0 and ``first_s`` times 2, 4, 8 ..., at most ``longest_s``."""

    first_s: float = 0.1
    longest_s: float = 15.0
    deadline_s: float = 180.0
    """No attempt begins later than this after the first one."""
    tries: int = 100
    connect_s: float = 10.0
    stall_s: float = 30.0
    """A body of which nothing arrives for so long is asked for again."""

    def pauses(self) -> Iterator[float]:
        """Yield the seconds to wait before each attempt after the first, until the deadline."""
        started = time.monotonic()
        for attempt in range(1, self.tries):
            pause = random.uniform(0.0, min(self.longest_s, self.first_s * 2.0**attempt))
            if time.monotonic() + pause - started > self.deadline_s:
                return
            yield pause

    def of_obstore(self) -> dict[str, Any]:
        """Return the policy as the ``retry_config`` of a store of obstore."""
        tries, seconds = _OF_CLIENT
        return {
            "max_retries": min(self.tries, tries) - 1,
            "retry_timeout": timedelta(seconds=seconds),
            "backoff": {
                "init_backoff": timedelta(seconds=self.first_s),
                "max_backoff": timedelta(seconds=self.longest_s),
            },
        }

    def of_client(self) -> dict[str, Any]:
        """Return the policy's part of the ``client_options`` of a store of obstore.

        There is no limit to the whole request: a tar may take hours. A stall has one.
        """
        return {
            "timeout": timedelta(days=7),
            "read_timeout": timedelta(seconds=self.stall_s),
            "connect_timeout": timedelta(seconds=self.connect_s),
        }


POLICY = RetryPolicy()


@dataclass
class _Seen:
    """Answers and outages that this process has seen, of all stores."""

    answer: bool = False
    since_s: float = 0.0
    """When the first request began that reached no store."""
    outage: bool = False
    """Whether people were told of the present one."""


_SEEN = _Seen()


class Patience:
    """The attempts at one request that may be repeated: how long to wait for the next one."""

    def __init__(
        self,
        place: Address,
        policy: RetryPolicy = POLICY,
        meaning: Callable[[BaseException], Reason] = reason_of,
    ) -> None:
        self._place, self._policy, self._meaning = place, policy, meaning
        self._pauses, self._started = policy.pauses(), time.monotonic()

    def succeeded(self) -> None:
        """Note that the request was answered."""
        _SEEN.answer, _SEEN.outage = True, False

    def pause_after(self, error: BaseException) -> float | None:
        """Return the seconds to wait before the next attempt; None if another makes no sense."""
        reason, waited_s = self._meaning(error), time.monotonic() - self._started
        _SEEN.answer |= reason != "unreachable"
        pause = next(self._pauses, None) if reason in RETRIED else None
        # In a job of Slurm nobody waits who could correct an address.
        if pause is not None and not _SEEN.answer and "SLURM_JOB_ID" not in os.environ:
            _SEEN.since_s = _SEEN.since_s or self._started
            left_s = FIRST_S - (time.monotonic() - _SEEN.since_s)
            return min(pause, left_s) if left_s > 0 else None
        if pause is not None and waited_s >= NOTICE_S and not _SEEN.outage:
            _SEEN.outage = True
            print(
                f"gradproj: {self._place.origin} cannot be reached, or is too busy; waiting for "
                f"it, at most {self._policy.deadline_s / 60:.0f} minutes",
                file=sys.stderr,
                flush=True,
            )
        return pause


def retried(
    action: Callable[[], T],
    place: Address,
    policy: RetryPolicy = POLICY,
    *,
    meaning: Callable[[BaseException], Reason] = reason_of,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Call ``action`` until it succeeds, while its errors are those of a busy or unreachable store.

    Its last error is raised after ``policy.deadline_s``, any other at once. The action must be one
    that may happen twice. ``place`` is named while it is waited for; ``meaning`` is of errors.
    """
    patience = Patience(place, policy, meaning)
    while True:
        try:
            result = action()
        except Exception as error:
            pause = patience.pause_after(error)
            if pause is None:
                raise
        else:
            patience.succeeded()
            return result
        sleep(pause)
