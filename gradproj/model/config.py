"""Which model and tokenizer to load, and in which precision."""

from dataclasses import dataclass, field
from typing import Any

import torch

from gradproj.errors import ConfigError

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2-Small": ("gpt2", {"n_embd": 768, "n_layer": 12, "n_head": 12}),
    "GPT2-Medium": ("gpt2-medium", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "GPT2-Large": ("gpt2-large", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
}
"""Name -> (the hub's checkpoint, the shapes for random weights)."""

SPECIAL_TOKENS = ("tokenizer", "none", "bos", "bos_eos")


MODEL_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which weights, which tokenizer, in which precision. Part of the run's identity."""

    model: str = field(default="", metadata={"help": "a local directory or a name on the hub"})
    architecture: str = field(
        default="",
        metadata={
            "help": "in place of --model: the hub's checkpoint of that shape",
            "choices": tuple(ARCHITECTURES),
        },
    )
    init: str = field(
        default="",
        metadata={"help": "'random': the architecture (or --model's config) with random weights"},
    )
    seed: int = field(default=0, metadata={"help": "seed of random weights"})
    revision: str = field(default="", metadata={"help": "branch, tag or commit on the hub"})
    tokenizer: str = field(
        default="", metadata={"help": "directory or hub name; default: the model's own"}
    )
    special_tokens: str = field(
        default="tokenizer",
        metadata={
            "help": "put around a document: what the tokenizer adds itself, or this",
            "choices": SPECIAL_TOKENS,
        },
    )
    model_dtype: str = field(
        default="float32",
        metadata={"help": "precision of weights and activations", "choices": tuple(MODEL_DTYPES)},
    )
    trust_remote_code: bool = field(
        default=False, metadata={"help": "run code that the checkpoint brings along"}
    )
    allow_pickle: bool = field(
        default=False,
        metadata={"help": "load .bin weights (they can run code); default: safetensors only"},
    )

    def __post_init__(self) -> None:
        if bool(self.model) == bool(self.architecture):
            raise ConfigError("give --model or --architecture, one of them")
        if self.architecture and self.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"--architecture is {self.architecture!r}; choose one of {', '.join(ARCHITECTURES)}"
            )
        if self.init not in ("", "random"):
            raise ConfigError(f"--init is {self.init!r}; 'random' is the only one, or leave it out")
        if self.special_tokens not in SPECIAL_TOKENS:
            raise ConfigError(
                f"--special_tokens is {self.special_tokens!r}; choose one of {', '.join(SPECIAL_TOKENS)}"
            )
        if self.model_dtype not in MODEL_DTYPES:
            raise ConfigError(
                f"--model_dtype is {self.model_dtype!r}; choose one of {', '.join(MODEL_DTYPES)}"
            )
        if self.init == "random" and self.architecture and not self.tokenizer:
            raise ConfigError(
                "--architecture with --init random has no tokenizer of its own: give --tokenizer DIR"
            )
