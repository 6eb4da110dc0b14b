"""The server: its answer over the bare scan, and many clients at once.

    python tests/bench/bench_serve.py                  # a store of --gb, interleaved rounds
    python tests/bench/bench_serve.py clients OUTPUT   # 32 clients of `gradproj serve OUTPUT`

The first compares the time from a question's body to its answer with that of the ranking alone, of
the same row: that of the model is not in it. The second starts the command, asks for --seconds, and
prints errors, the median and the 95th percentile, and the server's memory at a quarter and at the
end.
"""

import argparse
import http.client
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.bench_large_store import write_store
from bench.measure import Variant, interleave, print_table
from helpers.asgi import Client

from gradproj.analysis import Preconditioner, top_and_bottom
from gradproj.cli.serve.explorer import OutputExplorer
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import Query, QueryRows
from gradproj.serve.app import Access, Server
from gradproj.serve.scans import ScanQueue
from gradproj.store import ProjectionStore
from gradproj.store.writer import update_attributes

TEXTS = ["the of and to in", "it was for on are", "as with his they", "at be this from"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="?", default="scan", choices=("scan", "clients"))
    parser.add_argument("output", nargs="?", help="of clients: an output whose model is there")
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--token_clients", type=int, default=0, help="of these, with --tokens")
    parser.add_argument("--seconds", type=float, default=120)
    args = parser.parse_args()
    if args.what == "clients":
        many_clients(args.output, args.clients, args.token_clients, args.seconds)
    else:
        with tempfile.TemporaryDirectory() as folder:
            over_the_scan(Path(folder), args.gb, args.rounds)


class OneRow:
    """In place of the model: a question's row, which takes no time."""

    def __init__(self, row: np.ndarray) -> None:
        self._row = row

    def rows(self, queries: Sequence[Query]) -> QueryRows:
        names = [query.name for query in queries]
        return QueryRows(names, self._row, np.array([5]), np.array([1.0]), [""])


def over_the_scan(folder: Path, gb: float, rounds: int) -> None:
    n_bytes = write_store(folder, gb)
    path = folder / "projections.zarr"
    update_attributes(path, {"wanted_units": [], "identity_hash": "none"})
    explorer = OutputExplorer(RecordedRunArgs(output=str(folder), device="cpu"), "bench", 10**6)
    client = Client(Server([explorer], ScanQueue(1, 8, 3600)).app(Access()))
    with ProjectionStore(folder) as store:
        row = store.rows([0])
        explorer.session.projector = lambda config, store: OneRow(row)  # type: ignore
        print(f"{len(store):,} rows, {n_bytes / 1e9:.1f} GB, kfac, one query", flush=True)
        curvature = Preconditioner.fit(store, "kfac").ready()

        def scan() -> None:
            top_and_bottom(row, store, 20, 20, score="kfac", preconditioner=curvature)

        def answered() -> None:
            last = client.events("/api/query", {"text": TEXTS[0], "score": "kfac"})[-1]
            assert last["event"] == "answer", last

        variants = {"bare scan": Variant(scan), "answer": Variant(answered)}
        print_table(interleave(variants, rounds, time.perf_counter), ["bare scan"])


def many_clients(output: str, n_clients: int, n_token_clients: int, seconds: float) -> None:
    command = [sys.executable, "-m", "gradproj", "serve", output, "--device", "cpu", "--port", "0"]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ)
    )
    assert server.stdout is not None
    assert server.stderr is not None
    try:
        line = server.stdout.readline()
        port = int(re.search(r":(\d+)/", line)[1])  # type: ignore[index]
        while "is loaded" not in server.stderr.readline():
            pass
        threading.Thread(target=server.stderr.read, daemon=True).start()
        started = time.perf_counter()
        ask(port, 0, False)
        print(f"first answer after the start: {time.perf_counter() - started:.3f} s")
        times: dict[bool, list[float]] = {False: [], True: []}
        errors, memory = [], []
        end = time.monotonic() + seconds

        def visit(number: int) -> None:
            with_tokens = number < n_token_clients
            while time.monotonic() < end:
                started = time.perf_counter()
                try:
                    ask(port, number, with_tokens)
                except Exception as error:
                    errors.append(repr(error))
                else:
                    times[with_tokens].append(time.perf_counter() - started)

        threads = [threading.Thread(target=visit, args=(n,)) for n in range(n_clients)]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            memory.append(resident(server.pid))
            time.sleep(seconds / 40)
        for thread in threads:
            thread.join()
        quarter = memory[len(memory) // 4]
        print(f"{len(errors)} errors {sorted(set(errors))[:3]}")
        for with_tokens, found in times.items():
            found.sort()
            if found:
                middle, late = found[len(found) // 2], found[int(0.95 * len(found))]
                print(f"{len(found):,} answers {'with tokens' if with_tokens else 'of scores'}: "
                      f"median {middle:.2f} s, p95 {late:.2f} s")  # fmt: skip
        print(f"memory {quarter:.0f} MB at a quarter, {memory[-1]:.0f} MB at the end")
    finally:
        server.kill()
        server.wait()


def ask(port: int, number: int, with_tokens: bool) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    question = {"text": TEXTS[number % len(TEXTS)], "top_k": 10, "show_text": True}
    body = json.dumps({**question, "tokens": with_tokens})
    connection.request("POST", "/api/query", body, {"content-type": "application/json"})
    response = connection.getresponse()
    lines = response.read().splitlines()
    last = json.loads(lines[-1])
    assert (response.status, last["event"]) == (200, "answer"), last
    connection.close()


def resident(pid: int) -> float:
    """Return a process's resident memory without mapped files, in MB."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]


if __name__ == "__main__":
    main()
