"""Compare the bits that two checkouts write: same machine, same settings, same inputs.

    python tests/bench/compare_bits.py OTHER_CHECKOUT DEMO [--other_python PYTHON]

DEMO is a folder with ``tars`` and ``model``, as ``launch/demo.sh`` leaves it. Both checkouts run
the job (one and two ranks, three storage types) and two training runs (GradProjLora, GradDotProd)
on it. Every array, column, sum, checkpoint weight and curve must be equal byte for byte; the exit
code is 1 if one is not. A change that must not change results shows this table in its message.
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
JOBS = {
    "float16, 1 rank": (1, ["--proj_dtype", "float16"]),
    "float32, 2 ranks": (2, ["--proj_dtype", "float32", "--proj_layers", "mlp,attn,lm_head"]),
    "bfloat16, windows, sum": (
        1,
        ["--proj_dtype", "bfloat16", "--long_documents", "windows", "--loss_reduction", "sum"],
    ),
}
TRAININGS = {"GradProjLora": [], "GradDotProd": ["--val_shards", "tars", "--eval_interval", "4"]}
SHAPE = [
    "--n_layer", "2", "--n_embd", "64", "--n_head", "2", "--max_length", "64", "--max_steps", "12",
    "--batch_size", "4", "--warmup_steps", "2", "--checkpoint_interval", "6",
]  # fmt: skip


def run(python: str, checkout: Path, demo: Path, work: Path) -> dict[str, dict[str, str]]:
    """Run everything with one checkout's code; return case -> file -> SHA-256."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    work.mkdir()
    for name in ("tars", "model"):
        (work / name).symlink_to((demo / name).resolve())
    sums = {}
    for number, (case, (n_ranks, flags)) in enumerate(JOBS.items()):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n_ranks}"]
        job = ["-m", "gradproj.run", "--shards", "tars", "--model", "model", "--device", "cpu"]
        command = [python, *(launcher if n_ranks > 1 else []), *job]
        output = work / f"job{number}"
        call(
            [*command, "--output_dir", output.name, "--max_samples", "100", *flags],
            work,
            environment,
        )
        sums[case] = checksums(output / "projections.zarr")
    for method, flags in TRAININGS.items():
        output = work / method
        command = [python, "-m", "gradproj", "train", "--method", method, "--shards", "tars"]
        command += ["--tokenizer", "model", "--result_dir", output.name, "--device", "cpu"]
        call([*command, *SHAPE, *flags], work, environment)
        sums[method] = checksums(output)
    return sums


def call(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command; its output is printed only if it fails."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def checksums(folder: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 of every binary file and table of numbers.

    JSON files are left out: they hold times, versions and ids that differ from run to run. So do
    optimizer states, which pickle; the weights are compared.
    """
    wanted = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.suffix not in {".json", ".pt", ".png", ".pkl"}
        and not path.name.startswith(".")
        and "logs" not in path.parts
    ]
    return {
        str(path.relative_to(folder)): hashlib.sha256(without_times(path)).hexdigest()
        for path in wanted
    }


def without_times(path: Path) -> bytes:
    """Return a file's bytes; of a loss curve only step and losses, not the seconds."""
    if path.name != "loss.csv":
        return path.read_bytes()
    header, *lines = path.read_text().splitlines()
    names = header.split(",")
    columns = [i for i, name in enumerate(names) if "second" not in name and "per_s" not in name]
    return "\n".join(",".join(line.split(",")[i] for i in columns) for line in lines).encode()


def main() -> int:
    """Run both checkouts and print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("demo", type=Path, help="folder with tars and model")
    parser.add_argument("--other_python", default=sys.executable, help="Python for the other")
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="compare_bits"))
    try:
        theirs = run(
            arguments.other_python, arguments.other.resolve(), arguments.demo, work / "other"
        )
        ours = run(sys.executable, ROOT, arguments.demo, work / "this")
    finally:
        shutil.rmtree(work, ignore_errors=True)
    equal = True
    for case, files in theirs.items():
        differing = sorted(
            name
            for name in files.keys() | ours[case].keys()
            if files.get(name) != ours[case].get(name)
        )
        equal &= not differing
        verdict = "equal" if not differing else f"DIFFERENT: {', '.join(differing[:5])}"
        print(f"{case:<24} {len(files):>4} files  {verdict}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
