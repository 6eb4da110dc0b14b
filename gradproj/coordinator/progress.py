"""The job's progress display, from the records and heartbeats of all its ranks."""

import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from gradproj.coordinator.claims import Claim, ClaimBoard
from gradproj.coordinator.heartbeats import (
    CONFIRM_AFTER_S,
    STALE_AFTER_S,
    LiveRanks,
    RankProgress,
    read_heartbeats,
)
from gradproj.coordinator.opening import commits_of
from gradproj.coordinator.process_id import Owner
from gradproj.formatting import count, human_seconds
from gradproj.store.layout import HEARTBEATS_DIR, UNITS_DIR, StoreLayout
from gradproj.store.unit_record import list_records

MAX_UNITS_REFRESHED = 2000
"""Above this many units, listing the records takes too long to refresh every second."""
MAX_RANKS_LISTED = 16


@dataclass(frozen=True)
class Snapshot:
    """Progress of a store at one moment."""

    done: int
    """Documents of committed units, and of finished batches in running ones."""
    total: int
    rates: tuple[float, ...]
    """Tokens per second of each counted rank, in rank order."""


def take_snapshot(
    output: Path, layout: StoreLayout, wanted: np.ndarray, alive: list[tuple[Owner, RankProgress]]
) -> Snapshot:
    """Read the records, and add what the ranks ``alive`` have computed of units without one."""
    recorded = np.intersect1d(list_records(output / UNITS_DIR), wanted, assume_unique=True)
    running = {p.unit: p.unit_samples for _, p in alive if p.unit >= 0}
    open_units = np.setdiff1d(np.fromiter(running, np.int64, len(running)), recorded)
    done = layout.n_samples_in(recorded) + sum(running[unit] for unit in open_units.tolist())
    total = layout.n_samples_in(wanted)
    in_rank_order = [p for _, p in sorted(alive, key=lambda beat: beat[0].rank)]
    rates = tuple(p.n_tokens / p.seconds if p.seconds > 0 else 0.0 for p in in_rank_order)
    return Snapshot(min(done, total), total, rates)


class ProgressDisplay:
    """A progress bar on a terminal, else a line every few seconds, on standard error."""

    def __init__(
        self,
        output: Path,
        layout: StoreLayout,
        wanted: np.ndarray,
        observer: Owner,
        visible: bool = True,
    ) -> None:
        self._visible = visible
        if not visible:
            return
        self._where = (output, layout, wanted)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        # The baseline counts every rank that may live: what those have computed so far was not
        # computed since this start, and must not shorten the estimate of the time left.
        beats = read_heartbeats(output / HEARTBEATS_DIR)
        maybe_alive = [beat for beat in beats if not beat[0].is_gone(observer)]
        first = take_snapshot(*self._where, maybe_alive)
        pace = commits_of(output, observer).pace
        self._ranks = LiveRanks(output / HEARTBEATS_DIR, observer, pace)
        self._ranks.read()
        self._done_at_start, self._started = first.done, time.monotonic()
        on_terminal = sys.stderr.isatty()
        refresh_often = on_terminal and len(wanted) <= MAX_UNITS_REFRESHED
        self._every_s = pace.refresh_every_s if refresh_often else pace.line_every_s
        self._bar = tqdm(
            total=first.total,
            initial=first.done,
            unit=" documents",
            dynamic_ncols=True,
            disable=not on_terminal,
        )

    def __enter__(self) -> "ProgressDisplay":
        if self._visible:
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._visible:
            self._ended.set()
            self._thread.join()
            self._show(last=kind is None)
            self._bar.close()

    def _run(self) -> None:
        # The first line comes early, so that a user sees that the job works.
        pause = min(2.0, self._every_s)
        while not self._ended.wait(pause):
            self._show()
            pause = self._every_s

    def _show(self, last: bool = False) -> None:
        now = take_snapshot(*self._where, self._ranks.read())
        ranks = count(len(now.rates), "rank")
        speed = f"{sum(now.rates):,.0f} tokens/s, {ranks}{_spread(now.rates)}"
        if not self._bar.disable:
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.n = now.done
            self._bar.refresh()
            return
        percent = 100 * now.done / max(now.total, 1)
        line = f"{now.done:,} of {now.total:,} documents ({percent:.1f} %)"
        # No speed at the end: other ranks have left, and the rest does not represent the job.
        line = line if last else f"{line}, {speed}, {self._time_left(now)}"
        print(line, file=sys.stderr, flush=True)

    def _time_left(self, now: Snapshot) -> str:
        elapsed, done = time.monotonic() - self._started, now.done - self._done_at_start
        if done <= 0:
            return "time left not known yet"
        return f"about {human_seconds(elapsed * (now.total - now.done) / done)} left"


def _spread(rates: tuple[float, ...]) -> str:
    """Name the least, median and greatest rate and the slowest rank, above a few ranks."""
    if len(rates) <= MAX_RANKS_LISTED:
        return ""
    slowest = rates.index(min(rates))
    low, middle, high = min(rates), statistics.median(rates), max(rates)
    return f" ({low:,.0f} / {middle:,.0f} / {high:,.0f} a rank, rank {slowest} slowest)"


class WaitNotice:
    """Names hosts whose units a rank waits for, one line on standard error each, at most once."""

    def __init__(self, claims: ClaimBoard) -> None:
        self._claims = claims
        self._named: set[str] = set()

    def show(self, units: Iterable[str]) -> None:
        """Name the hosts that hold some of ``units`` and show no sign of life."""
        newest, after_s = self._claims.current(), self._claims.commits.pace.silent_after_s
        held = [self._claims.read(unit, newest[unit]) for unit in units if unit in newest]
        silent = {_host(claim) for claim in held if self._claims.is_silent(claim, after_s)}
        # A silent host's other claims count too, also those first seen a moment ago.
        lost = [c for c in held if self._claims.is_silent(c, 0) and not self._claims.is_at_work(c)]
        hosts = Counter(_host(claim) for claim in lost if _host(claim) in silent)
        for host, n in sorted(hosts.items()):
            if host not in self._named:
                self._named.add(host)
                # tqdm.write puts the line above the job's progress bar.
                tqdm.write(
                    f"waiting for {count(n, 'unit')} of {host}, taken over after "
                    f"{(STALE_AFTER_S + CONFIRM_AFTER_S) / 60:.0f} minutes without a sign of life",
                    file=sys.stderr,
                )


def _host(claim: Claim) -> str:
    return "an unreadable claim" if claim.owner is None else claim.owner.host
