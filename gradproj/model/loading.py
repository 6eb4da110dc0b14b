"""Load a checkpoint's files as a frozen causal language model and its tokenizer."""

from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from gradproj.errors import ModelError
from gradproj.formatting import first_line
from gradproj.model.adapter import brings_embedding, inject, load_adapter, vocabulary_size
from gradproj.model.block_shards import BlockShards, blocks_of, taken_while_loading
from gradproj.model.checkpoint import GGUF_SUFFIX, ModelFiles, no_progress_bars
from gradproj.model.config import ARCHITECTURES, MODEL_DTYPES
from gradproj.model.packed_layers import settle_quantized
from gradproj.model.properties import is_causal
from gradproj.model.quantized import (
    Quantization,
    block_of,
    check_blocks,
    loading_arguments,
    quantization_of,
    source_arguments,
)


def load_model_config(files: ModelFiles) -> Any:
    """Load transformers' config of the model (of its base for a PEFT adapter).

    Raises:
        ModelError: the config cannot be used.
    """
    config = files.config
    if files.model_dir is None:
        return transformers.GPT2Config(**ARCHITECTURES[config.architecture][1])
    loaded = _usable_config(files)
    if files.adapter_dir is not None and brings_embedding(files.adapter_dir):
        with torch.device("meta"):
            rows = vocabulary_size(files.adapter_dir, _from_config(files, loaded))
        loaded.get_text_config().vocab_size = rows or loaded.get_text_config().vocab_size
    return loaded


def _usable_config(files: ModelFiles) -> Any:
    """Load the config, of an attention that can be used; an adapter may resize its vocabulary."""
    loaded = _config_on_disk(files)
    if attention_note(files):
        loaded._attn_implementation = None
    return loaded


def _config_on_disk(files: ModelFiles) -> Any:
    folder = files.base_dir or files.model_dir
    assert folder is not None  # --architecture with random weights has no files
    trusted = files.config.trust_remote_code
    try:
        return AutoConfig.from_pretrained(
            **source_arguments(folder), trust_remote_code=trusted, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"--model {folder}: its config cannot be used: {str(error).splitlines()[0]}"
        ) from error


def model_quantization(files: ModelFiles) -> Quantization | None:
    """Return how the model (of an adapter: its base) is quantized; None if it is not.

    Raises:
        ModelError: it cannot be loaded, or not as the flags ask.
    """
    place = files.base_dir or files.model_dir
    if place is None:
        return None
    is_gguf, config = place.suffix == GGUF_SUFFIX, _config_on_disk(files)
    found = quantization_of(config, files.config, is_gguf)
    if found is not None and (block := block_of(config)):
        check_blocks(files.weights, block)
    return found


def attention_note(files: ModelFiles) -> str:
    """Return why the attention that a checkpoint's config names is not used; empty if it is.

    transformers' default takes its place, whose rows are equal up to rounding.
    """
    named = _config_on_disk(files)._attn_implementation if files.model_dir is not None else None
    if not isinstance(named, str) or named in ("eager", "sdpa", "flex_attention"):
        return ""
    if "/" in named:
        why = "is code from the hub, which is not downloaded"
    elif not _is_installed(named):
        why = "is not installed here"
    elif files.config.model_dtype == "float32":
        why = "takes no float32"
    else:
        return ""
    return f"transformers' default: the config names {named}, which {why}"


def loading_notes(files: ModelFiles) -> list[str]:
    """Return lines for people on what is loaded otherwise than the checkpoint says, or packed.

    Raises:
        ModelError: see ``model_quantization``.
    """
    attention, quantization = attention_note(files), model_quantization(files)
    lines = [f"attention     {attention}"] if attention else []
    return [*lines, *([f"quantized     {quantization.line}"] if quantization else [])]


def _is_installed(attention: str) -> bool:
    """Return whether a kind of flash attention can be used on this machine."""
    number = attention.removeprefix("flash_attention_")
    check = getattr(transformers.utils, f"is_flash_attn_{number}_available", None)
    return check is not None and check()


def model_skeleton(files: ModelFiles, merged: bool = False) -> nn.Module:
    """Build the model on the meta device: names and shapes of its modules, without memory.

    ``merged``: as for ``load_model``.
    """
    with torch.device("meta"):
        model = _from_config(files, load_model_config(files))
        if files.adapter_dir is None or merged:
            return model
        return inject(files.adapter_dir, model)


def _from_config(files: ModelFiles, config: Any) -> nn.Module:
    try:
        return model_class(config).from_config(
            config, trust_remote_code=files.config.trust_remote_code
        )
    except ValueError as error:
        raise ModelError(
            f"--model: {str(error).splitlines()[0]} It must be a causal language model"
        ) from error


