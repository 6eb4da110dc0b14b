"""PEFT adapters: which base model they need, and a model with its adapter inside."""

import functools
import importlib
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from gradproj.errors import ModelError
from gradproj.model.properties import acts_in_layers_alone

SETTINGS = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE_MODEL = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")

_MERGE = "Merge it where it was trained (merge_and_unload) and save the whole model"
_REFUSED = {
    "POLY": "needs a task's number with each text: gradproj has none to give. It loads adapters of "
    "layers, such as LoRA",
    "HRA": "multiplies by copies of its layers' weights, so that these get no gradient. " + _MERGE,
}
"""PEFT's kind -> why it is refused, and a way out."""
_PREFIX = "base_model.model."
"""Prefix of the base model's names in an adapter's file."""


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter, perhaps with a copy of its base's config.json.

    Raises:
        ModelError: it holds the weights of a whole model too.
    """
    if not (folder / SETTINGS).is_file():
        return False
    whole = [name for name in WHOLE_MODEL if (folder / name).is_file()]
    if whole and any((folder / name).is_file() for name in WEIGHTS):
        raise ModelError(
            f"--model {folder} holds a whole model ({whole[0]}) and a PEFT adapter ({SETTINGS}): "
            "move one of them to a folder of its own"
        )
    return not whole


def base_of(folder: Path) -> tuple[str, str]:
    """Return the name and the revision of an adapter's base model.

    Raises:
        ModelError: PEFT is missing, the settings name no base, or the adapter is of a kind that
            acts outside of the model's layers, or on more than tokens.
    """
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"--model {folder} is a PEFT adapter: pip install 'gradproj[peft]'")
    path = folder / SETTINGS
    try:
        settings = json.loads(path.read_text("utf-8"))
        base, revision = settings["base_model_name_or_path"], settings.get("revision")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} does not name the adapter's base model: {error}") from error
    if not isinstance(base, str) or not base:
        raise ModelError(
            f"{path} does not name the adapter's base model: base_model_name_or_path is "
            f"{json.dumps(base)}; write the base model's directory or hub name there"
        )
    config = _config(folder)
    if config.peft_type in _REFUSED:
        raise ModelError(
            f"--model {folder} is a PEFT adapter of kind {_kind(config)}, which "
            f"{_REFUSED[config.peft_type]}"
        )
    if config.is_prompt_learning or getattr(config, "alora_invocation_tokens", None):
        raise _outside_of_the_layers(folder)
    return base, revision if isinstance(revision, str) else ""


def _config(folder: Path) -> Any:
    try:
        return importlib.import_module("peft").PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # PEFT raises many types
        raise _cannot_load(folder, error) from error


def vocabulary_size(folder: Path, base: nn.Module) -> int | None:
    """Return the rows of the base's token embedding that an adapter brings with it.

    Training after ``resize_token_embeddings`` saves the whole embedding. None without one.
    ``base`` may be on the meta device.
    """
    name = _name_of(base, base.get_input_embeddings())  # type: ignore[operator]
    shapes = _shapes(folder)
    for layer in ("", ".base_layer", ".token_adapter.base_layer"):
        shape = shapes.get(f"{_PREFIX}{name}{layer}.weight")
        if shape:
            return shape[0]
    return None


def brings_embedding(folder: Path) -> bool:
    """Return whether an adapter's file may hold an embedding, so that its name is looked up."""
    return any(name.endswith(".weight") and ".lora_" not in name for name in _shapes(folder))


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)


@functools.lru_cache(maxsize=4)
def _shapes(folder: Path) -> Mapping[str, tuple[int, ...]]:
    """Return the shapes of the tensors in an adapter's file."""
    path = next(folder / name for name in WEIGHTS if (folder / name).is_file())
    try:
        if path.suffix == ".bin":
            tensors = torch.load(path, map_location="meta", weights_only=True)
            return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        with safe_open(path, framework="pt") as file:
            return {
                name: tuple(file.get_slice(name).get_shape())
                for name in file.keys()  # noqa: SIM118
            }
    except Exception as error:  # a damaged file raises many types
        raise _cannot_load(folder, error) from error


