"""Documents per CPU second, end to end: ``python -m gradproj.run`` beside ``bergson build``.

    python tests/bench/bench_bergson.py [--model small|small-untied|gpt2] [--documents N] [--rounds
    N] [--quick]

bergson is the newest of PyPI, installed by this script into an environment of its own (``--env
DIR``, by default in the user's cache folder) with the torch of ``launch/constraints.txt``.

Both get the same model (random weights, float32), the same documents (pieces of Python's standard
library, log-normal lengths of 1 to 2,000 tokens, none truncated), one thread, 16 x 16 values of
each of the same layers, the gradient of the document's mean loss. Each reads its own format from
disk, made before the clock starts (tars; a saved ``datasets`` folder, copied again for every run so
that no tokenization is cached), and leaves its rows on disk. CPU seconds are user + system of the
whole process tree. What is started:

- gradproj: its defaults (``--batch_tokens 8192``, float16 rows with a scale, token covariances
summed, everything
  flushed to disk), but units of 512 documents, as a corpus of 32,768 or more has them by itself.
- gradproj, torch's products: the same without oneDNN, so with the very products that bergson uses.
- bergson: float32 rows, ``--token_batch_size 2048``, its default and the most that it takes here
(the model's positions); SDPA attention, transformers' default; ``--loss_reduction mean``; no
  Hessian, no normalization, no second pass; no key-value cache (it asks for none, and the model's
  config says so too). Its engine makes the embedding the root of the graph: with the tied head of
  GPT-2 it computes a gradient of the vocabulary that nobody wants; ``small-untied`` is a model
  where it does not.

Checked after every run: documents x layers x 256 values, a row empty only where there is no target,
and losses that agree document by document, so that both did the same work.

Start-up (imports, loading the model, the plan, the merge) is measured apart, with a few documents:
the second table is what the documents beyond these alone take.
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
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from documents import make_documents, make_model, make_tars
from measure import print_machine

from gradproj import ProjectionStore

ROOT = Path(__file__).resolve().parents[2]
CACHE = (
    Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradproj-bench" / "bergson"
)
FEW = 32
"""Documents of a run that is start-up for the most part."""
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_MODE": "disabled",
}
WITHOUT_ONEDNN = """
import sys, torch
torch.backends.mkldnn.set_flags(False)
from gradproj.run import main
sys.exit(main())
"""
SAVE_DATASET = """
import sys
from datasets import Dataset
Dataset.from_json(sys.argv[1]).save_to_disk(sys.argv[2])
"""
LOSSES = (
    "import sys, json; from datasets import load_from_disk; "
    "print(json.dumps(list(load_from_disk(sys.argv[1])['loss'])))"
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["small", "small-untied", "gpt2"], default="small")
    parser.add_argument("--documents", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--env", type=Path, default=CACHE, help=f"bergson's environment (default: {CACHE})"
    )
    parser.add_argument("--quick", action="store_true", help="256 documents, one round")
    args = parser.parse_args()
    if args.quick:
        args.documents, args.rounds = 256, 1
    ratios = compare(args.model, args.documents, args.rounds, args.env)
    if ratios is None:
        print("skipped: bergson cannot be installed here (no registry is reachable)")


def compare(
    model: str, n_documents: int, rounds: int, env: Path = CACHE
) -> dict[str, float] | None:
    """Documents per CPU second over bergson's, ``NAME`` and ``NAME without start-up``.

    None without a registry.
    """
    if not install(env):
        return None
    print_machine("zarr")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), model, n_documents, env)
        print(
            f"{model}, {n_documents} documents, {bench.n_tokens[n_documents]:,} tokens, bergson "
            f"{version_of(env)}",
            flush=True,
        )
        seconds = {(name, n): [] for n in (FEW, n_documents) for name in bench.commands}
        for number in range(rounds):
            for name, n in seconds:
                seconds[name, n].append(bench.run(name, n, f"{number}"))
        return tables(seconds, list(bench.commands), bench.n_tokens)


class Bench:
    """One model and its documents in both formats.

    Runs a tool on them and checks what it leaves.
    """

    def __init__(self, folder: Path, model: str, n_documents: int, env: Path) -> None:
        self.folder, self._env = folder, env
        documents = make_documents(folder, n_documents)
        self.model = make_model(folder / "model", model, folder / "tokenizer")
        for n in (FEW, n_documents):
            tars = make_tars(documents, folder / f"tars-{n}", n)
            saved = [
                str(env / "bin" / "python"),
                "-c",
                SAVE_DATASET,
                f"{tars}.jsonl",
                str(folder / f"arrow-{n}"),
            ]
            subprocess.run(saved, check=True, capture_output=True, env=self._environment("save"))
        self.commands = {
            "gradproj": [sys.executable, "-m", "gradproj.run"],
            "gradproj, torch's products": [sys.executable, "-c", WITHOUT_ONEDNN],
            "bergson": [str(env / "bin" / "bergson"), "build"],
        }
        self.losses: dict[int, np.ndarray] = {}
        self.n_tokens: dict[int, int] = {}
        # Reads the files into memory and gives losses to compare bergson's with.
        self.run("gradproj", n_documents, "warm")
        self.run("gradproj", FEW, "warm")
        self.run("bergson", FEW, "warm")

    def run(self, name: str, n: int, label: str) -> float:
        """CPU seconds of one run; its rows are checked and removed."""
        with self._scratch(f"{label}-{n}") as scratch:
            if name == "bergson":
                shutil.copytree(self.folder / f"arrow-{n}", scratch / "documents")
                flags = self._bergson_flags(scratch)
            else:
                flags = self._gradproj_flags(scratch, n)
            seconds = cpu_seconds(
                [*self.commands[name], *flags], self._environment(scratch.name), scratch
            )
            check = self._check_bergson if name == "bergson" else self._check_gradproj
            check(scratch / "out", n)
        return seconds

    def _gradproj_flags(self, scratch: Path, n: int) -> list[str]:
        return [
            "--shards",
            str(self.folder / f"tars-{n}"),
            "--model",
            str(self.model),
            "--output_dir",
            str(scratch / "out"),
            "--device",
            "cpu",
            "--max_length",
            "2048",
            "--proj_rank_total",
            "256",
            "--rows_per_shard",
            "512",
        ]

    def _bergson_flags(self, scratch: Path) -> list[str]:
        return [
            str(scratch / "out"),
            "--model",
            str(self.model),
            "--dataset",
            str(scratch / "documents"),
            "--truncation",
            "--precision",
            "fp32",
            "--projection_dim",
            "16",
            "--token_batch_size",
            "2048",
            "--loss_reduction",
            "mean",
        ]

    def _environment(self, name: str) -> dict[str, str]:
        return {**ENVIRONMENT, "HF_DATASETS_CACHE": str(self.folder / f"cache-{name}")}

    @contextmanager
    def _scratch(self, name: str) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix=name, dir=self.folder) as scratch:
            yield Path(scratch)

    def _check_gradproj(self, output: Path, n: int) -> None:
        with ProjectionStore(output) as store:
            n_tokens = store.column("n_tokens")
            assert (len(store), store.dim) == (n, self._dim), (len(store), store.dim)
            assert ((store.column("status") == 1) == (n_tokens > 0)).all()
            self.losses[n] = store.column("loss")[:]
            self.n_tokens[n] = int(n_tokens.sum()) + n

    def _check_bergson(self, output: Path, n: int) -> None:
        info = json.loads((output / "info.json").read_text())
        shape = info["num_grads"], sum(info["grad_sizes"].values())
        assert (shape, info["base_dtype"]) == ((n, self._dim), "float32")
        rows = np.memmap(output / "gradients.bin", dtype=np.float32, mode="r", shape=shape)
        command = [str(self._env / "bin" / "python"), "-c", LOSSES, str(output / "data.hf")]
        losses = np.array(
            json.loads(subprocess.check_output(command, env=self._environment("check")))
        )
        ours = self.losses[n]
        has_target = np.isfinite(ours)
        assert (np.abs(rows).max(axis=1) > 0).tolist() == has_target.tolist()
        np.testing.assert_allclose(losses[has_target], ours[has_target], rtol=1e-4)

    @property
    def _dim(self) -> int:
        config = json.loads((self.model / "config.json").read_text())
        return 4 * config["n_layer"] * 256


def cpu_seconds(command: list[str], environment: dict[str, str], folder: Path) -> float:
    """User and system seconds of a command and of all processes that it waited for."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "log").open("w+") as log:
        code = subprocess.run(
            command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT
        ).returncode
        if code:
            log.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit {code}\n{log.read()[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def tables(
    seconds: dict[tuple[str, int], list[float]], names: list[str], n_tokens: dict[int, int]
) -> dict[str, float]:
    """Both tables, with start-up and without it; the ratios to bergson."""
    n, ratios = max(n_tokens), {}
    for suffix, count in (("", n), (" without start-up", n - FEW)):
        runs = {
            name: [
                most - (few if suffix else 0.0)
                for most, few in zip(seconds[name, n], seconds[name, FEW], strict=True)
            ]
            for name in names
        }
        medians = {name: statistics.median(values) for name, values in runs.items()}
        print(
            f"\n{count} documents{suffix or ', start-up included'}: "
            "CPU s (least, most), documents per CPU s, / bergson"
        )
        for name, values in runs.items():
            ratios[name + suffix] = medians["bergson"] / medians[name]
            print(
                f"{name:28} {medians[name]:8.1f} ({min(values):.1f}, {max(values):.1f}) "
                f"{count / medians[name]:8.2f} {ratios[name + suffix]:8.2f}",
                flush=True,
            )
    for name in names:
        few, most = (statistics.median(seconds[name, count]) for count in (FEW, n))
        start_up = few - (most - few) / (n_tokens[n] - n_tokens[FEW]) * n_tokens[FEW]
        print(f"{name:28} start-up about {start_up:.1f} CPU s, {start_up / most:.1%} of the run")
    return ratios


def install(env: Path) -> bool:
    """bergson in an environment of its own; whether it is there."""
    if (env / "bin" / "bergson").exists():
        return True
    print(f"installing bergson into {env} ...", flush=True)
    venv.create(env, with_pip=True, clear=True)
    pip = [str(env / "bin" / "python"), "-m", "pip", "install", "--quiet", "--retries", "1"]
    done = subprocess.run(
        [*pip, "-c", str(ROOT / "launch" / "constraints.txt"), "bergson"],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        print(done.stderr[-600:])
        shutil.rmtree(env)
        return False
    # Made for another torch they cannot be imported, and transformers with them; without them it
    # does not try.
    python = str(env / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "uninstall", "--quiet", "--yes", "torchvision", "torchaudio"],
        check=True,
    )
    return True


def version_of(env: Path) -> str:
    """bergson's version."""
    names = "version('bergson'), 'with torch', version('torch')"
    code = f"from importlib.metadata import version; print({names})"
    return subprocess.check_output([str(env / "bin" / "python"), "-c", code], text=True).strip()


if __name__ == "__main__":
    main()
