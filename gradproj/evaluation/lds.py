"""Runs the retraining experiment: documents, trainings, scores, and their agreement."""

import importlib.util
import json
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from gradproj.errors import ModelError, OtherSettingsError, StoreError, settings_mismatch
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment, make_experiment
from gradproj.evaluation.figure import draw
from gradproj.evaluation.leave_out import LeaveOut, leave_out
from gradproj.evaluation.losses import load, query_losses
from gradproj.evaluation.methods import JOINED, OPTIONAL, Methods, names_of
from gradproj.evaluation.results import Results, evaluate_methods, reference_of
from gradproj.evaluation.retraining import Retraining, losses_of, train_base
from gradproj.evaluation.sources import SourceResults, evaluate_sources
from gradproj.files import try_lock, write_and_replace
from gradproj.flags import current_names
from gradproj.job.recorded import config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.model.checkpoint import fetch
from gradproj.model.loading import model_quantization
from gradproj.storage.results import make_folder, save_array


def evaluate(config: LdsConfig) -> Results:
    """Run the parts of the experiment that ``--output_dir`` lacks; write ``lds.json`` there."""
    config = with_store(config)
    names = names_of(config.methods, "--methods")
    left_out = names_of(config.leave_out_methods, "--leave_out_methods") if config.leave_out else []
    folder = make_folder("--output_dir", config.output_dir)
    with locked(folder):
        check_settings(folder, config)
        experiment = make_experiment(config)
        methods = Methods(config, experiment, train_base(config, experiment))
        scores = {name: methods.scores(name) for name in tqdm(available(names), "scores")}
        subsets = draw_subsets(config, len(experiment.documents))
        losses = retrain(config, experiment, subsets)
        left: dict[str, LeaveOut] = {}
        if left_out:
            left_scores = {name: methods.scores(name) for name in available(left_out)}
            left = leave_out(config, experiment, left_scores)
        sizes = {name: methods.row_bytes(name) for name in scores}
        randomized = None
        if config.randomized:
            randomized = methods.randomized_scores(reference_of(config, scores))
        results = evaluate_methods(
            config, experiment, scores, subsets, losses, left, sizes, randomized
        )
        save_results(folder, config, results, subsets, losses)
    return results


def find_sources(config: LdsConfig) -> SourceResults:
    """Measure how well scores find planted sources; write ``facts.json`` or ``behaviour.json``."""
    config = replace(with_store(config), n_near_copies=0)
    names = names_of(config.methods, "--methods")
    folder = make_folder("--output_dir", config.output_dir)
    with locked(folder):
        check_settings(folder, config)
        experiment = make_experiment(config)
        model = train_base(config, experiment)
        methods = Methods(config, experiment, model)
        scores = {name: methods.scores(name) for name in tqdm(available(names), "scores")}
        sizes = {name: methods.row_bytes(name) for name in scores}
        assert experiment.sources is not None
        start, device = experiment.start, config.device
        before = None if start is None else query_loss(start, experiment, device)
        results = evaluate_sources(
            config.experiment, experiment.sources, scores, sizes, reference_of(config, scores),
            (before, query_loss(model, experiment, device)),
        )  # fmt: skip
        save_json(folder / f"{config.experiment}.json", config, results)
    return results


def query_loss(model: Path, experiment: Experiment, device: str) -> float:
    """Return the mean over the queries of their loss, nats per target token."""
    labels = experiment.query_labels
    return float(query_losses(load(model, device), experiment.queries, labels).mean())


def with_store(config: LdsConfig) -> LdsConfig:
    """Return the settings with tars, model and tokenizer of ``--store`` where none are given.

    Raises:
        ModelError: the store's model is an adapter or quantized, which are not fine-tuned, or has
            no files.
    """
    if not config.store:
        return config
    run = config_from(RecordedRunArgs(output=config.store, model=config.model))
    files = fetch(run.model)
    is_whole = files.model_dir is not None and files.adapter_dir is None
    if not is_whole or model_quantization(files):
        raise ModelError(
            f"--store {config.store}: its model is {run.model.model or run.model.architecture}, "
            "and lds fine-tunes whole checkpoints: give --model DIR"
        )
    return replace(
        config, store="", shards=config.shards or run.corpus.shards, model=str(files.model_dir),
        tokenizer=config.tokenizer or run.model.tokenizer,
    )  # fmt: skip


