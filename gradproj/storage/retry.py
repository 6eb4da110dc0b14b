"""One rule for how often and how long a request is tried again.

obstore itself repeats a request that ended in 5xx, 408 or 429, in a refused or reset connection or
in a stall, with a growing random pause, and continues a body that was cut from where it stopped,
given an etag. ``retried`` repeats what it does not: a 409, and a write whose reply was lost.
"""

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from gradproj.storage.failures import RETRIED, reason_of

T = TypeVar("T")


@dataclass(frozen=True)
class RetryPolicy:
    """Pauses are uniform between 0 and ``first_s`` times 2, 4, 8 ..., at most ``longest_s``."""

    first_s: float = 0.1
    longest_s: float = 15.0
    deadline_s: float = 180.0
    """No attempt begins later than this after the first one."""
    tries: int = 12
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
        return {
            "max_retries": self.tries - 1,
            "retry_timeout": timedelta(seconds=self.deadline_s),
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


def retried(
    action: Callable[[], T],
    policy: RetryPolicy = POLICY,
    *,
    sleep: Callable[[float], object] = time.sleep,
) -> T:
    """Call ``action`` until it succeeds, while its errors are those of a busy or unreachable store.

    Its last error is raised after ``policy.deadline_s``, any other at once. The action must be one
    that may happen twice.
    """
    pauses = policy.pauses()
    while True:
        try:
            return action()
        except Exception as error:
            pause = next(pauses, None) if reason_of(error) in RETRIED else None
            if pause is None:
                raise
            sleep(pause)
