"""Does a model trained on what ``select`` picks for a held-out domain do better there?

    python tests/bench/bench_select.py FOLDER --shards TARS --targets asyncio,email [--seeds 5]

Documents are windows of 128 tokens. No file of a target domain is in the pretraining or in the
pool; half of its files give the queries, the others the test, and half of the pool's windows may be
picked, all drawn again for each seed. Every method picks 10 % of these for the queries; a small
GPT-2, pretrained on other files, is trained on them for 3 epochs. Printed: the loss on the test,
nats per token, less that after a random pick of the same seed, with the standard error over seeds.
FOLDER keeps every training's loss, so the same command resumes. ``gradproj select`` makes its picks
as a user would; bm25 adds up the scores of all queries.
"""

import argparse
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradproj.__main__ import main as gradproj
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.stream import read_documents
from gradproj.evaluation.baselines import bm25
from gradproj.evaluation.corpus import write_tars
from gradproj.evaluation.losses import load, query_losses
from gradproj.model.checkpoint import fetch
from gradproj.model.config import ModelConfig
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.training import TokenizerConfig, TrainConfig, train, train_tokenizer

LENGTH, VOCABULARY = 128, 2048
N_QUERIES, N_TEST, N_PER_FILE = 32, 96, 8
SHARE = 0.1
EPOCHS, BATCH = 3, 16
SELECT = {
    "select kfac": [],
    "select kfac, in turn": ["--round_robin"],
    "select kfac, diverse": ["--diverse", "--redundancy", "0.2"],
    "select relatif": ["--score", "relatif"],
    "select text": ["--score", "text"],
    "select kfac+text": ["--score", "kfac+text"],
}
METHODS = ["random", "bm25", *SELECT]


