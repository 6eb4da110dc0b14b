"""Checkpoints of a training run: a Hugging Face folder with what training needs to go on, published by one rename."""

import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from gradproj.errors import ConfigError, StoreError
from gradproj.store.files import explain_os_errors, fsync_dir
from gradproj.training.config import TrainConfig
from gradproj.training.ranks import Ranks

FOLDER = "checkpoints"
"""Below ``result_dir``."""
STATE = "training_state.pt"
WEIGHTS = ".safetensors"

_NAME = re.compile(r"step-(\d{8,})")


def rank_file(rank: int) -> str:
    """A rank's own state in a checkpoint."""
    return f"rank-{rank:05d}.pt"


class Checkpoints:
    """The checkpoints of one run, of which the newest is kept."""

    def __init__(self, result_dir: Path, config: TrainConfig, ranks: Ranks) -> None:
        self._result_dir, self._folder = result_dir, result_dir / FOLDER
        self._config, self._ranks = config, ranks

    def newest(self) -> Path | None:
        """The folder of the newest whole checkpoint, or None."""
        if not self._folder.is_dir():
            return None
        found = sorted(path for path in self._folder.iterdir() if _NAME.fullmatch(path.name))
        return found[-1] if found else None

    def to_resume(self) -> Path | None:
        """The checkpoint to go on from; None to begin.

        Raises:
            StoreError: there is one, and ``--resume`` was not given.
        """
        newest = self.newest()
        if newest is not None and not self._config.resume:
            raise StoreError(
                f"--result_dir {self._result_dir} holds a run's checkpoint ({newest.name}): "
                "go on from it with --resume, or give a new folder"
            )
        return newest

    def load(self, path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
        """``(what all ranks share, this rank's own)`` of a checkpoint.

        Raises:
            ConfigError: the run was made with other settings or another number of ranks.
        """
        shared = torch.load(path / STATE, map_location="cpu", weights_only=True)
        wanted = self._config.settings_of_the_run() | {"ranks": self._ranks.world_size}
        known = shared["settings"]
        differences = [
            f"  --{name}: checkpoint {known.get(name)!r}, this run {value!r}"
            for name, value in wanted.items()
            if known.get(name) != value
        ]
        if differences:
            raise ConfigError(
                f"cannot resume from {path}: it was made with other settings\n"
                + "\n".join(differences).replace("--ranks", "ranks")
                + "\nResume with the same settings, or give --result_dir a new path"
            )
        own = torch.load(path / rank_file(self._ranks.rank), map_location="cpu", weights_only=True)
        return shared, own

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
            if self._ranks.is_first:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            self._ranks.wait()
            if self._ranks.is_first:
                model.save_pretrained(work)
                tokenizer.save_pretrained(work)
                settings = self._config.settings_of_the_run() | {"ranks": self._ranks.world_size}
                shared = {
                    "step": step, "settings": settings, "optimizer": optimizer.state_dict(), "curve": curve,
                }  # fmt: skip
                torch.save(shared, work / STATE)
            torch.save({**own, "random": random_state()}, work / rank_file(self._ranks.rank))
            self._ranks.wait()
            if self._ranks.is_first:
                self._publish(work, final)
            self._ranks.wait()
        return final

    def _publish(self, work: Path, final: Path) -> None:
        for path in work.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        fsync_dir(work)
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
            model.save_pretrained(work)
            tokenizer.save_pretrained(work)
            for path in sorted(work.iterdir(), key=lambda p: p.suffix == WEIGHTS):
                os.replace(path, result_dir / path.name)
        finally:
            shutil.rmtree(work)


def random_state() -> dict[str, Any]:
    """Of torch's generators, from which dropout draws."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def restore_random_state(state: dict[str, Any]) -> None:
    """Put back what ``random_state`` gave."""
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