def model_class(config: Any) -> Any:
    """Return the class of transformers that makes a config's model one that predicts tokens.

    Of a model that sees images or hears sounds too, that is the whole: texts go through its
    language model alone.

    Raises:
        ModelError: it is an encoder, or an encoder and a decoder.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"--model: a model of type {kind} is sequence-to-sequence, and a text alone has no "
            "loss in it; give a causal language model"
        )
    causal, multimodal = AutoModelForCausalLM, AutoModelForImageTextToText
    # Of newer releases, with models of sounds.
    multimodal = getattr(transformers, "AutoModelForMultimodalLM", multimodal)
    is_known = kind in CONFIG_MAPPING and type(config).__module__.startswith("transformers.")
    if not is_known or type(config) in causal._model_mapping:
        return causal  # or code that comes with the checkpoint
    if type(config) in multimodal._model_mapping:
        return multimodal
    raise ModelError(
        f"--model: transformers has no causal language model of type {kind} (it may be an encoder, "
        "which predicts no next token); give one such as GPT-2, Llama or Qwen"
    )


def load_model(files: ModelFiles, device: torch.device, merged: bool = False) -> nn.Module:
    """Load the model on a device, weights frozen, in eval mode.

    ``merged``: an adapter is added to the base's weights, whose layers stay as they are.

    Raises:
        ModelError: the weights do not match the config or cannot be read; the model is not causal.
    """
    model = _whole_model(files, merged).requires_grad_(False).eval().to(device)
    check_causal(files, model)
    return model


def load_shards(
    files: ModelFiles, rank: int, n_ranks: int, home: torch.device, pinned: bool = False
) -> tuple[nn.Module, BlockShards]:
    """Load the model with a rank's share of its blocks' weights, whose bytes are kept at ``home``.

    The weights of a checkpoint are read one by one, and only the share is kept. (Random weights,
    quantized ones, and a model with an adapter are made whole in host memory first.)

    Returns:
        The frozen model on the CPU, in eval mode, whose blocks' weights are without memory, and
        their shares. ``BlockShards`` has the arguments. No pass can run before
        ``engine.sharded_blocks`` has put them together.

    Raises:
        ModelError: see ``load_model``; or transformers marks no block of the model.
    """
    if loads_one_by_one(files):
        dtype = MODEL_DTYPES[files.config.model_dtype]
        blocks = blocks_of(model_skeleton(files).to(dtype), n_ranks)
        shards = BlockShards(blocks, rank, n_ranks, home, pinned)
        with taken_while_loading(shards):
            model = _load_weights(files, dtype, merged=False)
    else:
        model = _whole_model(files, merged=False)
        shards = BlockShards(blocks_of(model, n_ranks), rank, n_ranks, home, pinned)
    shards.take_from(model)  # all that is made whole, or converted after it was loaded
    shards.check_taken(model)
    return model.requires_grad_(False).eval(), shards


def loads_one_by_one(files: ModelFiles) -> bool:
    """Return whether ``load_shards`` never has the whole model in memory."""
    if files.adapter_dir is not None or files.config.init == "random":
        return False
    return model_quantization(files) is None


def check_causal(files: ModelFiles, model: nn.Module) -> None:
    """Raise ``ModelError`` if a token changes the logits of earlier positions."""
    config = files.config
    if not is_causal(model):
        raise ModelError(
            f"--model {config.model or config.architecture} ({type(model).__name__}) is not "
            "causal: a token changes the logits of earlier positions (a bidirectional model needs "
            "is_decoder in its config)"
        )


def _whole_model(files: ModelFiles, merged: bool) -> nn.Module:
    dtype = MODEL_DTYPES[files.config.model_dtype]
    if files.config.init == "random":
        return _random_model(files, dtype)
    return _load_weights(files, dtype, merged)


def _random_model(files: ModelFiles, dtype: torch.dtype) -> nn.Module:
    # The CPU's generator, whatever the device, so that every rank draws the same weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(files.config.seed)
        return _from_config(files, load_model_config(files)).to(dtype)


def _load_weights(files: ModelFiles, dtype: torch.dtype, merged: bool) -> nn.Module:
    config, folder = files.config, files.base_dir or files.model_dir
    assert folder is not None  # --architecture with random weights has no files
    quantization = model_quantization(files)
    model_type = model_class(_config_on_disk(files))
    arguments: dict[str, Any] = {"dtype": dtype}
    if quantization is not None or attention_note(files):
        arguments["config"] = _usable_config(files)
    if quantization is not None:
        # An adapter is added to weights as they are.
        packed = quantization.stays_packed and not merged
        quantization = replace(quantization, stays_packed=packed)
        arguments |= loading_arguments(quantization, arguments["config"])
    try:
        with no_progress_bars():
            # output_loading_info makes it return a pair, which its annotations do not declare.
            loaded: Any = model_type.from_pretrained(
                **source_arguments(folder),
                **arguments,
                trust_remote_code=config.trust_remote_code,
                use_safetensors=None if config.allow_pickle else True,
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are reported by name below
            )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # transformers and safetensors raise many types
        raise ModelError(
            f"--model {folder} cannot be loaded: {type(error).__name__}: {first_line(error)}"
        ) from error
    model, report = loaded
    # transformers initialises missing weights at random, with no more than a warning.
    missing = sorted(report["missing_keys"]) + sorted(key[0] for key in report["mismatched_keys"])
    if missing:
        raise ModelError(
            f"--model {folder}: {len(missing)} of the model's weights are not in the checkpoint or "
            f"have another shape: {', '.join(missing[:4])}"
        )
    if quantization is not None:
        settle_quantized(model, dtype, quantization.stays_packed)
    return model if files.adapter_dir is None else load_adapter(files.adapter_dir, model, merged)


_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""Fields of configs for the longest sequence; the last two are MPT's and Whisper's."""


def positions_of(model: Any) -> int | None:
    """Return the model's maximum sequence length; None if it has no limit of its own.

    Where positions are counted from behind the padding token's (RoBERTa), the first rows of the
    table of positions are never used.
    """
    text = model.config.get_text_config()
    given = (getattr(text, name, None) for name in _POSITIONS)
    positions = next((n for n in given if n), -1)
    if positions <= 0:  # XLNet's config says by -1 that there is none
        return None
    unused = [
        module.padding_idx + 1
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and "position" in name.rpartition(".")[2]
        and module.padding_idx is not None
        and module.num_embeddings == positions
    ]
    return positions - max(unused, default=0)
