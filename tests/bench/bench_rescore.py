"""Does a second stage give the exact answer: rescored top 20 against exact EK-FAC of all documents.

    python tests/bench/bench_rescore.py [--output_dir DIR] [--by ekfac] [--top 20]

The corpus and the model are those of ``bench_lds.py`` (1,024 documents of 128 tokens of Python's
standard library, a GPT-2 pretrained and trained on them); the queries are its 64 held-out documents
and the originals of its near-copies. Every document is scored with whole gradients, so that the N
best of each first stage can be compared with the exact answer: the share of the exact top among the
top of the rescored N, and how often the exact first is first. Called again on its folder, it goes
on.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from bench_lds import WHOLE
from measure import print_machine

from gradproj import ProjectionStore
from gradproj.__main__ import main as gradproj
from gradproj.analysis import score
from gradproj.curvature.layer_curvature import KINDS
from gradproj.curvature.rescore import exact_scores
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment, make_experiment
from gradproj.evaluation.retraining import train_base
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.model.sequences import TokenSequence
from gradproj.query import Query, QueryProjector
from gradproj.text.scores import QueryText, text_scores

CANDIDATES = (20, 50, 100, 200)
DENSE = ["--encoding", "dense", "--basis", "random"]
STORES = {
    "64 x 64 signs": ["--encoding", "signs", "--basis", "eigen", "--proj_rank_total", "4096"],
    "64 x 64 fp16": [*DENSE, "--proj_rank_total", "4096"],
    "16 x 16 fp16": [*DENSE, "--proj_rank_total", "256"],
}
"""First stage -> flags of its job. All are scanned by kfac."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output_dir", type=Path, default=Path(tempfile.gettempdir()) / "gradproj-rescore"
    )
    parser.add_argument("--by", choices=KINDS, default="ekfac")
    parser.add_argument("--top", type=int, default=20)
    args = parser.parse_args()
    print_machine("numpy")
    measure(args.output_dir, args.by, args.top)


def measure(folder: Path, by: str, top: int) -> dict[str, dict[int, float]]:
    """Print the table; return first stage -> N -> share of the exact top."""
    folder.mkdir(parents=True, exist_ok=True)
    tars, lds = folder / "tars", folder / "lds"
    if not tars.is_dir() and not (lds / "tokens.npz").is_file():
        assert gradproj(["prepare", "stdlib:", "--output_dir", str(tars)]) == 0
    lds.mkdir(exist_ok=True)
    config = LdsConfig(shards=str(tars), output_dir=str(lds), **WHOLE)
    experiment = make_experiment(config)
    model = train_base(config, experiment)
    outputs = {name: make_store(folder, experiment, model, name) for name in STORES}
    exact = scores_of_all(outputs["16 x 16 fp16"], experiment.queries, by)
    first = {name: scan_scores(path, experiment.queries) for name, path in outputs.items()}
    first["shared text"] = text_scores(
        [QueryText(ids) for ids in experiment.queries], list(experiment.documents)
    )
    return print_agreement(first, exact, by, top)


def make_store(folder: Path, experiment: Experiment, model: Path, name: str) -> Path:
    """Return the output of the documents' job."""
    output = folder / name.replace(" ", "")
    length = str(experiment.documents.shape[1])
    flags = ["--shards", experiment.document_tars, "--model", model, "--output_dir", output]
    flags += ["--max_length", length, "--device", "cpu", "--loss_reduction", "sum", *STORES[name]]
    command = [sys.executable, "-m", "gradproj.run", *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return output


def scan_scores(output: Path, queries: np.ndarray) -> np.ndarray:
    """Return the first stage's scores by kfac, ``(Q, N)``."""
    asked = [Query.of(str(n), input_ids=ids.tolist()) for n, ids in enumerate(queries)]
    with ProjectionStore(output) as store:
        rows = QueryProjector(store, device="cpu").rows(asked).rows
        return np.asarray(score(rows, store, score="kfac"))


def scores_of_all(output: Path, queries: np.ndarray, by: str) -> np.ndarray:
    """Return the second stage's scores of every document, ``(Q, N)``."""
    assert gradproj(["curvature", str(output), "--device", "cpu"]) == 0
    asked = [TokenSequence.of(ids, owner=n) for n, ids in enumerate(queries)]
    result = exact_scores(RecordedRunArgs(output=str(output), device="cpu"), asked, kind=by)
    print(f"exact {by}, {result.scores.shape} queries and documents: {result.seconds:.0f} s")
    return result.scores


def print_agreement(
    first: dict[str, np.ndarray], exact: np.ndarray, by: str, top: int
) -> dict[str, dict[int, float]]:
    """Compare the exact top with the top of the rescored candidates of each first stage."""
    best = np.argsort(-exact, axis=1, kind="stable")[:, :top]
    heads = "".join(f"{f'N = {n}':>18}" for n in CANDIDATES)
    print(f"\nexact {by} top {top}: share found, +- over queries; first is the exact first")
    print(f"{'first stage':<28}{'alone':>12}{heads}")
    lists = {name: np.argsort(-scores, axis=1, kind="stable") for name, scores in first.items()}
    names = [*first, *(f"{name} + text" for name in STORES)]
    found: dict[str, dict[int, float]] = {}
    for name in names:
        order = [lists[name.removesuffix(" + text")]]
        order += [lists["shared text"]] if name.endswith(" + text") else []
        # With both, half of the N candidates come from each.
        alone = _share(best, order[0][:, :top]).mean() if len(order) == 1 else np.nan
        line = f"{name:<28}{alone:>12.3f}"
        for n in CANDIDATES:
            parts = [each[:, : n // len(order)] for each in order]
            candidates = [np.unique(np.concatenate(of)) for of in zip(*parts, strict=True)]
            rescored = [
                ids[np.argsort(-scores[ids], kind="stable")][:top]
                for ids, scores in zip(candidates, exact, strict=True)
            ]
            share = _share(best, rescored)
            first_found = np.mean([a[0] == b[0] for a, b in zip(best, rescored, strict=True)])
            error = share.std(ddof=1) / np.sqrt(len(share))
            found.setdefault(name, {})[n] = float(share.mean())
            line += f"{share.mean():>8.3f}+-{error:.3f}{first_found:>5.2f}"
        print(line, flush=True)
    return found


def _share(best: np.ndarray, others: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """Return, for each query, the share of its best that are among others, ``(Q,)``."""
    return np.array([np.isin(a, b).mean() for a, b in zip(best, others, strict=True)])


if __name__ == "__main__":
    main()
