"""Settings: which model and tokenizer to load, and in which precision."""

from dataclasses import dataclass
from typing import Any

import torch

from gradproj.errors import ConfigError
from gradproj.flags import Flags, flag
from gradproj.model.tokenization import SPECIAL_TOKENS

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2-Small": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "GPT2-Medium": ("gpt2-medium", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "GPT2-Large": ("gpt2-large", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
}
"""Name -> (the hub's checkpoint, the shapes for random weights)."""

QUANTIZE = ("nf4", "fp4", "int8")
MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Flags, title="model"):
    """Which weights, which tokenizer, in which precision. Part of the run's identity."""

    model: str = flag(
        "Checkpoint: a local directory, a GGUF file or a name on the hub (this or --architecture "
        "is required).",
        "",
        path="DIR|FILE|NAME",
    )
    architecture: str = flag(
        "In place of --model: the hub's checkpoint of this shape.", "", choices=ARCHITECTURES
    )
    init: str = flag(
        "Random weights for --architecture (or for --model's configuration) in place of the "
        "checkpoint's.",
        "",
        choices=("random",),
    )
    seed: int = flag("Seed of random weights.", 0)
    revision: str = flag("Branch, tag or commit of the checkpoint on the hub.", "", metavar="NAME")
    tokenizer: str = flag(
        "Tokenizer: a directory or hub name; default: the model's own.", "", path="DIR|NAME"
    )
    special_tokens: str = flag(
        "Special tokens put around a document: those that the tokenizer adds itself, or these.",
        "tokenizer",
        choices=SPECIAL_TOKENS,
    )
    model_dtype: str = flag(
        "Precision of weights and activations.", "float32", choices=MODEL_DTYPES
    )
    quantize: str = flag(
        "Quantize the linear layers of the checkpoint on load, by bitsandbytes.",
        "",
        choices=QUANTIZE,
    )
    dequantize: bool = flag(
        "Unpack the weights of a quantized model once, on load: more memory for the same rows.",
        False,
    )
    trust_remote_code: bool = flag("Run code that comes with the checkpoint.", False)
    allow_pickle: bool = flag(
        "Load .bin weights, which can run code; default: safetensors only.", False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.model) == bool(self.architecture):
            raise ConfigError("give either --model or --architecture")
        if self.init == "random" and self.architecture and not self.tokenizer:
            raise ConfigError(
                "--architecture with --init random has no tokenizer of its own: "
                "give --tokenizer DIR"
            )
        if self.quantize and self.init:
            raise ConfigError(
                f"--quantize {self.quantize} is for the weights of a checkpoint, and --init "
                f"{self.init} draws new ones: leave one of them out"
            )
