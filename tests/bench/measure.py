"""Timing shared by the benchmarks.

Variants timed in turn, medians, spreads, and the machine they ran on.
"""

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path

import torch

Clock = Callable[[], float]


class Variant:
    """One way to do the work: ``setting`` is entered before the clock starts, ``work`` is timed."""

    def __init__(
        self,
        work: Callable[[], object],
        setting: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.work, self.setting = work, setting

    def seconds(self, clock: Clock) -> float:
        """One run."""
        with self.setting():
            started = clock()
            self.work()
            return clock() - started


def interleave(
    variants: Mapping[str, Variant], rounds: int, clock: Clock = time.process_time
) -> dict[str, list[float]]:
    """Seconds of every variant, ``A B C A B C ...``, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        for name, variant in variants.items():
            seconds = variant.seconds(clock)
            if number:
                times[name].append(seconds)
    return times


def print_table(times: Mapping[str, list[float]], bases: list[str]) -> dict[str, float]:
    """Medians, spreads and ratios to each base; the medians are returned."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    width = max(map(len, times))
    print("".join([f"{'':{width}}  median s   least    most", *(f"  / {base}" for base in bases)]))
    for name, values in times.items():
        ratios = (f"  {medians[name] / medians[base]:{len(base) + 2}.3f}" for base in bases)
        print(
            f"{name:{width}}  {medians[name]:8.3f}  {min(values):6.3f}  "
            f"{max(values):6.3f}{''.join(ratios)}",
            flush=True,
        )
    return medians


def print_machine(*packages: str) -> None:
    """Processor, threads and versions: a ratio means nothing without them."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", *packages))
    print(
        f"{names[0] if names else platform.processor()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, "
        f"{torch.get_num_threads()} thread(s); Python {platform.python_version()}, {versions}",
        flush=True,
    )
