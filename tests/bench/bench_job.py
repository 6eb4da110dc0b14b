"""The job beside its engine alone: what reading, tokenizing, hosts' copies, checksums and commits
add.

    python tests/bench/bench_job.py [--model tiny|small|gpt2] [--documents N] [--rounds N] [--cores
    1|2] [--quick]

- job: one rank of ``python -m gradproj.run``, from the moment it begins to read its first unit to
its last commit.
- engine: ``UnitProjector`` over the very same units, read, tokenized and batched before the clock
starts; rows stay where the engine sums them.
- 16 x 16: the job with version 1's default rows, float16 of 256 values a layer in a random basis.

The last line is the default job over that one: signs of 64 x 64 values in the eigenbasis. The pilot
runs before the clock starts.

Each run is a process of its own with a new output, job and engine in turn, one thread, tied to
``--cores`` cores (default 1: there nothing runs beside the engine, so all that the job does besides
shows). CPU seconds are of the whole process, all threads. On a shared machine they are what counts:
wall time holds the neighbours' work too.

``tiny`` (2 layers x 64) is the hard case: its engine is so fast that tokenizing is a large part of
it on a CPU.
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from documents import SHAPES, make_documents, make_model, make_tars
from measure import print_machine

import gradproj.run
from gradproj.coordinator.heartbeats import RankProgress
from gradproj.coordinator.units import UnitQueue
from gradproj.distributed import Process, Rendezvous, choose_device
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import chunk_verdict
from gradproj.job.batch_size import resolve_batch_tokens
from gradproj.job.config import run_config
from gradproj.job.shutdown import StopRequest
from gradproj.job.startup import start_job
from gradproj.job.unit_projector import ProjectedUnit, UnitProjector
from gradproj.job.unit_reader import PreparedUnit, UnitReader
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.model.loading import load_model
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.store import ProjectionStore
from gradproj.store.row_encoder import RowEncoder

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}
N_UNITS = 4
VERSION_1 = (
    "--encoding", "dense", "--basis", "random", "--proj_rank_total", "256",
    "--loss_reduction", "mean",
)  # fmt: skip


def main() -> None:
    if sys.argv[1:2] and sys.argv[1] in PARTS:
        result = PARTS[sys.argv[1]](sys.argv[2:])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps(result | {"peak": peak}))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(SHAPES), default="small")
    parser.add_argument("--documents", type=int, default=512, help=f"in {N_UNITS} units")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="128 documents, 2 rounds")
    args = parser.parse_args()
    if args.quick:
        args.documents, args.rounds = 128, 2
    compare(args.model, args.documents, args.rounds, args.cores)


def compare(model: str, n_documents: int, rounds: int, cores: int = 1) -> dict[str, float]:
    """Job over engine: medians of CPU seconds and of wall seconds."""
    print_machine("zarr")
    seconds: dict[tuple[str, str], list[float]] = {
        (p, clock): [] for clock in ("cpu", "wall") for p in PARTS
    }
    memory: dict[str, list[float]] = {part: [] for part in PARTS}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        documents = make_documents(folder, n_documents)
        checkpoint = make_model(folder / "model", model, folder / "tokenizer")
        tars = make_tars(documents, folder / "tars", n_documents)
        for number in range(rounds):
            for part in PARTS:
                output = folder / f"{part}-{number}"
                run = measure(part, cores, tars, checkpoint, output, n_documents)
                memory[part].append(run["peak"])
                for clock in ("cpu", "wall"):
                    seconds[part, clock].append(run[clock])
        print(
            f"{model}, {n_documents} documents, {run['n_tokens']} tokens, {N_UNITS} units, {cores} "
            "core(s)"
        )
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    for (part, clock), values in seconds.items():
        ratio = medians[part, clock] / medians["engine", clock]
        spread = f"({min(values):.2f}, {max(values):.2f})"
        print(
            f"{part:7} {clock:4} {medians[part, clock]:8.2f} s {spread:18} {ratio:6.3f}", flush=True
        )
    peaks = {part: statistics.median(values) for part, values in memory.items()}
    over = {clock: medians["job", clock] / medians["16 x 16", clock] for clock in ("cpu", "wall")}
    over["memory"] = peaks["job"] / peaks["16 x 16"]
    print("job over 16 x 16: " + ", ".join(f"{value:.3f} {name}" for name, value in over.items()))
    result = {clock: medians["job", clock] / medians["engine", clock] for clock in ("cpu", "wall")}
    return result | {f"{name} over 16 x 16": value for name, value in over.items()}


def measure(
    part: str,
    cores: int,
    tars: Path | str,
    model: Path,
    output: Path | str,
    n_documents: int,
    script: str = __file__,
) -> dict[str, Any]:
    """One run in a process of its own, which ``script PART FLAGS`` is."""
    command = [
        sys.executable,
        script,
        part,
        "--model",
        str(model),
        "--shards",
        str(tars),
        "--output_dir",
        str(output),
        "--device",
        "cpu",
        "--threads",
        "1",
        "--max_length",
        "2048",
        "--rows_per_shard",
        str(n_documents // N_UNITS),
        *(VERSION_1 if part == "16 x 16" else ("--pilot_tokens", "2048")),
    ]
    chosen = sorted(os.sched_getaffinity(0))[-cores:]
    done = subprocess.run(
        command,
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen),
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


class Stopwatch:
    """Wall and CPU seconds of this process since it was made."""

    def __init__(self) -> None:
        self.began, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> dict[str, float]:
        return {"wall": time.perf_counter() - self.began, "cpu": time.process_time() - self._cpu}


def timed_job(flags: list[str]) -> dict[str, float]:
    """The real job; the clock runs from the first read of a unit to the end of the last commit."""
    watches: list[Stopwatch] = []
    ends: list[dict[str, float]] = []
    tokens: list[int] = []
    read, commit = UnitReader.read, gradproj.run.commit

    def noted_read(reader: UnitReader, unit: int) -> PreparedUnit | None:
        if not watches:
            watches.append(Stopwatch())
        return read(reader, unit)

    def noted_commit(queue: UnitQueue, projected: ProjectedUnit) -> None:
        commit(queue, projected)
        ends.append(watches[0].read())
        tokens.append(projected._stats["real_tokens"])

    with (
        patch.object(UnitReader, "read", noted_read),
        patch.object(gradproj.run, "commit", noted_commit),
        contextlib.redirect_stdout(sys.stderr),
    ):
        assert gradproj.run.main(flags) == 0
    assert len(ends) == N_UNITS
    return {**ends[-1], "n_tokens": sum(tokens), "began": watches[0].began}


def timed_engine(flags: list[str]) -> dict[str, float]:
    """The engine over all units, read before the clock starts."""
    config, process, stop = (
        run_config(flags, "bench_job"),
        Process.from_environment(),
        StopRequest(),
    )
    prepare_torch(config.job.threads, config.job.deterministic)
    with Rendezvous(process) as ranks:
        job = start_job(config, process, ranks)
    plan, (device, _) = job.plan, choose_device(config.job.device, process.local_rank)
    queue = UnitQueue(plan.output, plan.layout, plan.identity_hash, plan.wanted, job.owner)
    tokenizer, model = load_tokenizer(plan.files), load_model(plan.files, device)
    with ProjectionStore(plan.output) as store:
        engine = GradProjLoraEngine.from_config(
            model, config.projection, store.projection_matrices, basis=store.basis
        )
    chunk_verdict(model)
    with engine:
        settings = resolve_batch_tokens(job, queue, model, engine, stop)
        reader, projector = (
            UnitReader(plan.index, tokenizer, settings),
            UnitProjector(
                model, engine, settings, RowEncoder(plan.layout, plan.layers), RankProgress()
            ),
        )
        units = [reader.read(int(unit)) for unit in queue.pending()]
        assert len(units) == N_UNITS
        watch = Stopwatch()
        for unit in units:
            # What the job gives to its writer is dropped here.
            assert projector.project(unit, queue.partial_log(unit.unit, "bench")) is not None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        run = watch.read()
    queue.release()
    return {**run, "n_tokens": sum(len(tokens) for unit in units for tokens in unit.sequences)}


PARTS: dict[str, Callable[[list[str]], dict[str, float]]] = {
    "job": timed_job,
    "engine": timed_engine,
    "16 x 16": timed_job,
}


if __name__ == "__main__":
    main()
