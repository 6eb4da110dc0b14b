"""``--batch_tokens auto``: the batch size that the device runs fastest, kept in ``batch.json``.

Rank 0 measures it before its first unit while the others wait for the file. Every later start of
any job on the output directory reads the file, so that a unit has the same batches, and its rows
the same bits, in whichever process.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradproj.coordinator.commits import Commits
from gradproj.coordinator.units import UnitQueue
from gradproj.engine.batching import AUTO
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.warm_up import random_ids
from gradproj.errors import StoreError
from gradproj.files import explain_os_errors
from gradproj.job.lockstep import Lockstep
from gradproj.job.plan import BATCH_FILE
from gradproj.job.startup import Job
from gradproj.job.unit_reader import UnitSettings
from gradproj.kernels.memory import CudaMemory, HostMemory, is_out_of_memory

MAX_TOKENS = 2**18
"""Largest batch tried."""

MAX_TRIAL_S = 20.0
"""No larger batch is tried after one that took this long."""

NEAR_THE_BEST = 0.97
"""A batch with this fraction of the best rate is preferred to a larger one."""

WAIT_FOR_RANK_0_S = 1800.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """One batch size on the device."""

    tokens: int
    seconds: float
    """The shorter of two runs: forward, backward, rows out."""
    bytes: int
    """Peak memory, as far as it can be measured."""

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


def recorded_batch_tokens(output: Path) -> int | None:
    """Return the number measured for this output directory, or None."""
    path = output / BATCH_FILE
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    try:
        tokens = json.loads(text)["batch_tokens"]
        if type(tokens) is int and tokens > 0:
            return tokens
    except (ValueError, KeyError, TypeError):
        pass
    raise StoreError(
        f"{path} holds no number of batch_tokens; delete it, or give --batch_tokens a number"
    )


def resolve_batch_tokens(
    job: Job,
    queue: UnitQueue | None,
    model: nn.Module,
    engine: GradProjLoraEngine,
    stopping: Callable[[], bool],
) -> UnitSettings:
    """Return the run's settings with a number in place of ``auto``.

    Rank 0 measures while the others wait, until ``stopping`` returns True or no unit is left. The
    first file published holds for all ranks of all jobs. The members of a group, who have no
    ``queue``, do what their leader does.
    """
    settings = job.plan.unit_settings
    if settings.batch.batch_tokens != AUTO:
        return settings
    if queue is not None:
        tokens = _tokens_of_file(job, queue, model, engine, stopping)
    else:
        assert job.lockstep is not None
        while (tokens := job.lockstep.announce()) == AUTO:
            _measure(job, model, engine)
    batch = replace(settings.batch, batch_tokens=tokens or settings.batch.max_length)
    return replace(settings, batch=batch)


def _tokens_of_file(
    job: Job,
    queue: UnitQueue,
    model: nn.Module,
    engine: GradProjLoraEngine,
    stopping: Callable[[], bool],
) -> int | None:
    """Return what the file says, after measuring it if need be; None if that is not needed."""
    plan, lockstep = job.plan, job.lockstep
    deadline = time.monotonic() + (0.0 if job.owner.rank == 0 else WAIT_FOR_RANK_0_S)
    while (
        (tokens := recorded_batch_tokens(plan.output)) is None
        and not stopping()
        and len(queue.pending())
    ):
        if time.monotonic() < deadline:
            time.sleep(0.2)
            if lockstep is not None:
                lockstep.wait()
            continue
        if lockstep is not None:
            lockstep.announce(AUTO)
        trials = _measure(job, model, engine)
        _publish(plan.output, queue.commits, trials, plan.unit_settings.batch.max_length)
    if lockstep is not None:
        lockstep.announce(tokens)
    if tokens is not None and job.owner.rank == 0:
        line = f"batches       {tokens:,} tokens, measured on this kind of device ({BATCH_FILE})"
        print(line, flush=True)
    return tokens


def _measure(job: Job, model: nn.Module, engine: GradProjLoraEngine) -> list[Trial]:
    length, reserved = job.plan.unit_settings.batch.max_length, job.plan.unit_bytes()
    return try_batches(model, engine, length, reserved, job.n_neighbours, job.lockstep)


def _publish(output: Path, commits: Commits, trials: list[Trial], max_length: int) -> None:
    content = {"batch_tokens": choose(trials, max_length), "trials": list(map(asdict, trials))}
    with explain_os_errors(output):
        text = json.dumps(content, indent=2) + "\n"
        commits.publisher.create(output / BATCH_FILE, [text.encode()])


def choose(trials: list[Trial], max_length: int) -> int:
    """Return the smallest batch near the best rate, or one sequence if no trial fit."""
    best = max((trial.rate for trial in trials), default=0.0)
    return next((t.tokens for t in trials if t.rate >= NEAR_THE_BEST * best), max_length)


def try_batches(
    model: nn.Module,
    engine: GradProjLoraEngine,
    max_length: int,
    reserved_bytes: int,
    n_neighbours: int,
    lockstep: Lockstep | None = None,
) -> list[Trial]:
    """Run ever larger batches of random tokens until more gains nothing or does not fit.

    Args:
        model: on its device.
        engine: attached to it; its sums are dropped.
        max_length: length of the sequences; batches of shorter ones fit if these do.
        reserved_bytes: device memory to leave for everything but the batch.
        n_neighbours: processes that share the host's memory.
        lockstep: the ranks of the model, which all run the trials; the slowest counts.
    """
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    memory: CudaMemory | HostMemory = CudaMemory(device) if on_cuda else HostMemory(n_neighbours)
    limit = memory.free() - reserved_bytes
    if lockstep is not None:
        lockstep.rehearse(model, engine)
        limit = int(lockstep.group.exchange(limit).min())
    trials: list[Trial] = []
    for n_sequences in (2**i for i in itertools.count()):
        if n_sequences > 1 and (n_sequences * max_length > MAX_TOKENS or engine.only_alone):
            break
        if trials and 2 * trials[-1].bytes > limit:
            break
        try:
            trial = _try(model, engine, n_sequences, max_length, memory, lockstep)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        finally:
            engine.clear_gradients()
            engine.take_token_covariances()
        trials.append(trial)
        megabytes = trial.bytes // 2**20
        log.info("batch of %d tokens: %.3f s, %d MB", trial.tokens, trial.seconds, megabytes)
        if trial.seconds > MAX_TRIAL_S or _has_levelled_off(trials):
            break
    return trials


def _has_levelled_off(trials: list[Trial]) -> bool:
    """Return whether the last two doublings gained next to nothing."""
    return len(trials) > 2 and max(t.rate for t in trials[-2:]) < trials[-3].rate / NEAR_THE_BEST


def _try(
    model: nn.Module,
    engine: GradProjLoraEngine,
    n_sequences: int,
    length: int,
    memory: Any,
    lockstep: Lockstep | None,
) -> Trial:
    device = next(model.parameters()).device
    ids = random_ids(model, n_sequences, length)

    def run() -> None:
        per_sample_loss(model, ids).sum().backward()
        engine.collect_batch()

    memory.start()
    seconds = []
    for _ in range(2):  # in the first, libraries set up what they need for a new shape
        started = time.perf_counter()
        run() if lockstep is None else lockstep.run_pass(engine, run)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    trial = Trial(n_sequences * length, min(seconds), memory.peak())
    if lockstep is None:
        return trial
    nanoseconds, most = lockstep.group.exchange(int(1e9 * trial.seconds), trial.bytes).max(axis=0)
    return replace(trial, seconds=float(nanoseconds) / 1e9, bytes=int(most))
