"""Jobs on one and on several GPUs, for ``bench_gpu.py``.

Beside the engine alone, and on ever more ranks.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from documents import make_documents, make_model, make_tars

N_UNITS = 4
"""Settings in the form that ``bench_job.py`` takes."""
ROWS_PER_SHARD = 256
"""Settings of runs in which several ranks share the units."""
LAUNCHER = (
    "RANK",
    "LOCAL_",
    "WORLD_SIZE",
    "GROUP_",
    "ROLE_",
    "MASTER_",
    "TORCHELASTIC_",
    "TORCH_NCCL_",
)
"""Beginnings of what torchrun puts into the environment."""


class GpuJobs:
    """The real job on real text, in processes of its own.

    Args:
        name: of a folder for all that it reads and writes.
        device: cuda, or cpu for a trial.
        shape: of the model, in ``documents.SHAPES``.
        n_documents: for each GPU.
        n_ranks: most GPUs.
    """

    def __init__(self, name: str, device: str, shape: str, n_documents: int, n_ranks: int) -> None:
        self._folder, self._device = Path(name), device
        self._n_documents, self._n_ranks = n_documents, n_ranks
        print(f"\njob: {shape} shapes, bfloat16, {n_documents} documents a GPU", flush=True)
        folder = self._folder
        documents = make_documents(folder, n_documents)
        self._model = make_model(folder / "model", shape, folder / "tokenizer")
        text = documents.read_text()
        self._tars = {}
        for ranks in self._steps():
            repeated = folder / f"documents-{ranks}.jsonl"
            repeated.write_text(text * ranks)
            self._tars[ranks] = make_tars(repeated, folder / f"tars-{ranks}", ranks * n_documents)

    def _steps(self) -> list[int]:
        """1, 2, 4, ... and the number of ranks."""
        ranks = self._n_ranks
        return sorted({2**i for i in range(ranks.bit_length()) if 2**i <= ranks} | {ranks})

    def beside_engine(self, rounds: int) -> float:
        """The job over the engine alone, both on the same batches on one GPU; wall seconds."""
        runs: dict[str, list[dict[str, float]]] = {"job": [], "engine": []}
        script, rows = Path(__file__).with_name("bench_job.py"), self._n_documents // N_UNITS
        for number in range(rounds):
            for part, found in runs.items():
                command = [
                    sys.executable,
                    str(script),
                    part,
                    *self._flags(1, f"{part}-{number}", rows),
                ]
                found.append(json.loads(self._run(command).splitlines()[-1]))
        print("            wall s   least    most   documents/s      tokens/s")
        medians = {}
        for part, found in runs.items():
            seconds = [run["wall"] for run in found]
            medians[part] = statistics.median(seconds)
            rates = self._n_documents / medians[part], found[0]["n_tokens"] / medians[part]
            spread = f"{min(seconds):6.2f}  {max(seconds):6.2f}"
            print(f"{part:8}  {medians[part]:8.2f}  {spread}  {rates[0]:12,.1f}  {rates[1]:12,.0f}")
        ratio = medians["job"] / medians["engine"]
        print(f"job over engine {ratio:.3f}", flush=True)
        return ratio

    def scaling(self) -> dict[str, float]:
        """Documents a second of 2, 4, ... ranks, over as many times one's."""
        rates: dict[int, float] = {}
        print("ranks   wall s   documents/s      tokens/s   of one rank's, for each")
        for ranks in self._steps():
            output = f"ranks-{ranks}"
            launcher = [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={ranks}",
            ]
            rows = min(ROWS_PER_SHARD, max(16, self._n_documents // 16))
            self._run([*launcher, "-m", "gradproj.run", *self._flags(ranks, output, rows)])
            timing = json.loads((self._folder / output / "projection_stats.json").read_text())[
                "timing"
            ]
            seconds = timing["wall_seconds"]
            rates[ranks] = ranks * self._n_documents / seconds
            efficiency = rates[ranks] / ranks / rates[1]
            both = f"{rates[ranks]:12,.1f}  {timing['tokens'] / seconds:12,.0f}"
            print(f"{ranks:5}  {seconds:7.2f}  {both}  {efficiency:6.3f}", flush=True)
        return {f"{n} ranks / {n} x one": rates[n] / n / rates[1] for n in rates}

    def _flags(self, ranks: int, output: str, rows_per_shard: int) -> list[str]:
        flags = {
            "shards": self._tars[ranks],
            "model": self._model,
            "output_dir": self._folder / output,
            "device": self._device,
            "max_length": 2048,
            "rows_per_shard": rows_per_shard,
            "model_dtype": "bfloat16",
            "batch_tokens": "auto" if self._device == "cuda" else 4096,
        }
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def _run(self, command: list[str]) -> str:
        """Return the output of a process without this launcher's rank variables."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(LAUNCHER)
        }
        environment |= {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
        return done.stdout
