"""Speed of queries: gradproj's ``top_k`` beside the limits of the machine, FAISS and bergson.

    python tests/bench/bench_query.py [--quick] [--proj_dtype float16 ...] [--folder DIR] [--ranks]

Rows of GPT-2-small (48 layers x 256 values), in the system's cache; 1, 16 and 256 queries, the 20
best of each. All sides have one thread and take turns; each number is a median. What is timed:

- conversion: the stored rows, already in this process's memory, to float32 and nothing else: into a
buffer that stays in the cache, the fastest that torch can (into memory it takes longer). Float32
  rows need none: their copy.
- GEMM: ``queries @ rows.T`` in float32 by torch, the rows in this process's memory as float32; no
top k.
- GEMM, oneDNN: the same by the library that gradproj takes for it.
- gradproj: ``top_k`` on the store, every file opened again. kfac has its preconditioner; ``fit
kfac`` is what that took.
- FAISS: ``IndexFlatIP.search``; its rows are in its memory as float32, which is not timed.
- bergson: what its ``query`` asks, ``Attributor.search``, on an index in its own format and of the
same rows; opening it reads all rows into memory as float32. (``bergson score`` computes the
  documents' gradients again.)

FAISS and bergson run in bergson's environment (see ``bench_bergson.py``), where this script
installs faiss-cpu. Checked: all sides find the same documents. ``--ranks``: two processes that
answer together beside one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import bench_bergson
import numpy as np
import torch
from bench_store import WIDTH, Sides
from measure import print_machine

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, top_k
from gradproj.analysis.row_blocks import as_tensor
from gradproj.store.encoding import decode_rows
from gradproj.store.writer import update_attributes, write_array

K = 20
QUERIES = (1, 16, 256)
SCORES = ("dot", "kfac", "cosine", "relatif")
LIMIT, GEMM, ONEDNN = "conversion", "GEMM", "GEMM, oneDNN"
WORKER = Path(__file__).with_name("query_worker.py")

Seconds = dict[str, list[tuple[float, float]]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="an eighth of the rows, 3 rounds instead of 7"
    )
    parser.add_argument(
        "--proj_dtype",
        nargs="+",
        default=["float16", "bfloat16", "float32"],
        choices=["float16", "bfloat16", "float32"],
    )
    parser.add_argument("--folder", help="where to write (default: the system's temporary folder)")
    parser.add_argument(
        "--ranks", action="store_true", help="two processes beside one, and nothing else"
    )
    args = parser.parse_args()
    if args.ranks:
        measure_ranks(args.quick, args.folder)
        return
    for proj_dtype in args.proj_dtype:
        measure(args.quick, proj_dtype, args.folder)


def measure(
    quick: bool = False, proj_dtype: str = "float16", parent: str | None = None, others: bool = True
) -> dict[str, float]:
    """Speed of gradproj over each other side in CPU seconds, ``SCORE Q=n / SIDE``."""
    torch.set_num_threads(1)
    ratios: dict[str, float] = {}
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="bench_query_", dir=parent))
        )
        bench = Bench(folder, proj_dtype, 1_024 if quick else 8_192)
        tools = bench.start_others(stack) if others else {}
        print_machine("numpy")
        print(
            f"{len(bench.sides.stored)} x {bench.sides.layout.dim} {proj_dtype}, "
            f"{bench.stored_bytes / 1e9:.2f} GB in {folder.parent}; fit kfac: "
            f"{bench.fit_seconds:.3f} CPU s"
        )
        for n_queries in QUERIES:
            times = in_turn(bench.works(n_queries, tools), 3 if quick else 7)
            print_speeds(f"\n{n_queries} queries", times, bench.stored_bytes)
            medians = {
                name: statistics.median(cpu for cpu, _ in runs) for name, runs in times.items()
            }
            for score in SCORES:
                for name, seconds in medians.items():
                    if not name.startswith("gradproj"):
                        ratio = seconds / medians[f"gradproj {score}"]
                        ratios[f"{score} Q={n_queries} / {name}"] = ratio
        for name, tool in tools.items():
            print(f"{name}: peak memory {tool.peak_bytes / 1e9:.2f} GB, {tool.versions}")
    return ratios


def in_turn(works: dict[str, Callable[[], tuple[float, float]]], rounds: int) -> Seconds:
    """CPU and wall seconds of every side, in turn, after a round that is not counted."""
    times: Seconds = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = work()
            if number:
                times[name].append(seconds)
    return times


def print_speeds(title: str, times: Seconds, n_bytes: int) -> None:
    cpu, wall = (
        {name: statistics.median(run[clock] for run in runs) for name, runs in times.items()}
        for clock in (0, 1)
    )
    print(f"{title:26} CPU s   least    most  wall s  stored GB/CPU s  / {LIMIT}  / {GEMM}")
    for name, runs in times.items():
        least, most = min(runs)[0], max(runs)[0]
        print(
            f"{name:26}{cpu[name]:6.4f}  {least:6.4f}  {most:6.4f}  {wall[name]:6.4f}"
            f"  {n_bytes / cpu[name] / 1e9:15.2f}  {cpu[LIMIT] / cpu[name]:12.2f}  "
            f"{cpu[GEMM] / cpu[name]:6.2f}",
            flush=True,
        )


def here(work: Callable[[], object]) -> Callable[[], tuple[float, float]]:
    """CPU and wall seconds of something that this process does."""

    def timed() -> tuple[float, float]:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return time.process_time() - cpu, time.perf_counter() - wall

    return timed


class Bench:
    """One store's rows as every side wants them, and the work of each."""

    def __init__(self, folder: Path, proj_dtype: str, n_rows: int) -> None:
        self.folder, self.proj_dtype = folder, proj_dtype
        self.sides = Sides(folder, proj_dtype, n_rows)
        self.sides.write_ours()
        add_covariances(folder / "gradproj" / "projections.zarr", 48)
        self.store = self.sides.open_store()
        self.stored_bytes = self.sides.stored.nbytes
        self.rows = torch.from_numpy(
            decode_rows(self.sides.stored, self.sides.row_scale, proj_dtype)
        )
        started = time.process_time()
        self.kfac = Preconditioner.fit(self.store)
        self.fit_seconds = time.process_time() - started
        generator = np.random.default_rng(5)
        self.queries = {
            n: generator.standard_normal((n, self.store.dim), np.float32) for n in QUERIES
        }

    def works(
        self, n_queries: int, tools: dict[str, "Tool"]
    ) -> dict[str, Callable[[], tuple[float, float]]]:
        """Side -> what it does, timed."""
        q = torch.from_numpy(self.queries[n_queries])
        found = self._ask("dot", n_queries)
        works: dict[str, Callable[[], tuple[float, float]]] = {LIMIT: here(self._convert)}
        works[GEMM] = here(lambda: q @ self.rows.T)
        works[ONEDNN] = here(
            lambda: torch.ops.mkldnn._linear_pointwise(self.rows, q, None, "none", [], "")
        )
        for score in SCORES:
            works[f"gradproj {score}"] = here(lambda score=score: self._ask(score, n_queries))
        for name, tool in tools.items():
            works[name] = lambda tool=tool, name=name: tool.ask(name, n_queries, found)
        return works

    def _ask(self, score: str, n_queries: int) -> np.ndarray:
        self.store.close()  # the files are opened again
        given = {"preconditioner": self.kfac} if score in ("kfac", "relatif") else {}
        return np.asarray(top_k(self.queries[n_queries], self.store, K, score=score, **given).ids)

    def _convert(self) -> None:
        stored = as_tensor(self.sides.stored, self.proj_dtype).view(-1, 512 * WIDTH)
        tile = torch.empty(512 * WIDTH)
        for values in stored:
            tile.copy_(values)

    def start_others(self, stack: ExitStack) -> dict[str, "Tool"]:
        """FAISS and bergson, each in its own process; none where they cannot be installed."""
        if not install(bench_bergson.CACHE):
            print("without FAISS and bergson: no registry is reachable")
            return {}
        dtype = "float32" if self.proj_dtype == "float32" else self.proj_dtype
        about = {"shape": list(self.rows.shape), "dtype": dtype, "width": WIDTH}
        about["layers"] = [layer.name for layer in self.store.layers]
        (self.folder / "rows.json").write_text(json.dumps(about))
        for first in range(0, len(self.rows), 512):
            block = self.rows[first : first + 512].to(getattr(torch, dtype))
            with (self.folder / "rows").open("ab") as file:
                file.write(
                    block.view(torch.int16 if block.element_size() == 2 else torch.int32)
                    .numpy()
                    .tobytes()
                )
        for n, queries in self.queries.items():
            np.save(self.folder / f"queries-{n}.npy", queries)
        bergson = stack.enter_context(started("bergson", self.folder))
        faiss = (
            None
            if self.proj_dtype == "bfloat16"
            else stack.enter_context(started("faiss", self.folder))
        )
        tools = {"bergson": bergson, "bergson, opened": bergson}
        return tools if faiss is None else {"FAISS, opened": faiss, **tools}


