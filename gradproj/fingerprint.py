"""Hashes of what a row depends on: weights, the model's config, the tokenizer."""

import hashlib
import json
from typing import Any

import torch

from gradproj.model import ModelFiles, load_model


def weights_fingerprint(files: ModelFiles) -> str:
    """A hash of the weights: of the checkpoint's files, or of the drawn weights."""
    digest = hashlib.sha256()
    if files.config.init == "random":
        for name, tensor in sorted(load_model(files, torch.device("cpu")).state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()[:32]
    for path in files.weights:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def config_fingerprint(model_config: Any) -> str:
    """A hash of what the config says of the computation, without names of paths and versions."""
    content = model_config.to_dict()
    for key in ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures"):
        content.pop(key, None)
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of how the tokenizer splits text and which special tokens it adds."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Set by use, not by the tokenizer's files.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = tokenizer.get_vocab()
    text = json.dumps([content, tokenizer.special_tokens_map], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
