"""Tokens a second over the time of a job, in total and by rank.

A unit's record has its time, and the ranks' logs tell which rank computed it. Times are of each
host's own clock, uncorrected.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gradproj.store.layout import LOGS_DIR, UNITS_DIR
from gradproj.store.unit_record import list_records, read_stats, record_name

N_BINS = 120
MIN_PAUSE_S = 600.0
PAUSE_FRACTION = 0.05
"""Idle time of all ranks is cut out of the figure if it is longer than this fraction of the working
time, and longer than ``MIN_PAUSE_S``."""
UNKNOWN_RANK = "unknown"

_COMMITTED = re.compile(rb"unit (\d+) committed: .*'started_at': ([\d.e+]+)")
_LOG_NAME = re.compile(r"rank-(\d+)(?:-(.+))?")


@dataclass(frozen=True)
class UnitTimes:
    """Times of the U committed units, in order of their start."""

    started: np.ndarray
    """``(U,)`` float64, seconds since 1970 by the computing host's clock."""
    finished: np.ndarray
    n_tokens: np.ndarray
    """``(U,)`` float64, without padding."""
    rank: np.ndarray
    """``(U,)`` int64: index in ``ranks``."""
    ranks: list[str]
    """Names from the logs' names: ``3``, or ``3 of slurm-70_1``."""
    n_untimed: int
    """Number of records without times."""

    @property
    def working_s(self) -> float:
        """Seconds in which any rank worked."""
        return float(sum(stop - start for start, stop in _spans(self)))

    @property
    def rank_s(self) -> float:
        """Working seconds of all ranks together."""
        return float((self.finished - self.started).sum())


def unit_times(output: Path) -> UnitTimes:
    """Read the times from ``units/`` and the ranks from ``logs/``.

    Raises:
        StoreError: a record cannot be read.
    """
    owners = _ranks_of_units(output / LOGS_DIR)
    numbers: dict[str, int] = {}
    times, n_untimed = [], 0
    for unit in list_records(output / UNITS_DIR).tolist():
        try:
            stats = read_stats(output / record_name(unit))
        except FileNotFoundError:  # removed by a repair meanwhile
            continue
        if not {"started_at", "finished_at", "real_tokens"} <= stats.keys():
            n_untimed += 1
            continue
        rank = owners.get((unit, stats["started_at"]), UNKNOWN_RANK)
        number = numbers.setdefault(rank, len(numbers))
        finished = max(stats["finished_at"], stats["started_at"] + 1e-3)
        times.append((stats["started_at"], finished, stats["real_tokens"], number))
    names = sorted(numbers, key=_natural)
    values = np.array(sorted(times), np.float64).reshape(-1, 4)
    place = np.array([names.index(name) for name in numbers], np.int64)
    rank_of = place[values[:, 3].astype(np.int64)] if len(values) else np.empty(0, np.int64)
    return UnitTimes(values[:, 0], values[:, 1], values[:, 2], rank_of, names, n_untimed)


def _ranks_of_units(logs: Path) -> dict[tuple[int, float], str]:
    """Return ``(unit, start time)`` -> rank, from the lines that ranks log on a commit."""
    ranks = {}
    for path in sorted(logs.glob("rank-*.log")):
        match = _LOG_NAME.fullmatch(path.stem)
        if match is None:
            continue
        rank = str(int(match[1])) + (f" of {match[2]}" if match[2] else "")
        for line in path.read_bytes().splitlines():
            committed = _COMMITTED.search(line)
            if committed is not None:
                ranks[int(committed[1]), float(committed[2])] = rank
    return ranks


def _natural(name: str) -> tuple:
    """Return a sort key that puts ``rank 10`` after ``rank 9``."""
    parts = re.split(r"(\d+)", name)
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in parts)


@dataclass(frozen=True)
class Throughput:
    """Tokens a second in B bins of time, without long pauses of all R ranks."""

    edges_s: np.ndarray
    """``(B + 1,)`` seconds from 0, pauses cut out."""
    by_rank: np.ndarray
    """``(R, B)`` tokens a second."""
    pauses: list[tuple[float, float]]
    """``(position, duration)`` in seconds of each pause that is cut out."""
    from_s: float
    """Start of the first unit, seconds since 1970."""
    to_s: float
    """End of the last unit."""

    @property
    def total(self) -> np.ndarray:
        """``(B,)`` tokens a second of all ranks."""
        return self.by_rank.sum(axis=0)


def throughput(times: UnitTimes, n_bins: int = N_BINS) -> Throughput | None:
    """Spread each unit's tokens evenly over its time; None without units."""
    if not len(times.started):
        return None
    pieces, pauses = _pieces(times)
    started, finished = (_place(values, pieces) for values in (times.started, times.finished))
    length = pieces[-1][2] + pieces[-1][1] - pieces[-1][0]
    edges = np.linspace(0, length, n_bins + 1)
    by_rank = np.zeros((len(times.ranks), n_bins))
    for number in range(len(times.ranks)):
        for unit in np.flatnonzero(times.rank == number).tolist():
            duration = max(finished[unit] - started[unit], 1e-9)
            share = np.clip((edges - started[unit]) / duration, 0, 1)
            by_rank[number] += times.n_tokens[unit] * np.diff(share)
    ends = float(times.started.min()), float(times.finished.max())
    return Throughput(edges, by_rank / (length / n_bins), pauses, *ends)


def _spans(times: UnitTimes) -> list[list[float]]:
    """Return ``[start, stop]`` of the times in which any rank worked, in order."""
    spans: list[list[float]] = []
    for start, stop in zip(times.started.tolist(), times.finished.tolist(), strict=True):
        if spans and start <= spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], stop)
        else:
            spans.append([start, stop])
    return spans


def _pieces(times: UnitTimes) -> tuple[list[tuple[float, float, float]], list[tuple[float, float]]]:
    """Return ``(start, stop, position)`` of the times that are shown, and the pauses between."""
    spans = _spans(times)
    least = max(MIN_PAUSE_S, PAUSE_FRACTION * sum(stop - start for start, stop in spans))
    pieces: list[list[float]] = [[*spans[0], 0.0]]
    pauses = []
    for start, stop in spans[1:]:
        idle = start - pieces[-1][1]
        if idle < least:
            pieces[-1][1] = stop
            continue
        place = pieces[-1][2] + pieces[-1][1] - pieces[-1][0]
        pauses.append((place, idle))
        pieces.append([start, stop, place])
    return [(a, b, c) for a, b, c in pieces], pauses


def _place(moments: np.ndarray, pieces: Iterable[tuple[float, float, float]]) -> np.ndarray:
    """Convert moments, each within a piece, to the figure's time."""
    starts, stops, places = (np.array(values) for values in zip(*pieces, strict=True))
    at = np.clip(np.searchsorted(starts, moments, side="right") - 1, 0, len(starts) - 1)
    return places[at] + np.minimum(moments, stops[at]) - starts[at]