class Tool:
    """Another process that is asked the same."""

    def __init__(self, process: subprocess.Popen) -> None:
        self._process, self.peak_bytes = process, 0
        self.versions = json.loads(process.stdout.readline())["versions"]

    def ask(self, name: str, n_queries: int, expected: np.ndarray) -> tuple[float, float]:
        what = "search" if name.endswith("opened") else "open"
        self._process.stdin.write(json.dumps([what, n_queries, K]) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        # float16 without a row's own scale rounds the smallest values: neighbours may change
        # places.
        assert np.mean(np.array(answer["ids"]) == expected) > 0.97, name
        self.peak_bytes = answer["peak_bytes"]
        return answer["cpu"], answer["wall"]


@contextmanager
def started(tool: str, folder: Path) -> Iterator[Tool]:
    command = [str(bench_bergson.CACHE / "bin" / "python"), str(WORKER), tool, str(folder)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**bench_bergson.ENVIRONMENT, "OPENBLAS_NUM_THREADS": "1"},
    )
    try:
        yield Tool(process)
    finally:
        process.stdin.close()
        process.wait()


def install(env: Path) -> bool:
    """FAISS beside bergson; whether both are there."""
    if not bench_bergson.install(env):
        return False
    if any(env.glob("lib/python*/site-packages/faiss")):
        return True
    command = [
        str(env / "bin" / "python"),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--retries",
        "1",
        "faiss-cpu",
    ]
    return subprocess.run(command, capture_output=True).returncode == 0


