"""What a rank says while it has nothing to do but wait for units of processes that may be dead."""

import sys
from collections import Counter
from collections.abc import Iterable

from tqdm import tqdm

from gradproj.coordinator.claims import CONFIRM_AFTER_S, STALE_AFTER_S, Claim, ClaimBoard

SAID_AFTER_S = 30.0
"""Who has finished no batch within this time is named; most ranks that are waited for end their last unit sooner."""


class WaitNotice:
    """One line on standard error for each host whose claims are waited for, at most once.

    Args:
        claims: of this process.
    """

    def __init__(self, claims: ClaimBoard) -> None:
        self._claims = claims
        self._named: set[str] = set()

    def say(self, units: Iterable[str]) -> None:
        """Name the hosts that hold these units without a sign of life, those that were not named before."""
        newest = self._claims.current()
        held = [self._claims.read(unit, newest[unit]) for unit in units if unit in newest]
        silent = {_host(claim) for claim in held if self._claims.is_silent(claim, SAID_AFTER_S)}
        # With those of their claims that were seen first not so long ago.
        lost = [c for c in held if self._claims.is_silent(c, 0) and not self._claims.is_at_work(c)]
        hosts = Counter(_host(claim) for claim in lost if _host(claim) in silent)
        for host, n in sorted(hosts.items()):
            if host not in self._named:
                self._named.add(host)
                # By tqdm, which puts it above the job's progress bar.
                tqdm.write(
                    f"waiting for {n:,} unit{'s' * (n != 1)} of {host}, taken over after "
                    f"{(STALE_AFTER_S + CONFIRM_AFTER_S) / 60:.0f} minutes without a sign of life",
                    file=sys.stderr,
                )


def _host(claim: Claim) -> str:
    return "an unreadable claim" if claim.owner is None else claim.owner.host
