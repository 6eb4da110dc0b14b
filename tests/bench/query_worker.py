"""The other side of ``bench_query.py``, in the environment where bergson and FAISS are installed.

    python query_worker.py bergson|faiss FOLDER

``FOLDER`` has ``rows`` (raw, of ``rows.json``'s shape and type) and ``queries-Q.npy``. Every line
on standard input is ``[WHAT, Q, K]``; the answer is one line, ``{"cpu": s, "wall": s, "ids":
[[...]], "peak_bytes": n}``. ``open`` makes what ``search`` is asked of and drops it; ``search``
keeps it.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np


def main() -> None:
    tool, folder = sys.argv[1], Path(sys.argv[2])
    answers, sys.stdout = sys.stdout, sys.stderr  # the tools print, too
    side = {"bergson": Bergson, "faiss": Faiss}[tool](folder)
    print(json.dumps({"versions": side.versions}), file=answers, flush=True)
    for line in sys.stdin:
        what, n_queries, k = json.loads(line)
        queries = np.load(folder / f"queries-{n_queries}.npy")
        work = side.open_and_search if what == "open" else side.search
        if what == "search" and side.opened is None:
            side.opened = side.open()
        answer = timed(lambda work=work, q=queries, k=k: work(q, k))
        print(json.dumps(answer), file=answers, flush=True)


def timed(work: Callable[[], np.ndarray]) -> dict:
    cpu, wall = time.process_time(), time.perf_counter()
    ids = work()
    found = {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "ids": ids.tolist(),
    }
    return {**found, "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def read_rows(folder: Path) -> np.ndarray:
    about = json.loads((folder / "rows.json").read_text())
    return np.memmap(folder / "rows", np.dtype(about["dtype"]), "r", shape=tuple(about["shape"]))


class Bergson:
    """``bergson.Attributor``, which its ``query`` command asks, on an index of its own format."""

    def __init__(self, folder: Path) -> None:
        from importlib.metadata import version

        import ml_dtypes  # noqa: F401 (numpy knows bfloat16 by it)
        import torch
        from bergson.data import create_index
        from bergson.gradients import GradientProcessor

        torch.set_num_threads(1)
        self.versions = f"bergson {version('bergson')}, torch {version('torch')}"
        self.opened, self._index = None, folder / "bergson"
        rows, about = read_rows(folder), json.loads((folder / "rows.json").read_text())
        self._sizes = {name: about["width"] for name in about["layers"]}
        create_index(self._index, len(rows), self._sizes, rows.dtype)[...] = rows
        GradientProcessor(projection_dim=16).save(self._index)

    def open(self) -> object:
        from bergson import Attributor

        return Attributor(self._index)

    def open_and_search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self._search(self.open(), queries, k)

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self._search(self.opened, queries, k)

    def _search(self, attributor: object, queries: np.ndarray, k: int) -> np.ndarray:
        import torch

        parts = torch.from_numpy(queries).split(list(self._sizes.values()), dim=1)
        return attributor.search(dict(zip(self._sizes, parts, strict=True)), k).indices.numpy()


class Faiss:
    """``IndexFlatIP``, which holds its rows in memory in float32."""

    def __init__(self, folder: Path) -> None:
        import faiss

        faiss.omp_set_num_threads(1)
        self.versions, self.opened, self._folder = f"faiss {faiss.__version__}", None, folder

    def open(self) -> object:
        import faiss

        rows = read_rows(self._folder)
        index = faiss.IndexFlatIP(rows.shape[1])
        for first in range(0, len(rows), 512):
            index.add(np.ascontiguousarray(rows[first : first + 512], np.float32))
        return index

    def open_and_search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.open().search(queries, k)[1]

    def search(self, queries: np.ndarray, k: int) -> np.ndarray:
        return self.opened.search(queries, k)[1]


if __name__ == "__main__":
    main()
