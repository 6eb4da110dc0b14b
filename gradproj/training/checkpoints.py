"""Checkpoints: a Hugging Face directory plus the training's state, published by one rename."""

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
from gradproj.flags import current_names
from gradproj.model.checkpoint import no_progress_bars
from gradproj.training.config import TrainConfig

FOLDER = "checkpoints"
"""In ``result_dir``."""
STATE = "training_state.pt"
WEIGHTS = ".safetensors"
LOCK_PATIENCE_S = 15.0

_NAME = re.compile(r"step-(\d{8,})")


@contextmanager
def lock_result_dir(result_dir: Path, world: World) -> Iterator[None]:
    """Lock a folder against other runs; rank 0 holds the lock for all ranks."""
    if world.rank:
        yield
        return
    with explain_os_errors(result_dir):
        lock = (result_dir / ".lock").open("w")
    with lock:
        # Ranks of a killed launcher hold the lock until they notice its end.
        until = time.monotonic() + LOCK_PATIENCE_S
        # A file system without locks cannot keep other runs out.
        while try_lock(lock) is False:
            if time.monotonic() > until:
                raise StoreError(
                    f"another run is training into --result_dir {result_dir}: wait for its end, or "
                    "give another folder"
                )
            time.sleep(0.2)
        yield


_BEFORE = {
    "encoding": "dense", "loss_on": "assistant", "truncate_side": "right", "chat_template": "",
    "experts": "joint",
}  # fmt: skip
"""Settings of checkpoints from before these flags."""


class Checkpoints:
    """The checkpoints of one run; only the newest is kept.

    ``corpora`` are the fingerprints of ``shards`` and ``val_shards``. They replace the paths in the
    recorded settings, so that the tars may be moved.
    """

    def __init__(
        self, result_dir: Path, config: TrainConfig, world: World, corpora: Mapping[str, str]
    ) -> None:
        self._result_dir, self._folder = result_dir, result_dir / FOLDER
        self._config, self._world, self._rank_file = config, world, f"rank-{world.rank:05d}.pt"
        self._settings = {**config.settings_of_the_run(), **corpora, "ranks": world.size}

    def newest(self) -> Path | None:
        """Return the folder of the newest complete checkpoint, or None."""
        if not self._folder.is_dir():
            return None
        return max((p for p in self._folder.iterdir() if _NAME.fullmatch(p.name)), default=None)

    def to_resume(self) -> Path | None:
        """Return the checkpoint to continue from; None to start from the beginning.

        ``StoreError`` if there is one and ``--resume`` is not given, or if there is none and a
        start would overwrite results of another run.
        """
        newest, folder, resume = self.newest(), self._result_dir, self._config.resume
        if newest is not None:
            if resume:
                return newest
            raise StoreError(
                f"--result_dir {folder} holds a run's checkpoint ({newest.name}): "
                "continue from it with --resume, or give a new folder"
            )
        models = [path.name for path in folder.glob("*.safetensors")] if folder.is_dir() else []
        if models:
            raise StoreError(
                f"--result_dir {folder} holds a model ({models[0]}) and no checkpoint to continue "
                "from: it would be overwritten. Give a new folder"
            )
        curve, interval = folder / "loss.csv", self._config.checkpoint_interval
        n_steps = max(0, len(curve.read_text().splitlines()) - 1) if curve.is_file() else 0
        if resume and interval and n_steps > interval:
            raise StoreError(
                f"--result_dir {folder} holds {n_steps} steps of a run and no checkpoint, though "
                f"one is made every {interval} steps: restore {FOLDER}/, or give a new folder"
            )
        if resume and n_steps and self._world.rank == 0:
            print(
                f"no checkpoint in {folder} yet: starting from the beginning; the {n_steps} steps "
                "there are repeated",
                file=sys.stderr,
                flush=True,
            )
        return None

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return ``(shared state, this rank's state)`` of a checkpoint.

        ``ConfigError`` if it has other settings, documents or another number of ranks.
        """
        shared = _load(path, STATE)
        recorded = _BEFORE | current_names(TrainConfig, shared["settings"])
        theirs, ours = (
            {name if name == "ranks" else f"--{name}": value for name, value in settings.items()}
            for settings in (recorded, self._settings)
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
        return shared, _load(path, self._rank_file)

    def save(
        self,
        step: int,
        model: Any,
        tokenizer: Any,
        optimizer: torch.optim.Optimizer,
        curve: list[dict[str, Any]],
        rank_state: dict[str, Any],
    ) -> Path:
        """Write a checkpoint under a temporary name, publish it, and delete older ones.

        The model is without its wrapper; ``rank_state`` is this rank's data position and engine.
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
                shared = {"step": step, "settings": self._settings}
                shared |= {"optimizer": optimizer.state_dict(), "curve": curve}
                _save(shared, work / STATE)
            _save({**rank_state, "random": random_state()}, work / self._rank_file)
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
    """Put model and tokenizer into ``result_dir``, the weights last: they mark a finished run."""
    work = result_dir / f".saving-{os.getpid()}"
    with explain_os_errors(result_dir):
        work.mkdir(parents=True)
        try:
            _save_model(work, model, tokenizer)
            for path in sorted(work.iterdir(), key=lambda p: p.suffix == WEIGHTS):
                os.replace(path, result_dir / path.name)
        finally:
            shutil.rmtree(work)


def _save(state: dict[str, Any], path: Path) -> None:
    try:
        torch.save(state, path)
    except RuntimeError as error:  # torch's writer raises it for a full disk
        raise _no_space(path, error) from error


def _save_model(folder: Path, model: Any, tokenizer: Any) -> None:
    try:
        with no_progress_bars():
            model.save_pretrained(folder)
    except SafetensorError as error:
        raise _no_space(folder, error) from error
    tokenizer.save_pretrained(folder)


def _load(checkpoint: Path, name: str) -> dict[str, Any]:
    try:
        return torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises many kinds for a torn archive
        raise StoreError(
            f"the checkpoint {checkpoint} is damaged ({name}: {_reason(error)}): train without "
            "--resume into a new --result_dir"
        ) from error


def _no_space(path: Path, error: Exception) -> StoreError:
    return StoreError(f"cannot write {path}: {_reason(error)}. Free space there, then start again")


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def random_state() -> dict[str, Any]:
    """Return the state of torch's generators, which dropout draws from."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
