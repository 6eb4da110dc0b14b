"""Checkpoints of a training run: a Hugging Face folder with what training needs to go on, published by one rename."""

import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gradproj.distributed import World
from gradproj.errors import ConfigError, StoreError, settings_mismatch
from gradproj.files import explain_os_errors, fsync_dir, fsync_tree, try_lock
from gradproj.model.checkpoint import no_progress_bars
from gradproj.training.config import TrainConfig

FOLDER = "checkpoints"
"""Below ``result_dir``."""
STATE = "training_state.pt"
WEIGHTS = ".safetensors"
LOCK_PATIENCE_S = 15.0

_NAME = re.compile(r"step-(\d{8,})")


@contextmanager
def alone_in(result_dir: Path, world: World) -> Iterator[None]:
    """Keep other runs out of a folder while this context lasts; the first rank does it for all.

    Raises:
        StoreError: another run trains into it.
    """
    if world.rank:
        yield
        return
    with explain_os_errors(result_dir):
        lock = (result_dir / ".lock").open("w")
    with lock:
        # Ranks whose launcher was killed need a moment to notice.
        until = time.monotonic() + LOCK_PATIENCE_S
        # A file system without locks cannot keep other runs out.
        while try_lock(lock) is False:
            if time.monotonic() > until:
                raise StoreError(
                    f"another run is training into --result_dir {result_dir}: wait for its end, or give another folder"
                )
            time.sleep(0.2)
        yield


def rank_file(rank: int) -> str:
    """A rank's own state in a checkpoint."""
    return f"rank-{rank:05d}.pt"


class Checkpoints:
    """The checkpoints of one run, of which the newest is kept.

    Args:
        result_dir: they are in a folder of it.
        config: the run.
        world: the ranks that train.
        corpora: ``shards`` and ``val_shards`` -> the corpus's fingerprint, which must stay wherever the tars lie.
    """

    def __init__(
        self, result_dir: Path, config: TrainConfig, world: World, corpora: Mapping[str, str]
    ) -> None:
        self._result_dir, self._folder = result_dir, result_dir / FOLDER
        self._config, self._world = config, world
        self._settings = {**config.settings_of_the_run(), **corpora, "ranks": world.size}

    def newest(self) -> Path | None:
        """The folder of the newest whole checkpoint, or None."""
        if not self._folder.is_dir():
            return None
        found = sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        return found[-1] if found else None

    def to_resume(self) -> Path | None:
        """The checkpoint to go on from; None to begin.

        Raises:
            StoreError: there is one, and ``--resume`` was not given; or none, and what another run left there would go.
        """
        newest = self.newest()
        if newest is None:
            self._refuse_to_begin_anew()
        if newest is not None and not self._config.resume:
            raise StoreError(
                f"--result_dir {self._result_dir} holds a run's checkpoint ({newest.name}): "
                "go on from it with --resume, or give a new folder"
            )
        return newest

    def _refuse_to_begin_anew(self) -> None:
        """Where that would take something away."""
        folder, interval = self._result_dir, self._config.checkpoint_interval
        models = [path.name for path in folder.glob("*.safetensors")] if folder.is_dir() else []
        if models:
            raise StoreError(
                f"--result_dir {folder} holds a model ({models[0]}) and no checkpoint to go on from: it would be "
                "overwritten. Give a new folder"
            )
        n_steps = steps_in(folder)
        if self._config.resume and interval and n_steps > interval:
            raise StoreError(
                f"--result_dir {folder} holds {n_steps} steps of a run and no checkpoint, though one is made every "
                f"{interval} steps: put {FOLDER}/ back, or give a new folder"
            )
        if self._config.resume and n_steps and self._world.rank == 0:
            print(
                f"no checkpoint in {folder} yet: beginning anew, the {n_steps} steps there are made again",
                file=sys.stderr,
                flush=True,
            )

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """``(what all ranks share, this rank's own)`` of a checkpoint.

        Raises:
            ConfigError: the run was made with other settings, documents or another number of ranks.
            StoreError: it is damaged.
        """
        shared = _load(path, STATE)
        theirs, ours = (
            {name if name == "ranks" else f"--{name}": value for name, value in settings.items()}
            for settings in (shared["settings"], self._settings)
        )
        mismatch = settings_mismatch(
            f"cannot resume from {path}: it was made with other settings",
            theirs,
            ours,
            "Resume with the same settings, or give --result_dir a new path",
            labels=("checkpoint", "this run"),
        )
        if mismatch:
            raise ConfigError(mismatch)
        return shared, _load(path, rank_file(self._world.rank))

    def save(
        self,
        step: int,
        model: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        curve: list[dict[str, Any]],
        own: dict[str, Any],
    ) -> Path:
        """Write a checkpoint under another name, publish it, and take those before it away.

        Args:
            step: steps done.
            model: of transformers, not wrapped.
            tokenizer: the model's.
            optimizer: its state is the same in all ranks.
            curve: the loss curve's points.
            own: this rank's: position in the data, the engine's state.
        """
        final = self._folder / f"step-{step:08d}"
        work = self._folder / f".saving-{final.name}"
        with explain_os_errors(final):
            if self._world.rank == 0:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            self._world.barrier()
            if self._world.rank == 0:
                _save_model(work, model, tokenizer)
                shared = {
                    "step": step, "settings": self._settings, "optimizer": optimizer.state_dict(), "curve": curve,
                }  # fmt: skip
                _save(shared, work / STATE)
            _save({**own, "random": random_state()}, work / rank_file(self._world.rank))
            self._world.barrier()
            if self._world.rank == 0:
                self._publish(work, final)
            self._world.barrier()
        return final

    def _publish(self, work: Path, final: Path) -> None:
        fsync_tree(work)
        shutil.rmtree(final, ignore_errors=True)
        os.rename(work, final)
        fsync_dir(self._folder)
        for path in self._folder.iterdir():
            if path != final and _NAME.fullmatch(path.name.removeprefix(".saving-")):
                shutil.rmtree(path)


def publish_model(result_dir: Path, model: Any, tokenizer: Any) -> None:
    """Put model and tokenizer into ``result_dir``, its weights last: they say that the run is finished."""
    work = result_dir / f".saving-{os.getpid()}"
    with explain_os_errors(result_dir):
        work.mkdir(parents=True)
        try:
            _save_model(work, model, tokenizer)
            for path in sorted(work.iterdir(), key=lambda p: p.suffix == WEIGHTS):
                os.replace(path, result_dir / path.name)
        finally:
            shutil.rmtree(work)


def steps_in(result_dir: Path) -> int:
    """Steps that a run's ``loss.csv`` tells of."""
    path = result_dir / "loss.csv"
    return max(0, len(path.read_text().splitlines()) - 1) if path.is_file() else 0


def _save(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch's writer makes of a full disk
        raise StoreError(
            f"cannot write {path}: {_reason(error)}. Free space there, then start again"
        ) from error


def _save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    try:
        with no_progress_bars():
            model.save_pretrained(folder)
    except SafetensorError as error:
        raise StoreError(
            f"cannot write {folder}: {error}. Free space there, then start again"
        ) from error
    tokenizer.save_pretrained(folder)


def _load(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a torn archive makes of torch's reader
        raise StoreError(
            f"the checkpoint {checkpoint} is damaged ({name}: {_reason(error)}): train without --resume into a new "
            "--result_dir"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def random_state() -> dict[str, Any]:
    """Of torch's generators, from which dropout draws."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
