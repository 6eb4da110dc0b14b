"""From a checkpoint's files to its tokenizer."""

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from gradproj.errors import ModelError
from gradproj.formatting import first_line
from gradproj.model.checkpoint import ModelFiles
from gradproj.model.quantized import source_arguments


def load_tokenizer(files: ModelFiles) -> Any:
    """Load the tokenizer, without its limit on the length of a text.

    Raises:
        ModelError: there is none, or it lacks a token that ``--special_tokens`` needs.
    """
    config = files.config
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **source_arguments(files.tokenizer_dir),
            trust_remote_code=config.trust_remote_code,
            local_files_only=True,
        )
    except Exception as error:  # every tokenizer class raises its own types
        raise ModelError(
            f"{files.tokenizer_dir} holds no tokenizer that loads "
            f"{_missing_packages(files.tokenizer_dir) or f'({first_line(error)}); '}"
            "give --tokenizer"
        ) from error
    tokenizer.model_max_length = int(1e30)
    for name in ("bos", "eos"):
        if name in config.special_tokens and getattr(tokenizer, f"{name}_token_id") is None:
            raise ModelError(
                f"--special_tokens {config.special_tokens}: the tokenizer has no {name} token"
            )
    return tokenizer


def _missing_packages(folder: Path) -> str:
    """Return what to install for a tokenizer that is a sentencepiece model only."""
    for path in sorted({*folder.glob("*.model"), *folder.glob("*.spm")}):
        with path.open("rb") as file:
            # The first field of its protobuf message. Files of tiktoken are lines of base64.
            if file.read(1) != b"\n":
                continue
        needed = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}
        missing = [name for name, module in needed.items() if not _is_there(module)]
        if missing:
            names = " ".join(missing)
            return f"without {names}, which reads {path.name}: pip install {names}, or "
    return ""


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it
        return False


def larger_tokenizer(n_tokens: int, vocabulary: int) -> str:
    """Return words for a tokenizer with more tokens than the model's vocabulary; else nothing.

    Many models come with a token that has no embedding and that no text contains.
    """
    if n_tokens <= vocabulary:
        return ""
    return f"{n_tokens:,} tokens, and the model's vocabulary only {vocabulary:,}"
