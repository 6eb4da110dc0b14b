"""Which checkpoints are quantized, what becomes of their weights here, and how they are loaded."""

import functools
import importlib
import importlib.util
import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from gradproj.errors import ModelError
from gradproj.model.checkpoint import GGUF_SUFFIX
from gradproj.model.config import ModelConfig

BITSANDBYTES, TORCHAO, GGUF = "bitsandbytes", "torchao", "gguf"
_PACKAGES = {
    BITSANDBYTES: ("accelerate", "bitsandbytes"),
    TORCHAO: ("torchao",),
    GGUF: ("accelerate", "gguf"),
    "compressed-tensors": ("compressed_tensors",),
}
"""transformers' name of a method -> what it needs; any other needs accelerate."""
_NOT_IN_EXTRA = ("compressed_tensors",)


@dataclass(frozen=True)
class Quantization:
    """A model's kind of quantization, and what becomes of its weights here."""

    method: str
    """transformers' name."""
    name: str
    """For people: the method and its kind."""
    stays_packed: bool
    on_load: bool
    """Quantized here, from the weights of a checkpoint that is not."""

    @property
    def line(self) -> str:
        """Words for the plan."""
        of = f"to {self.name}, on load" if self.on_load else self.name
        if self.stays_packed:
            return (
                f"{of}: linear layers stay packed, fused experts and the head do not; each product "
                "unpacks one (--dequantize: all, once)"
            )
        return f"{of}: weights are dequantized on load"


def quantization_of(model_config: Any, config: ModelConfig, is_gguf: bool) -> Quantization | None:
    """Return how a checkpoint is quantized, or is to be; None if it is not.

    Args:
        model_config: transformers'.
        config: the flags.
        is_gguf: the checkpoint is a GGUF file.

    Raises:
        ModelError: transformers cannot dequantize it and its layers cannot stay packed; a package
            is missing; or the flags ask for what cannot be.
    """
    settings = _settings_of(model_config)
    if is_gguf:
        settings = {"quant_method": GGUF}
    name = _name_of(settings) if settings else f"{BITSANDBYTES} {config.quantize}"
    if config.quantize and settings:
        raise ModelError(
            f"--quantize {config.quantize}: --model {config.model} is quantized already ({name}); "
            "leave --quantize out"
        )
    if config.init or not (settings or config.quantize):
        return None
    method = str(settings["quant_method"]) if settings else BITSANDBYTES
    can_pack = method in (BITSANDBYTES, TORCHAO)
    if not can_pack and not _transformers_dequantizes(method):
        raise ModelError(
            f"--model {config.model} is quantized by {method}: such layers give their inputs no "
            "gradient here, and transformers cannot dequantize them on load. Give the checkpoint "
            "that it was made from (--quantize nf4 makes that small too), or save a dequantized "
            "copy with the tool that made it"
        )
    flag = "quantize" if config.quantize else "model"
    check_packages(method, f"--{flag} {getattr(config, flag)}")
    return Quantization(
        method, name, stays_packed=can_pack and not config.dequantize, on_load=not settings
    )


def _settings_of(model_config: Any) -> dict[str, Any]:
    """Return the entry ``quantization_config`` of a config; empty if the model is not quantized."""
    for each in (model_config, model_config.get_text_config(decoder=True)):
        settings = getattr(each, "quantization_config", None)
        if settings:
            settings = settings if isinstance(settings, dict) else settings.to_dict()
            # bitsandbytes' older files do not name it.
            return {"quant_method": BITSANDBYTES, **settings}
    return {}


def _name_of(settings: Mapping[str, Any]) -> str:
    method = str(getattr(settings["quant_method"], "value", settings["quant_method"]))
    if method == BITSANDBYTES:
        is_8bit = settings.get("load_in_8bit") or settings.get("_load_in_8bit")
        return f"{method} {'int8' if is_8bit else settings.get('bnb_4bit_quant_type', 'fp4')}"
    if method == TORCHAO:
        kind = settings.get("quant_type")
        kind = kind.get("default", {}) if isinstance(kind, dict) else kind
        kind = kind.get("_type", "") if isinstance(kind, dict) else kind
        return f"{method} {str(kind).removesuffix('Config')}".strip()
    return "GGUF" if method == GGUF else method


