"""Find or download a model's files and check that they are complete."""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)
from safetensors import SafetensorError, safe_open

from gradproj.errors import ModelError
from gradproj.model.adapter import base_of, is_adapter
from gradproj.model.config import ARCHITECTURES, ModelConfig

GGUF_SUFFIX = ".gguf"


@dataclass(frozen=True)
class ModelFiles:
    """Paths of a model's files on this machine. After ``fetch`` the hub is not used again."""

    config: ModelConfig
    model_dir: Path | None
    """A folder, or a GGUF file; None for ``--architecture`` with random weights."""
    base_dir: Path | None
    """The folder of a PEFT adapter's base model; None for a whole model."""
    tokenizer_dir: Path
    """A folder, or a GGUF file."""
    weights: tuple[Path, ...]
    """Every weight file, including a base model's; empty for random weights."""
    revision: str
    """Commit on the hub; empty for a local directory."""

    @property
    def adapter_dir(self) -> Path | None:
        """The folder of a PEFT adapter; None for a whole model."""
        return None if self.base_dir is None else self.model_dir


def is_local_model(name: str) -> bool:
    """Return whether ``--model`` names a directory or a GGUF file on this machine."""
    path = Path(name)
    return bool(name) and (path.is_dir() or (path.suffix == GGUF_SUFFIX and path.is_file()))


def fetch(config: ModelConfig, *, may_download: bool = True) -> ModelFiles:
    """Find or download the files of model and tokenizer.

    ``may_download`` is False on all ranks but the first of a node, once that one has finished.

    Raises:
        ModelError: the files do not exist, cannot be downloaded, or hold no usable weights.
    """
    name = config.model or ARCHITECTURES[config.architecture][0]
    model_dir = base_dir = None
    revision, weights = "", []
    if not (config.architecture and config.init):
        model_dir, revision = _local_files(
            "--model", name, config.revision, may_download, config.allow_pickle
        )
        is_file = model_dir.suffix == GGUF_SUFFIX
        if is_adapter(model_dir):
            base_dir = _base_folder(model_dir, config, may_download)
            if config.init:
                raise ModelError(f"--init random draws a whole model; {name} is a PEFT adapter")
        if base_dir is None and not is_file and not (model_dir / "config.json").is_file():
            raise ModelError(
                f"--model {name}: {model_dir} holds no config.json; is it a model's directory?"
            )
        if not config.init:
            places = [model_dir] if base_dir is None else [base_dir, model_dir]
            weights = [
                path for place in places for path in _weight_files(place, config.allow_pickle)
            ]
    if config.tokenizer:
        tokenizer_dir, _ = _local_files("--tokenizer", config.tokenizer, "", may_download)
    else:
        # ModelConfig requires --tokenizer if there is no model directory.
        assert model_dir is not None
        has_tokenizer = (model_dir / "tokenizer_config.json").is_file()
        tokenizer_dir = model_dir if has_tokenizer or base_dir is None else base_dir
    for path in weights:
        if path.suffix == ".safetensors":
            _check_whole(path)
    return ModelFiles(config, model_dir, base_dir, tokenizer_dir, tuple(weights), revision)


def _base_folder(adapter: Path, config: ModelConfig, may_download: bool) -> Path:
    name, revision = base_of(adapter)
    revision = "" if Path(name).is_dir() else revision
    folder, _ = _local_files(
        "--model (the adapter's base)", name, revision, may_download, config.allow_pickle
    )
    if is_adapter(folder):
        raise ModelError(
            f"--model {adapter}: its base {name} is a PEFT adapter too; merge that one into its "
            "own base first (merge_and_unload)"
        )
    return folder


def _check_whole(path: Path) -> None:
    # The header of a safetensors file holds the file's length, so a truncated file is noticed.
    try:
        with safe_open(path, framework="np"):
            return
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}): copy or download it again") from error


def _local_files(
    flag: str, name: str, revision: str, may_download: bool, pickled: bool = False
) -> tuple[Path, str]:
    """Return ``(folder or GGUF file, hub commit)``. The commit is empty for a local one."""
    if is_local_model(name):
        if revision:
            raise ModelError(f"--revision {revision}: {name} is local, and has no revisions")
        return Path(name), ""
    is_gguf = name.endswith(GGUF_SUFFIX)
    if is_gguf or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{flag} {name}: no such {'file' if is_gguf else 'directory'}")
    endings = ["json", "safetensors", "model", "txt", "py", "jinja", *(["bin"] if pickled else [])]
    try:
        with no_progress_bars():
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision or None,
                allow_patterns=[f"*.{ending}" for ending in endings],
                local_files_only=not may_download,
            )
    except LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        reason = "HF_HUB_OFFLINE is set" if offline else "the hub could not be reached"
        raise ModelError(
            f"{flag} {name}: not a directory here, not in the local Hugging Face cache, and "
            f"{reason}. Download it where there is a network (hf download NAME) and give its "
            "directory"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{flag} {name}: neither a local directory nor available on the hub: {reason}"
        ) from error
    return Path(folder), Path(folder).name


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """Return the weight files: safetensors, or pickles if allowed. Raises if any is missing.

    ``folder`` may be a GGUF file, which holds its own.
    """
    if folder.suffix == GGUF_SUFFIX and folder.is_file():
        return [folder]
    names = ["model.safetensors", "adapter_model.safetensors"]
    if allow_pickle:
        names += ["pytorch_model.bin", "adapter_model.bin"]
    for name in names:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _indexed_files(index)
        if (folder / name).is_file():
            return [folder / name]
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled and not allow_pickle:
        raise ModelError(
            f"--model {folder} has its weights only as {pickled[0]}, a pickle, which can run code: "
            "convert it to safetensors, or give --allow_pickle if you trust its source"
        )
    raise ModelError(
        f"--model {folder} holds no weights (model.safetensors or model.safetensors.index.json)"
    )


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weights: {error}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {', '.join(missing[:4])} "
            f"({len(missing)} of {len(names)} weight files)"
        )
    return [index.parent / name for name in names]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the bars of transformers and huggingface_hub: a job shows its own progress."""
    # On use: a plan that downloads nothing does not wait for it.
    from transformers.utils import logging as transformers_logging

    hub_was_silent = are_progress_bars_disabled()
    were_shown = transformers_logging.is_progress_bar_enabled()
    with warnings.catch_warnings():
        # The hub warns if HF_HUB_DISABLE_PROGRESS_BARS, which has priority, is set.
        warnings.simplefilter("ignore")
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if were_shown:
                transformers_logging.enable_progress_bar()
            (disable_progress_bars if hub_was_silent else enable_progress_bars)()
