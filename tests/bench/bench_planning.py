"""Cost of starting a job on a corpus of the Pile's size: 210,607,728 documents, 51,418 units.

    python tests/bench/bench_planning.py [--tars 26000] [--quick] [--folder DIR]

The tars are files without content of the right sizes, and the index is what `python -m gradproj
index` would have made of them: the offset and the keys' checksum of every 64th document. Each line
is a process of its own that does what the job does at its start, with wall and CPU seconds and the
peak of its resident memory, in all and above what the imports of the same modules take:

- every rank: reads the frozen index of the output, counts what is left, finds a unit's documents;
- rank 0: lists and checks the tars, checks every flag and plans (``make_plan``), then makes the
output (``make_output``): index, store and records' folders.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from base64 import b64encode
from pathlib import Path

import numpy as np
from measure import print_machine

N_DOCUMENTS = 210_607_728
"""Of the Pile's training set."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tars", type=int, default=26_000)
    parser.add_argument("--quick", action="store_true", help="a tenth of the documents and tars")
    parser.add_argument("--folder", help="where to make the corpus (default: a temporary folder)")
    parser.add_argument("--step", choices=sorted(STEPS), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        print(json.dumps(measured(args.step, Path(args.folder))))
    else:
        scale = 10 if args.quick else 1
        measure(N_DOCUMENTS // scale, args.tars // scale, args.folder)


def measure(
    n_documents: int, n_tars: int, parent: str | None = None
) -> dict[str, dict[str, float]]:
    """Step -> seconds and bytes."""
    folder = Path(tempfile.mkdtemp(prefix="bench_planning_", dir=parent))
    try:
        print_machine("msgspec")
        make_corpus(folder, n_documents, n_tars)
        size = (folder / "tars" / "corpus.json").stat().st_size
        print(f"{n_documents:,} documents in {n_tars:,} tars, an index of {size / 1e6:.0f} MB")
        print(f"{'':28} wall s   CPU s   peak MB   above the imports MB")
        found = {}
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, "--folder", str(folder)]
            found[step] = now = json.loads(
                subprocess.check_output(command, env=ENVIRONMENT).splitlines()[-1]
            )
            print(
                f"{step:28} {now['wall_s']:6.2f}  {now['cpu_s']:6.2f}  "
                f"{now['peak_bytes'] / 1e6:8.0f}  {now['above_bytes'] / 1e6:8.0f}",
                flush=True,
            )
        return found
    finally:
        shutil.rmtree(folder)


ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


def make_corpus(folder: Path, n_documents: int, n_tars: int) -> None:
    """Sparse tars, their index, and a small model."""
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from helpers.models import make_model

    from gradproj.corpus.index import Tar, make_index
    from gradproj.corpus.index_file import save_index
    from gradproj.corpus.tar.scan import SAMPLES_PER_BLOCK

    make_model(folder / "model")
    (folder / "tars").mkdir()
    generator = np.random.default_rng(0)
    domains = [f"Domain {i}" for i in range(22)]
    tars, start = [], 0
    for number in range(n_tars):
        n = n_documents // n_tars + (number < n_documents % n_tars)
        offsets = (
            np.cumsum(generator.integers(2**14, 2**20, -(-n // SAMPLES_PER_BLOCK))) // 512 * 512
        )
        path = folder / "tars" / f"pile-{number:06d}.tar"
        with open(path, "wb") as file:
            file.truncate(int(offsets[-1]) + 2**20)
        stat = path.stat()
        counts = generator.multinomial(n, np.full(len(domains), 1 / len(domains))).tolist()
        tars.append(
            Tar(
                path.name,
                path,
                stat.st_size,
                stat.st_mtime_ns,
                n,
                start,
                generator.bytes(16).hex(),
                dict(zip(domains, counts, strict=True)),
                12,
                10**6,
                b64encode(offsets.astype("<i8").tobytes()).decode(),
                b64encode(generator.bytes(4 * len(offsets))).decode(),
            )
        )
        start += n
    save_index(make_index(tuple(tars), "meta.pile_set_name"), folder / "tars" / "corpus.json")


def measured(step: str, folder: Path) -> dict[str, float]:
    """One step in this process.

    Seconds, peak resident memory, and how much of it is the imports'.
    """
    from gradproj.job.startup import make_output  # noqa: F401  (what a rank has imported by then)

    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = _status("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    STEPS[step](folder)
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_bytes": _status("VmHWM"),
        "above_bytes": _status("VmHWM") - before,
    }


def _status(field: str) -> int:
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])


def nothing(folder: Path) -> None:
    """The imports alone."""


def rank_0(folder: Path) -> None:
    """Every check, the plan, and an empty output."""
    from gradproj.coordinator.process_id import Owner
    from gradproj.job.config import run_config
    from gradproj.job.plan import make_plan
    from gradproj.job.sizes import free_bytes
    from gradproj.job.startup import make_output

    flags = [
        "--shards",
        folder / "tars",
        "--model",
        folder / "model",
        "--output_dir",
        folder / "out",
    ]
    width = [
        "--proj_rank_total",
        1,
        "--proj_rank_min",
        1,
    ]  # a store of the Pile needs terabytes that may not be free
    plan = make_plan(run_config([*map(str, [*flags, *width])], "bench"))
    assert plan.layout.n_units > 0
    assert free_bytes(plan.output)
    make_output(plan, Owner.this_process("bench", 0, 0))


def every_rank(folder: Path) -> None:
    """The index, what is left, and where a unit's documents lie."""
    from gradproj.corpus.index_file import load_index
    from gradproj.job.plan import INDEX_NAME
    from gradproj.maintenance.job_output import read_output

    index = load_index(folder / "out" / INDEX_NAME)
    output = read_output(folder / "out")
    unit = int(output.missing[len(output.missing) // 2])
    spans = list(index.spans(*output.layout.unit_range(unit)))
    assert sum(stop - first for _, first, stop in spans) == output.layout.rows_per_shard


STEPS = {"imports alone": nothing, "rank 0": rank_0, "every rank": every_rank}


if __name__ == "__main__":
    main()