def _transformers_dequantizes(method: str) -> bool:
    """Return whether transformers unpacks weights of this method while it loads them."""
    kinds = importlib.import_module("transformers.quantizers.auto").AUTO_QUANTIZATION_CONFIG_MAPPING
    kind = kinds.get(method)
    return kind is not None and "dequantize" in inspect.signature(kind.__init__).parameters


def block_of(model_config: Any) -> tuple[int, int] | None:
    """Return the rows and columns of an fp8 weight that share a scale; None without such blocks."""
    block = _settings_of(model_config).get("weight_block_size")
    return tuple(block) if block else None


@functools.cache
def check_blocks(weights: tuple[Path, ...], block: tuple[int, int]) -> None:
    """Refuse fp8 weights that do not come out even in blocks, each of which has a scale.

    transformers 5.24 divides such a weight into as many equal blocks as it has scales, and so
    multiplies some values with another block's scale, in silence.

    Raises:
        ModelError: names the weight.
    """
    shapes: dict[str, list[int]] = {}
    for path in weights:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            header.pop("__metadata__", None)
            shapes |= {name: each["shape"] for name, each in header.items()}
    for name, scales in shapes.items():
        weight = name.removesuffix("_scale_inv")
        sides = zip(shapes.get(weight, ())[-2:], scales[-2:], block, strict=False)
        # A weight with blocks of its own (fp4) has another number of scales.
        if weight != name and any(k > 1 and n % b and k == -(-n // b) for n, k, b in sides):
            raise ModelError(
                f"--model: the fp8 weight {weight} {tuple(shapes[weight])} does not come out even "
                f"in blocks of {block}, and transformers would dequantize it wrongly. Give the "
                "checkpoint that it was made from, or save a dequantized copy with the tool that "
                "made it"
            )


def packed_bytes(skeleton: Any, quantization: Quantization, dtype: torch.dtype) -> int:
    """Estimate the bytes of a model whose layers stay packed; the rest of it has ``dtype``."""
    head = skeleton.get_output_embeddings()
    packed = {
        id(module.weight)
        for module in skeleton.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    }
    # Four bits, and a float32 scale for 64 weights; or a byte.
    is_4bit = quantization.name.endswith(("nf4", "fp4")) or "Int4" in quantization.name
    each = 0.5625 if is_4bit else 1
    return int(
        sum(
            weight.numel() * (each if id(weight) in packed else dtype.itemsize)
            for weight in skeleton.parameters()
        )
    )


def check_packages(method: str, what: str) -> None:
    """Raise ``ModelError`` if a package is missing that ``what`` needs; names the extra."""
    needed = _PACKAGES.get(method, ("accelerate",))
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if not missing:
        return
    names = " ".join(missing).replace("_", "-")
    extra = "'gradproj[quantized]'" if not set(missing) & set(_NOT_IN_EXTRA) else names
    raise ModelError(f"{what} needs {names}, which is not installed: pip install {extra}")


def loading_arguments(quantization: Quantization, model_config: Any) -> dict[str, Any]:
    """Return further arguments of ``from_pretrained`` for a quantized model.

    ``model_config`` is changed. The weights are loaded on the CPU, where every rank quantizes
    alike.
    """
    arguments: dict[str, Any] = {"device_map": {"": "cpu"}}
    library = importlib.import_module("transformers")
    if quantization.on_load:
        # Of a float32 checkpoint's weights in bfloat16 other packed weights would be made.
        arguments["dtype"] = torch.float32
        kind = quantization.name.rpartition(" ")[2]
        arguments["quantization_config"] = library.BitsAndBytesConfig(
            load_in_8bit=kind == "int8",
            load_in_4bit=kind != "int8",
            bnb_4bit_quant_type="fp4" if kind == "int8" else kind,
        )
    elif quantization.method == GGUF:
        arguments["quantization_config"] = library.GgufConfig(dequantize=True)
    elif quantization.method not in (BITSANDBYTES, TORCHAO):
        for each in (model_config, model_config.get_text_config(decoder=True)):
            if getattr(each, "quantization_config", None):
                each.quantization_config = {**_settings_of(each), "dequantize": True}
    return arguments


def source_arguments(path: Path) -> dict[str, Any]:
    """Return ``from_pretrained``'s arguments for a folder or a GGUF file.

    Raises:
        ModelError: a package that reads the file is missing.
    """
    if path.suffix != GGUF_SUFFIX:
        return {"pretrained_model_name_or_path": str(path)}
    check_packages(GGUF, str(path))
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