@dataclass(frozen=True)
class Window:
    """Tokens of a file."""

    ids: list[int]
    text: str
    domain: str
    file: int

    def payload(self) -> bytes:
        meta = {"pile_set_name": self.domain, "file": self.file}
        return json.dumps({"text": self.text, "input_ids": self.ids, "meta": meta}).encode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shards", required=True)
    parser.add_argument("--targets", required=True, help="names of domains, separated by commas")
    parser.add_argument("--also_held", default="", help="domains to hold out and not to measure")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", default=";".join(METHODS), help="separated by semicolons")
    parser.add_argument("--pool", type=int, default=4000, help="most windows of the pool")
    parser.add_argument("--pretrain", type=int, default=6000, help="most windows to pretrain on")
    parser.add_argument("--only_prepare", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    targets, methods = args.targets.split(","), args.methods.split(";")
    held = [*targets, *filter(None, args.also_held.split(","))]
    bench = Bench(args.folder, args.shards, held, args.pool, args.pretrain)
    bench.prepare()
    if args.only_prepare:
        return
    for seed in range(args.seeds):
        for target in targets:
            for method in methods:
                bench.loss_of(method, target, seed)
                print_table(bench, targets, methods, seed + 1)


class Bench:
    """Files of one corpus: windows, base model, store of the pool, losses."""

    def __init__(
        self, folder: Path, shards: str, targets: list[str], n_pool: int, n_pretrain: int
    ) -> None:
        self.folder, self.shards, self.targets = folder, shards, targets
        self.n_pool, self.n_pretrain = n_pool, n_pretrain
        folder.mkdir(parents=True, exist_ok=True)

    def prepare(self) -> None:
        """Cut windows, train tokenizer and base model, and write the store of the pool."""
        folder = self.folder
        if not (folder / "tokenizer" / "tokenizer.json").is_file():
            train_tokenizer(
                TokenizerConfig(
                    shards=self.shards,
                    output_dir=str(folder / "tokenizer"),
                    vocab_size=VOCABULARY,
                    max_samples=2000,
                )
            )
        self.held, self.pool, pretrain = self._windows()
        for name, windows in (("pool", self.pool), ("pretrain", pretrain)):
            if not (folder / name).is_dir():
                write_tars(folder / name, [window.payload() for window in windows])
        print(f"{len(self.pool):,} windows in the pool, {len(pretrain):,} to pretrain on")
        if not (folder / "base" / "model.safetensors").is_file():
            train(self._training(folder / "pretrain", folder / "base", None, 0, epochs=2))
        status = ["status", str(folder / "store")]
        if subprocess.run([sys.executable, "-m", "gradproj", *status]).returncode:
            job = [sys.executable, "-m", "gradproj.run", "--shards", str(folder / "pool")]
            job += ["--model", str(folder / "base"), "--output_dir", str(folder / "store")]
            subprocess.run([*job, "--device", "cpu", "--max_length", str(LENGTH)], check=True)

    def _windows(self) -> tuple[dict[str, list[Window]], list[Window], list[Window]]:
        """Return the targets' windows, the pool's and those of the pretraining, from other files.

        Files are in a shuffled order; of those that are no target's, two of three go to the pool.
        """
        files = self.folder / "tokenizer"
        model = ModelConfig(architecture="GPT2-Small", init="random", tokenizer=str(files))
        tokenizer: Any = load_tokenizer(fetch(model))
        index = open_corpus(self.shards)
        documents = list(read_documents(index, 0, index.n_samples))
        held: dict[str, list[Window]] = {name: [] for name in self.targets}
        pool: list[Window] = []
        pretrain: list[Window] = []
        for number in np.random.default_rng(0).permutation(len(documents)).tolist():
            document = documents[number]
            to, most = (pool, 2 * N_PER_FILE) if number % 3 else (pretrain, 4 * N_PER_FILE)
            if document.domain in held:
                to, most = held[document.domain], N_PER_FILE
            text = document.text[: 12 * LENGTH * most]
            ids = tokenizer(text, verbose=False).input_ids[: LENGTH * most]
            for start in range(0, len(ids) - LENGTH + 1, LENGTH):
                part = ids[start : start + LENGTH]
                to.append(Window(part, tokenizer.decode(part), document.domain, number))
        return held, pool[: self.n_pool], pretrain[: self.n_pretrain]

    def _training(
        self, tars: Path, to: Path, start: Path | None, seed: int, epochs: int = EPOCHS
    ) -> TrainConfig:
        steps = epochs * open_corpus(str(tars)).n_samples // BATCH
        shape = {"n_layer": 2, "n_embd": 128, "n_head": 4}
        begin: dict[str, Any] = shape if start is None else {"model": str(start)}
        return TrainConfig(
            shards=str(tars), result_dir=str(to), tokenizer=str(self.folder / "tokenizer"), **begin,
            max_length=LENGTH, batch_size=BATCH, max_steps=steps, warmup_steps=min(20, steps // 10),
            seed=seed, device="cpu", model_dtype="bfloat16", checkpoint_interval=0,
        )  # fmt: skip

    def drawn(self, target: str, seed: int) -> tuple[list[Window], np.ndarray]:
        """Return queries and the test's token ids ``(n, S)``, from different files."""
        random = np.random.default_rng([seed, 1])
        files = random.permutation(sorted({window.file for window in self.held[target]}))
        asked = set(files[: len(files) // 2].tolist())
        windows = [self.held[target][i] for i in random.permutation(len(self.held[target]))]
        queries = [window for window in windows if window.file in asked][:N_QUERIES]
        test = [window.ids for window in windows if window.file not in asked][:N_TEST]
        return queries, np.array(test, np.int64)

    def loss_of(self, method: str, target: str, seed: int) -> float:
        """Return the mean loss on the test after a training, nats per token."""
        path = self.loss_path(method, target, seed)
        if not path.is_file():
            queries, test = self.drawn(target, seed)
            model = self.folder / "base"
            if method != "base":
                work = path.with_suffix(".work")
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
                self._pick(method, target, seed, queries, work / "tars")
                model = work / "model"
                train(self._training(work / "tars", model, self.folder / "base", seed))
            losses = query_losses(load(model, "cpu"), test)
            path.parent.mkdir(exist_ok=True)
            np.save(path, losses)
            if method != "base":
                shutil.rmtree(work)
        return float(np.load(path).mean())

    def loss_path(self, method: str, target: str, seed: int) -> Path:
        return self.folder / "losses" / f"{target}, {seed}, {method}.npy"

    def _pick(self, method: str, target: str, seed: int, queries: list[Window], to: Path) -> None:
        others = np.array([i for i, w in enumerate(self.pool) if w.domain != target])
        allowed = np.random.default_rng([seed, 3]).permutation(others)[: len(others) // 2]
        n = int(SHARE * len(allowed))
        if method in SELECT:
            lines = [json.dumps({"input_ids": q.ids, "id": f"{i}"}) for i, q in enumerate(queries)]
            (to.parent / "queries.jsonl").write_text("\n".join(lines))
            np.save(to.parent / "not_in.npy", np.setdiff1d(np.arange(len(self.pool)), allowed))
            flags = ["--queries", str(to.parent / "queries.jsonl")]
            flags += ["--not_in", str(to.parent / "not_in.npy")]
            flags += ["--top", str(n), "--device", "cpu", *SELECT[method], "--to", str(to)]
            with redirect_stdout(sys.stderr):
                if gradproj(["select", str(self.folder / "store"), *flags]):
                    sys.exit(f"{method} failed")
            return
        if method == "random":
            chosen = np.random.default_rng([seed, 2]).choice(allowed, n, replace=False)
        else:
            documents = np.array([self.pool[i].ids for i in allowed], np.int64)
            scores = bm25(documents, np.array([q.ids for q in queries], np.int64)).sum(axis=0)
            chosen = allowed[np.argsort(-scores, kind="stable")[:n]]
        write_tars(to, [self.pool[i].payload() for i in chosen.tolist()])


def print_table(bench: Bench, targets: list[str], methods: list[str], n_seeds: int) -> None:
    """Print losses after the random pick, and of the others less that, with errors over seeds."""
    lines = []
    for method in methods:
        cells, all_differences = [], []
        for target in targets:
            seeds = [
                seed
                for seed in range(n_seeds)
                if bench.loss_path(method, target, seed).is_file()
                and bench.loss_path("random", target, seed).is_file()
            ]
            own = np.array([bench.loss_of(method, target, seed) for seed in seeds])
            chance = np.array([bench.loss_of("random", target, seed) for seed in seeds])
            cells.append(_with_error(own if method == "random" else own - chance))
            all_differences.append(own - chance)
        whole = min(map(len, all_differences))
        over = np.mean([x[:whole] for x in all_differences], axis=0)
        lines.append(f"| `{method}` | {' | '.join(cells)} | {_with_error(over)} |")
    (bench.folder / "table.md").write_text(
        "\n".join([f"| picked by | {' | '.join(targets)} | mean |", *lines]) + "\n"
    )
    print("\n" + (bench.folder / "table.md").read_text(), flush=True)


def _with_error(values: np.ndarray) -> str:
    if len(values) < 2:
        return "" if not len(values) else f"{values[0]:.3f}"
    return f"{values.mean():.3f} +- {values.std(ddof=1) / np.sqrt(len(values)):.3f}"


if __name__ == "__main__":
    main()