def add_covariances(store_path: Path, n_layers: int) -> None:
    """Token covariances, as a job sums them, of 16 x 16 layers."""
    tokens = np.random.default_rng(9).standard_normal((n_layers, 400, 16))
    summed = np.einsum("lti,ltj->lij", tokens, tokens).ravel()
    for side in "as":
        write_array(store_path, f"token_covariance_{side}", summed)
    update_attributes(store_path, {"covariance_tokens": 400})


# --- ranks ---


def rank_of_several(rank: int, world_size: int, folder: str, rounds: int) -> None:
    """Ask together, ``rounds`` times; every rank writes its wall and CPU seconds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", f"file://{folder}/meeting-{world_size}", rank=rank, world_size=world_size
    )
    seconds = []
    with ProjectionStore(Path(folder) / "gradproj") as store:
        queries = np.load(Path(folder) / "queries.npy")
        for _ in range(rounds + 1):
            torch.distributed.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            top_k(queries, store, K, score="dot", together=True)
            seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    (Path(folder) / f"seconds-{world_size}-{rank}.json").write_text(json.dumps(seconds[1:]))
    torch.distributed.destroy_process_group()


def measure_ranks(quick: bool = False, parent: str | None = None) -> dict[str, float]:
    """Return the speed-up of two processes over one, by the wall clock and by the slower one's
    CPU seconds.

    On a machine with other work the wall clock says how many processes share it; the CPU seconds
    how they share the scan.
    """
    with tempfile.TemporaryDirectory(prefix="bench_query_", dir=parent) as name:
        folder = Path(name)
        sides = Sides(folder, "float16", 1_024 if quick else 16_384)
        sides.write_ours()
        np.save(
            folder / "queries.npy", np.random.default_rng(5).standard_normal((16, sides.layout.dim))
        )
        del sides
        seconds: dict[int, list[tuple[float, float]]] = {1: [], 2: []}
        for _ in range(2 if quick else 4):
            for world_size, several in seconds.items():
                (folder / f"meeting-{world_size}").unlink(missing_ok=True)
                torch.multiprocessing.spawn(
                    rank_of_several, (world_size, name, 5), nprocs=world_size
                )
                ranks = [folder / f"seconds-{world_size}-{rank}.json" for rank in range(world_size)]
                of_ranks = np.array([json.loads(path.read_text()) for path in ranks])
                several += of_ranks.max(
                    axis=0
                ).tolist()  # an answer is there when the last rank has it
    one, two = (np.median(several, axis=0) for several in seconds.values())
    for number, clock in enumerate(("wall", "CPU")):
        print(
            f"16 queries, {clock} s: one process {one[number]:.3f}, two together {two[number]:.3f} "
            "each",
            end=", ",
        )
        print(f"{one[number] / two[number]:.2f} x")
    return {"wall": float(one[0] / two[0]), "cpu": float(one[1] / two[1])}


if __name__ == "__main__":
    sys.exit(main())
