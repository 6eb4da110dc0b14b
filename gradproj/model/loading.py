"""A checkpoint's files to a causal language model and its tokenizer."""

import importlib
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gradproj.errors import ModelError
from gradproj.model.checkpoint import ModelFiles, no_progress_bars
from gradproj.model.config import ARCHITECTURES, MODEL_DTYPES


def load_model_config(files: ModelFiles) -> Any:
    """transformers' config of the model."""
    config = files.config
    if files.model_dir is None:
        shape = ARCHITECTURES[config.architecture][1]
        return transformers.GPT2Config(**shape)
    folder = files.base_dir or files.model_dir
    try:
        return AutoConfig.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"--model {folder}: its config cannot be used: {str(error).splitlines()[0]}"
        ) from error


def model_skeleton(files: ModelFiles) -> nn.Module:
    """The model's modules without memory for weights, for checks that need only names and shapes."""
    with torch.device("meta"):
        model = _from_config(files, load_model_config(files))
        if files.base_dir is not None:
            peft = importlib.import_module("peft")
            model = peft.inject_adapter_in_model(
                peft.PeftConfig.from_pretrained(files.model_dir), model, "default"
            )
        return model


def _from_config(files: ModelFiles, config: Any) -> nn.Module:
    try:
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=files.config.trust_remote_code
        )
    except ValueError as error:
        raise ModelError(
            f"--model: {str(error).splitlines()[0]} It must be a causal language model"
        ) from error


def load_model(files: ModelFiles, device: torch.device) -> nn.Module:
    """The model on its device, weights frozen, in eval mode.

    Raises:
        ModelError: the weights do not fit the config, or cannot be read.
    """
    config = files.config
    dtype = MODEL_DTYPES[config.model_dtype]
    model = _random_model(files, dtype) if config.init == "random" else _load_weights(files, dtype)
    model = model.requires_grad_(False).eval().to(device)
    _check_causal(model, config.model or config.architecture)
    return model


@torch.no_grad()
def _check_causal(model: Any, name: str) -> None:
    """Refuse a model in which a later token changes what is said of earlier ones.

    Padding on the right needs no mask only because nothing looks to the right.
    """
    size = min(64, model.get_input_embeddings().weight.shape[0])
    ids = torch.arange(8, device=model.device).remainder(size).unsqueeze(0)
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % size
    before, after = (
        model(input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, changed)
    )
    # A position's arithmetic is the same in both, so that causal models agree to the last bit.
    if (before - after).abs().max() > 1e-5 * before.abs().max():
        raise ModelError(
            f"--model {name} ({type(model).__name__}) is not causal: a later token changes what it says of "
            "earlier ones (a bidirectional model needs is_decoder in its config)"
        )


def _random_model(files: ModelFiles, dtype: torch.dtype) -> nn.Module:
    # The CPU's generator, whatever the device: every rank draws the same weights; its state is put back.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.config.seed)
        return _from_config(files, load_model_config(files)).to(dtype)


def _load_weights(files: ModelFiles, dtype: torch.dtype) -> nn.Module:
    config, folder = files.config, files.model_dir
    try:
        with no_progress_bars():
            # With output_loading_info it returns a pair, which its annotations do not say.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder),
                dtype=dtype,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=None if config.allow_pickle else True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # only so that they are reported, by name, below
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds for a bad checkpoint
        raise ModelError(
            f"--model {folder} cannot be loaded: {type(error).__name__}: {_first_line(error)}"
        ) from error
    model, report = loaded
    # transformers fills what a checkpoint lacks with random numbers, with no more than a warning.
    lacking = sorted(report["missing_keys"]) + sorted(key[0] for key in report["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"--model {folder}: {len(lacking)} of the model's weights are not in the checkpoint or have another "
            f"shape: {', '.join(lacking[:4])}"
        )
    return model


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def load_tokenizer(files: ModelFiles) -> Any:
    """The tokenizer, which splits text of any length without a warning.

    Raises:
        ModelError: none there, or it lacks a special token that ``--special_tokens`` asks for.
    """
    config = files.config
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            files.tokenizer_dir, trust_remote_code=config.trust_remote_code, local_files_only=True
        )
    except Exception as error:  # as many kinds as there are tokenizers
        raise ModelError(
            f"{files.tokenizer_dir} holds no tokenizer that loads ({_first_line(error)}); give --tokenizer"
        ) from error
    tokenizer.model_max_length = int(1e30)
    if "bos" in config.special_tokens and tokenizer.bos_token_id is None:
        raise ModelError(
            f"--special_tokens {config.special_tokens}: the tokenizer has no bos token"
        )
    if "eos" in config.special_tokens and tokenizer.eos_token_id is None:
        raise ModelError(
            f"--special_tokens {config.special_tokens}: the tokenizer has no eos token"
        )
    return tokenizer


def check_vocabulary(tokenizer: Any, model_config: Any) -> int:
    """The number of token ids that the model knows.

    Raises:
        ModelError: the tokenizer makes ids beyond it.
    """
    size = model_config.get_text_config().vocab_size
    if len(tokenizer) > size:
        raise ModelError(
            f"the tokenizer has {len(tokenizer):,} tokens, the model's vocabulary only {size:,}: "
            "give the --tokenizer that belongs to the model"
        )
    return size


def positions_of(model_config: Any) -> int | None:
    """The longest sequence that the model was made for, or None where its config does not say."""
    text = model_config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)
