"""Trains on parts of the documents with gradproj's loop, in parallel; one file of losses each."""

import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from gradproj.corpus.index_file import open_corpus
from gradproj.errors import StoreError
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import Experiment, write_subset
from gradproj.evaluation.finetuning import finetuning_of
from gradproj.evaluation.losses import load, query_losses
from gradproj.storage.results import load_array, save_array
from gradproj.training import TrainConfig, train


@dataclass(frozen=True)
class Retraining:
    """A training on some of the documents."""

    name: str
    chosen: np.ndarray
    """``(N,)`` bool."""
    seed: int
    """Seed of weights and order."""


def losses_of(
    config: LdsConfig, experiment: Experiment, tasks: Sequence[Retraining], label: str
) -> np.ndarray:
    """Return each query's loss after each training, ``(len(tasks), Q)`` float64.

    Losses are mean nats per target token. Each training writes a file, so a later call runs only
    the trainings that have none.
    """
    folder = Path(config.output_dir) / "losses"
    folder.mkdir(exist_ok=True)
    missing = [task for task in tasks if not _file(folder, task).is_file()]
    run = _finetune if config.model else _retrain
    if missing:
        with workers(config.workers, Path(config.output_dir)) as pool:
            running = [
                pool.submit(run, config, experiment, task, _file(folder, task)) for task in missing
            ]
            n_done = len(tasks) - len(missing)
            for training in tqdm(as_completed(running), label, len(tasks), initial=n_done):
                training.result()
    return np.stack([load_array(_file(folder, task)) for task in tasks])


def _file(folder: Path, task: Retraining) -> Path:
    return folder / f"{task.name}-seed-{task.seed}.npy"


@contextmanager
def workers(n: int, folder: Path) -> Iterator[ProcessPoolExecutor]:
    """Start processes of one thread that log to ``training.log`` and end with this process."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(n, context, _begin_worker, (folder / "training.log",))
    try:
        yield pool
    except BaseException as error:
        # A training takes minutes, and its result would not be used.
        pool.shutdown(wait=False, cancel_futures=True)
        for child in multiprocessing.active_children():
            child.terminate()
        if isinstance(error, BrokenProcessPool):
            raise StoreError(
                f"a training process was killed (out of memory?) while --workers {n} of them ran; "
                f"see {folder / 'training.log'}. Run the same command again to resume"
            ) from error
        raise
    pool.shutdown()


def _begin_worker(log: Path) -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None
    sentinel = parent.sentinel

    def watch() -> None:
        wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()
    sys.stderr = log.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")


def train_base(config: LdsConfig, experiment: Experiment) -> Path:
    """Train the scored model on all documents; return its directory.

    A model that is given is scored as it is, unless something is planted in the documents.
    """
    folder = Path(config.output_dir)
    if config.model and experiment.sources is None:
        return Path(config.model)
    if experiment.start is not None and not config.model and not _is_trained(experiment.start):
        print("pretraining the model that all trainings start from", file=sys.stderr, flush=True)
        pretraining = replace(config, epochs=config.pretrain_epochs)
        from_random = replace(experiment, start=None)
        tars = folder / "pretrain"
        train(train_config(pretraining, from_random, tars, experiment.start, config.seed))
    if not _is_trained(folder / "model"):
        print("training on all documents", file=sys.stderr, flush=True)
        tars = experiment.document_tars
        train(train_config(config, experiment, tars, folder / "model", config.seed))
    return folder / "model"


def _is_trained(folder: Path) -> bool:
    return (folder / "model.safetensors").is_file()


def _retrain(config: LdsConfig, experiment: Experiment, task: Retraining, path: Path) -> None:
    work = path.parent / f"{path.stem}.training"
    shutil.rmtree(work, ignore_errors=True)  # left by a training that was killed
    work.mkdir()
    write_subset(work / "tars", experiment.documents[task.chosen])
    train(train_config(config, experiment, work / "tars", work / "model", task.seed))
    save_array(path, query_losses(load(work / "model", config.device), experiment.queries))
    shutil.rmtree(work)


def _finetune(config: LdsConfig, experiment: Experiment, task: Retraining, path: Path) -> None:
    save_array(path, finetuning_of(config, experiment).losses_after(task.chosen, task.seed))


def train_config(
    config: LdsConfig, experiment: Experiment, tars: Path, folder: Path, seed: int
) -> TrainConfig:
    """Return the configuration of a training on ``tars``, with ``config.epochs`` epochs."""
    steps = max(1, config.epochs * open_corpus(str(tars)).n_samples // config.batch_size)
    shape = {"n_layer": config.n_layer, "n_embd": config.n_embd, "n_head": config.n_head}
    start: dict[str, Any] = shape if experiment.start is None else {"model": str(experiment.start)}
    return TrainConfig(
        shards=str(tars), result_dir=str(folder), tokenizer=str(experiment.tokenizer), **start,
        max_length=config.max_length, batch_size=config.batch_size, max_steps=steps,
        warmup_steps=min(20, steps // 10), learning_rate=config.rate, seed=seed,
        device=config.device, model_dtype=config.model_dtype, checkpoint_interval=0,
    )  # fmt: skip
