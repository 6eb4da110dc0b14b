"""One progress display for the whole job, from the records and the ranks' heartbeats."""

import statistics
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
from tqdm import tqdm

from gradproj.coordinator.heartbeats import Progress, RanksAtWork, read_heartbeats
from gradproj.coordinator.process_id import Owner
from gradproj.formatting import human_seconds
from gradproj.store.layout import StoreLayout
from gradproj.store.unit_record import list_records

LINE_EVERY_S = 10.0
LOOK_EVERY_S = 1.0
MOST_UNITS_LOOKED_AT_OFTEN = 2000
"""With more units, looking at their records takes long enough to be done seldom."""
MOST_RANKS_LISTED = 16


@dataclass(frozen=True)
class Snapshot:
    """How far a store is at one moment."""

    done: int
    """Documents of committed units and of batches finished in running ones."""
    total: int
    n_tokens: int
    """Tokens computed by the ranks that count, since they started."""
    seconds: float
    """The longest time that one of them has been computing."""
    tokens_per_second: float
    """Summed over them."""
    rates: tuple[float, ...]
    """Tokens per second of each, in rank order."""

    @property
    def n_ranks(self) -> int:
        return len(self.rates)


def take_snapshot(
    output: Path,
    layout: StoreLayout,
    wanted: np.ndarray,
    observer: Owner | None = None,
    ranks: RanksAtWork | None = None,
) -> Snapshot:
    """Look at the records and heartbeats; those of processes known to be gone do not count.

    With ``ranks``, only those that are known to live do.
    """
    recorded = np.intersect1d(list_records(output / "units"), wanted, assume_unique=True)
    if ranks is not None:
        alive = ranks.look()
    else:
        beats = read_heartbeats(output / "heartbeats")
        alive = [b for b in beats if observer is None or not b[0].is_gone(observer)]
    running = {p.unit: p.unit_samples for _, p in alive if p.unit >= 0}
    open_units = np.setdiff1d(np.fromiter(running, np.int64, len(running)), recorded)
    done = _rows_in(recorded, layout) + sum(running[unit] for unit in open_units.tolist())
    rates = tuple(_rate(p) for _, p in sorted(alive, key=lambda b: b[0].rank))
    seconds = max((p.seconds for _, p in alive), default=0.0)
    total = _rows_in(wanted, layout)
    return Snapshot(
        min(done, total), total, sum(p.n_tokens for _, p in alive), seconds, sum(rates), rates
    )


def _rate(progress: Progress) -> float:
    return progress.n_tokens / progress.seconds if progress.seconds > 0 else 0.0


def _rows_in(units: np.ndarray, layout: StoreLayout) -> int:
    rows = len(units) * layout.rows_per_shard
    last = layout.n_units - 1
    if len(units) and units[-1] == last:
        rows -= layout.n_units * layout.rows_per_shard - layout.n_samples
    return rows


class ProgressDisplay:
    """A bar on a terminal, a line every few seconds elsewhere, on standard error.

    Args:
        output: OUTPUT.
        layout: of the store.
        wanted: units to be computed.
        observer: this process.
        visible: False on ranks that are to show nothing.
    """

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
        self._where = (output, layout, wanted, observer)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        # Where it begins, all count that may live: what they have computed is no progress since.
        first = take_snapshot(*self._where)
        self._ranks = RanksAtWork(output / "heartbeats", observer)
        self._ranks.look()
        self._done_at_start, self._started = first.done, time.monotonic()
        on_terminal = sys.stderr.isatty()
        self._every_s = (
            LINE_EVERY_S
            if not on_terminal or len(wanted) > MOST_UNITS_LOOKED_AT_OFTEN
            else LOOK_EVERY_S
        )
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

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._visible:
            self._ended.set()
            self._thread.join()
            self._show(last=kind is None)
            self._bar.close()

    def _run(self) -> None:
        # The first look comes early, so that a person sees that it works.
        pause = min(2.0, self._every_s)
        while not self._ended.wait(pause):
            self._show()
            pause = self._every_s

    def _show(self, last: bool = False) -> None:
        now = take_snapshot(*self._where, self._ranks)
        speed = f"{now.tokens_per_second:,.0f} tokens/s, {now.n_ranks} rank{'s' * (now.n_ranks != 1)}{_spread(now)}"
        if not self._bar.disable:
            self._bar.set_postfix_str(speed, refresh=False)
            self._bar.n = now.done
            self._bar.refresh()
            return
        share = (
            f"{now.done:,} of {now.total:,} documents ({100 * now.done / max(now.total, 1):.1f} %)"
        )
        # At the end the other ranks have gone, and the speed of those that are left says nothing.
        print(
            share if last else f"{share}, {speed}, {self._time_left(now)}",
            file=sys.stderr,
            flush=True,
        )

    def _time_left(self, now: Snapshot) -> str:
        elapsed, done = time.monotonic() - self._started, now.done - self._done_at_start
        if done <= 0:
            return "time left not known yet"
        return f"about {human_seconds(elapsed * (now.total - now.done) / done)} left"


def _spread(now: Snapshot) -> str:
    """Above a few ranks, the least, median and most of them, and which is slowest."""
    if now.n_ranks <= MOST_RANKS_LISTED:
        return ""
    slowest = now.rates.index(min(now.rates))
    low, middle, high = min(now.rates), statistics.median(now.rates), max(now.rates)
    return f" ({low:,.0f} / {middle:,.0f} / {high:,.0f} a rank, rank {slowest} slowest)"
