"""Two ranks, each on a core of its own, beside one: the same real job, documents a second.

    python tests/bench/bench_scale.py [--documents N] [--rounds N] [--quick]

torchrun starts the ranks, `taskset` pins them. The job's time is from the start of its first unit
to its last commit, as ``projection_stats.json`` has it. Beside the wall clock stand the documents
per CPU second (of a process and its children, less those of a job of one unit on the same corpus:
start-up), and the share of a core that each rank got: where that is below 0.95 on either side,
other work was on the machine and only the CPU seconds can be judged.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from measure import print_machine

MIN_SHARE = 0.95
ROWS = 8
"""Of a unit. One of them more than the other is what the ranks can be apart at the end."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=1_024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="256 documents, once")
    args = parser.parse_args()
    measure(*((256, 1) if args.quick else (args.documents, args.rounds)))


def measure(n_documents: int = 1_024, rounds: int = 3) -> dict[str, float]:
    """``wall`` and ``cpu``.

    Two ranks' documents a second over one's, by either clock; ``share`` of a core they got.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit(
            "this process may run on one core only: two ranks cannot be compared with one"
        )
    folder = Path(tempfile.mkdtemp(prefix="bench_scale_"))
    try:
        model, tars = make_inputs(folder, n_documents)
        print_machine()
        start_up = {
            ranks: run(folder, model, tars, cores[:ranks], ROWS)["cpu_s"] for ranks in (1, 2)
        }
        runs: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for _ in range(rounds):
            for ranks in (1, 2):
                found = run(folder, model, tars, cores[:ranks], n_documents)
                found["cpu_s"] -= start_up[ranks] * (1 - ROWS / n_documents)
                found["share"] = found["cpu_s"] / found["wall_s"] / ranks
                runs[ranks].append(found)
        return report(runs, n_documents)
    finally:
        shutil.rmtree(folder)


def report(runs: dict[int, list[dict[str, float]]], n_documents: int) -> dict[str, float]:
    """The table, and the ratios."""
    rates = {}
    print(f"{n_documents} documents, medians of {len(runs[1])} rounds")
    print("ranks   wall s   documents/s   CPU s   documents/CPU s   share of a core")
    for ranks, found in runs.items():
        wall, cpu, share = (
            statistics.median(f[name] for f in found) for name in ("wall_s", "cpu_s", "share")
        )
        rates[ranks] = n_documents / wall, n_documents / cpu, share
        print(
            f"{ranks:5}  {wall:7.2f}  {rates[ranks][0]:12.1f}  {cpu:6.2f}  {rates[ranks][1]:16.1f} "
            f" {share:16.2f}"
        )
    ratios = {
        "wall": rates[2][0] / rates[1][0],
        "cpu": 2 * rates[2][1] / rates[1][1],
        "share": min(rates[1][2], rates[2][2]),
    }
    judged = "wall" if ratios["share"] >= MIN_SHARE else "cpu"
    print(
        f"two ranks over one: {ratios['wall']:.2f} by the wall clock, {ratios['cpu']:.2f} by CPU "
        f"seconds (twice the documents per CPU second over one rank's); judged by: {judged}"
    )
    return ratios


def make_inputs(folder: Path, n_documents: int) -> tuple[Path, Path]:
    """A small GPT-2 and real text of mixed lengths, as tars."""
    from documents import make_documents, make_model, make_tars

    documents = make_documents(folder, n_documents)
    model = make_model(folder / "model", "small", folder / "tokenizer")
    return model, make_tars(documents, folder / "tars", n_documents)


def run(
    folder: Path, model: Path, tars: Path, cores: list[int], n_documents: int
) -> dict[str, float]:
    """One job on these cores.

    Its wall seconds of computing and the CPU seconds of its processes.
    """
    output = folder / "out"
    numbers = " ".join(map(str, cores))
    pinned = f'cores=({numbers}); exec taskset -c ${{cores[$LOCAL_RANK]}} "$@"'
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={len(cores)}",
        "--no-python",
        "bash",
        "-c",
        pinned,
        "rank",
        sys.executable,
        "-m",
        "gradproj.run",
        "--shards",
        str(tars),
        "--model",
        str(model),
        "--output_dir",
        str(output),
        "--device",
        "cpu",
        "--rows_per_shard",
        str(ROWS),
        "--max_samples",
        str(n_documents),
    ]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=folder)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    timing = json.loads((output / "projection_stats.json").read_text())["timing"]
    shutil.rmtree(output)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu_s": cpu_s, "wall_s": timing["wall_seconds"]}


if __name__ == "__main__":
    main()
