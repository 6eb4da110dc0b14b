"""``python -m gradproj lds``: documents, trainings, scores, and how well the scores foretell the trainings."""

import importlib.util
import json
import math
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gradproj.errors import OtherSettingsError, StoreError, settings_mismatch
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment, make_experiment
from gradproj.evaluation.leave_out import LeaveOut, leave_out
from gradproj.evaluation.methods import OPTIONAL, Methods, names_of
from gradproj.evaluation.results import Results, judge
from gradproj.evaluation.retraining import Retraining, losses_of, train_base
from gradproj.files import make_folder, save_array, try_lock, write_and_replace
from gradproj.flags import current_names


def evaluate(config: LdsConfig) -> Results:
    """Run the experiment, or what of it is not there yet; ``lds.json`` and the raw numbers go to ``--output_dir``.

    Raises:
        GradprojError: too few documents, an unknown method, a folder of another experiment.
    """
    asked = names_of(config.methods, "--methods")
    removing = names_of(config.leave_out_methods, "--leave_out_methods") if config.leave_out else []
    folder = make_folder("--output_dir", config.output_dir)
    with locked(folder):
        check_settings(folder, config)
        experiment = make_experiment(config)
        model = train_base(config, experiment)
        methods = Methods(config, experiment, model)
        scores = {name: methods.scores(name) for name in tqdm(available(asked), "scores")}
        subsets = draw_subsets(config, len(experiment.documents))
        losses = retrain(config, experiment, subsets)
        left: dict[str, LeaveOut] = {}
        if removing:
            left = leave_out(
                config, experiment, {n: methods.scores(n) for n in available(removing)}
            )
        results = judge(config, experiment, scores, subsets, losses, left)
        keep(folder, config, results, subsets, losses)
    return results


def available(names: list[str]) -> list[str]:
    """The methods whose library is installed; of the others a line says that they are left out."""
    lost = [n for n in names if n in OPTIONAL and importlib.util.find_spec(OPTIONAL[n]) is None]
    for name in lost:
        needs = f"needs {OPTIONAL[name]} (pip install 'gradproj[evaluation]')"
        print(f"left out: {name}, which {needs}", file=sys.stderr, flush=True)
    return [name for name in names if name not in lost]


def draw_subsets(config: LdsConfig, n: int) -> np.ndarray:
    """``(M, N)`` bool: random halves; the first ones are the same however many are drawn."""
    subsets = np.zeros((config.subsets, n), bool)
    for number, subset in enumerate(subsets):
        subset[np.random.default_rng([config.seed, 3, number]).permutation(n)[: n // 2]] = True
    return subsets


def retrain(config: LdsConfig, experiment: Experiment, subsets: np.ndarray) -> np.ndarray:
    """``(M, S, Q + C)`` losses of all queries after training on each subset with each seed."""
    # Seed by seed, so that what is there of an unfinished experiment is whole subsets of fewer seeds.
    tasks = [
        Retraining(f"subset-{number:04d}", subset, config.seed + 1 + seed)
        for seed in range(config.seeds)
        for number, subset in enumerate(subsets)
    ]
    found = losses_of(config, experiment, tasks, "retraining")
    return found.reshape(config.seeds, len(subsets), -1).swapaxes(0, 1)


def check_settings(folder: Path, config: LdsConfig) -> None:
    """Refuse a folder that holds another experiment; note this one's settings in a new folder."""
    path, own = folder / "settings.json", json.loads(json.dumps(config.experiment()))
    if not path.is_file():
        write_and_replace(path, [json.dumps(own, indent=1).encode()])
        return
    if not (folder / "tokens.npz").is_file():
        # It ended before it had its documents (too few of them, say), so that nothing is lost.
        for name in ("tokenizer", "documents", "queries", "pretrain"):
            shutil.rmtree(folder / name, ignore_errors=True)
        write_and_replace(path, [json.dumps(own, indent=1).encode()])
        return
    try:
        there = current_names(LdsConfig, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); give --output_dir a new path") from error
    mismatch = settings_mismatch(
        f"cannot go on in {folder}: it holds another experiment",
        {f"--{name}": value for name, value in there.items()},
        {f"--{name}": value for name, value in own.items()},
        "Run with its settings, or give --output_dir a new path",
        labels=("there", "here"),
    )
    if mismatch:
        raise OtherSettingsError(mismatch)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One command at a time in a folder; the lock goes with the process."""
    with (folder / "lock").open("w") as file:
        if try_lock(file) is False:
            raise StoreError(
                f"another lds works in {folder}; wait for it, or give --output_dir a new path"
            )
        yield


def keep(
    folder: Path, config: LdsConfig, results: Results, subsets: np.ndarray, losses: np.ndarray
) -> None:
    """``lds.json``, ``subsets.npy`` and ``losses.npy``."""
    save_array(folder / "subsets.npy", subsets)
    save_array(folder / "losses.npy", losses)
    told = {"settings": asdict(config), **asdict(results), "versions": versions()}
    write_and_replace(
        folder / "lds.json", [json.dumps(as_json(told), indent=1, allow_nan=False).encode()]
    )


def as_json(value: Any) -> Any:
    """The same with null for NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {k: as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    libraries = ("torch", "transformers", "numpy", *sorted(set(OPTIONAL.values())))
    found = {
        name: metadata.version(name)
        for name in libraries
        if importlib.util.find_spec(name) is not None
    }
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