def available(names: list[str]) -> list[str]:
    """Return the methods whose library is installed; print a line for each of the others."""
    missing: dict[str, str] = {}
    for name in names:
        libraries = [OPTIONAL[part] for part in name.split(JOINED) if part in OPTIONAL]
        absent = [library for library in libraries if importlib.util.find_spec(library) is None]
        missing |= {name: absent[0]} if absent else {}
    for name, library in missing.items():
        needs = f"needs {library} (pip install 'gradproj[evaluation]')"
        print(f"left out: {name}, which {needs}", file=sys.stderr, flush=True)
    return [name for name in names if name not in missing]


def draw_subsets(config: LdsConfig, n: int) -> np.ndarray:
    """Draw random subsets, ``(M, N)`` bool; more subsets extend fewer."""
    subsets, size = np.zeros((config.subsets, n), bool), config.subset_size or n // 2
    for number, subset in enumerate(subsets):
        subset[np.random.default_rng([config.seed, 3, number]).permutation(n)[:size]] = True
    return subsets


def retrain(config: LdsConfig, experiment: Experiment, subsets: np.ndarray) -> np.ndarray:
    """Train on each subset and seed; return the losses of all queries, ``(M, S, Q + C)``."""
    # Seed by seed, so that an interrupted experiment has all subsets of fewer seeds.
    tasks = [
        Retraining(f"subset-{number:04d}", subset, config.seed + 1 + seed)
        for seed in range(config.seeds)
        for number, subset in enumerate(subsets)
    ]
    losses = losses_of(config, experiment, tasks, "retraining")
    return losses.reshape(config.seeds, len(subsets), -1).swapaxes(0, 1)


def check_settings(folder: Path, config: LdsConfig) -> None:
    """Reject the directory of another experiment; record the settings in a new one."""
    path, settings = folder / "settings.json", json.loads(json.dumps(config.identity()))
    failed = not (folder / "tokens.npz").is_file()
    if failed and path.is_file():
        # The experiment failed before it had documents (too few, say), so nothing is lost.
        for name in ("tokenizer", "documents", "queries", "pretrain"):
            shutil.rmtree(folder / name, ignore_errors=True)
    if failed or not path.is_file():
        write_and_replace(path, [json.dumps(settings, indent=1).encode()])
        return
    try:
        recorded = current_names(LdsConfig, json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); give --output_dir a new path") from error
    # An experiment of an earlier version has the defaults of the settings that came later.
    recorded = {f.name: f.default for f in fields(config) if f.name in settings} | recorded
    mismatch = settings_mismatch(
        f"cannot continue in {folder}: it has another experiment",
        {f"--{name}": value for name, value in recorded.items()},
        {f"--{name}": value for name, value in settings.items()},
        "Run with its settings, or give --output_dir a new path",
        labels=("there", "here"),
    )
    if mismatch:
        raise OtherSettingsError(mismatch)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a directory for one command; the lock ends with the process."""
    with (folder / "lock").open("w") as file:
        if try_lock(file) is False:
            raise StoreError(
                f"another lds runs in {folder}; wait for it, or give --output_dir a new path"
            )
        yield


def save_results(
    folder: Path, config: LdsConfig, results: Results, subsets: np.ndarray, losses: np.ndarray
) -> None:
    """Write ``lds.json``, ``lds.svg``, ``subsets.npy`` and ``losses.npy``."""
    save_array(folder / "subsets.npy", subsets)
    save_array(folder / "losses.npy", losses)
    draw({"": save_json(folder / "lds.json", config, results)}, folder / "lds.svg")


def save_json(path: Path, config: LdsConfig, results: Results | SourceResults) -> dict[str, Any]:
    """Write settings, results and versions; return them."""
    content = {"settings": asdict(config), **asdict(results), "versions": versions()}
    # JSON has no NaN: it becomes null.
    content = json.loads(json.dumps(content), parse_constant=lambda _: None)
    write_and_replace(path, [json.dumps(content, indent=1).encode()])
    return content


def versions() -> dict[str, str]:
    libraries = ("torch", "transformers", "numpy", *sorted(set(OPTIONAL.values())))
    present = [name for name in libraries if importlib.util.find_spec(name) is not None]
    installed = {name: metadata.version(name) for name in present}
    return {"python": platform.python_version(), "machine": platform.machine(), **installed}