def inject(folder: Path, base: nn.Module) -> nn.Module:
    """Put an adapter's layers into a model, which may be on the meta device: no weights."""
    return _wrapped(folder, base).get_base_model()


def _wrapped(folder: Path, base: nn.Module) -> Any:
    try:
        # In the dtype of the base's weights, as transformers loads it.
        return importlib.import_module("peft").PeftModelForCausalLM(
            base, _config(folder), autocast_adapter_dtype=False
        )
    except Exception as error:
        refused = _cannot_load(folder, error)
        if next(base.parameters()).is_meta and "meta" in str(error):
            kind = _kind(_config(folder))
            refused = ModelError(
                f"--model {folder}: PEFT cannot build an adapter of kind {kind} without "
                f"weights, as the plan does. {_MERGE}"
            )
        raise refused from error


def load_adapter(folder: Path, base: Any, merged: bool = False) -> nn.Module:
    """Load an adapter into its base model, as PEFT does, and return that model.

    ``merged``: its weights are added to those of the base, and its layers are gone.

    Raises:
        ModelError: weights are missing or have no place in the base; or the adapter's effect is
            not that of the layers alone.
    """
    rows, embedding = vocabulary_size(folder, base), base.get_input_embeddings().weight
    if rows not in (None, len(embedding)):
        base.resize_token_embeddings(rows, mean_resizing=False)
        _check_head(folder, base)
    model = _wrapped(folder, base)
    try:
        report = model.load_adapter(
            str(folder), "default", torch_device="cpu", autocast_adapter_dtype=False
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise _cannot_load(folder, error) from error
    missing = _not_loaded(model, report.missing_keys)
    # Weights that all layers share (VeRA's) have no layer's name, and are not read by every PEFT.
    unexpected = [name for name in report.unexpected_keys if name.startswith(_PREFIX)]
    if missing or unexpected:
        what = "lacks weights that its settings name" if missing else "has weights for other layers"
        names = ", ".join((missing or unexpected)[:4])
        raise ModelError(
            f"--model {folder}: the adapter {what} ({names}): is it the whole file, and of the "
            f"base model that {SETTINGS} names?"
        )
    try:
        in_layers = acts_in_layers_alone(model.eval())
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it needs more than token ids
        raise _cannot_load(folder, error) from error
    if not in_layers:
        raise _outside_of_the_layers(folder)
    if not merged:
        return model.get_base_model()
    try:
        return model.merge_and_unload()
    except Exception as error:  # kinds that no weight can stand for
        raise _cannot_load(folder, error) from error


def _check_head(folder: Path, base: Any) -> None:
    head = base.get_output_embeddings()
    if head is None or head.weight is base.get_input_embeddings().weight:
        return
    if f"{_PREFIX}{_name_of(base, head)}.weight" not in _shapes(folder):
        raise ModelError(
            f"--model {folder}: the adapter's vocabulary was resized to {len(head.weight):,} "
            f"tokens, but its file lacks the resized head. {_MERGE}"
        )


def _not_loaded(model: nn.Module, missing: list[str]) -> list[str]:
    """Return the missing names whose tensor was not loaded under another name either."""
    if not missing:
        return []
    tensors = model.state_dict(keep_vars=True)
    loaded = {id(tensor) for name, tensor in tensors.items() if name not in missing}
    return [name for name in missing if id(tensors[name]) not in loaded]


def _outside_of_the_layers(folder: Path) -> ModelError:
    return ModelError(
        f"--model {folder} is a PEFT adapter of kind {_kind(_config(folder))}, which acts on "
        "the input and not in the layers alone: the job cannot load it. It loads adapters of "
        "layers, such as LoRA; in Python, per_sample_loss takes the PeftModel itself"
    )


def _kind(config: Any) -> str:
    if getattr(config, "alora_invocation_tokens", None):
        return "aLoRA"
    return str(getattr(config.peft_type, "value", config.peft_type))


def _cannot_load(folder: Path, error: Exception) -> ModelError:
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    return ModelError(
        f"--model {folder}: PEFT cannot load the adapter: {type(error).__name__}: {reason}"
    )
