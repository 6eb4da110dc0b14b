"""An architecture's name or a checkpoint to a causal language model and its tokenizer."""

import importlib
import importlib.util
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from gradproj.errors import ConfigError, ModelError

# The job has one progress bar of its own.
transformers.utils.logging.disable_progress_bar()

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
        default="", metadata={"help": "'random': the architecture (or --model's config) with random weights"}
    )
    seed: int = field(default=0, metadata={"help": "seed of random weights"})
    revision: str = field(default="", metadata={"help": "branch, tag or commit on the hub"})
    tokenizer: str = field(default="", metadata={"help": "directory or hub name; default: the model's own"})
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
        default=False, metadata={"help": "load .bin weights (they can run code); default: safetensors only"}
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


@dataclass(frozen=True)
class ModelFiles:
    """Where a model's files lie on this machine; made by ``fetch``, after which nothing asks the hub."""

    config: ModelConfig
    model_dir: Path | None
    """None for an architecture with random weights."""
    base_dir: Path | None
    """Of a PEFT adapter: the folder of the model that it changes."""
    tokenizer_dir: Path
    weights: tuple[Path, ...]
    """Every file with weights, a base model's included; empty for random weights."""
    revision: str
    """The hub's commit, or an empty string for a local directory."""


def fetch(config: ModelConfig, *, may_download: bool = True) -> ModelFiles:
    """Find or download the files of model and tokenizer.

    Args:
        config: what is wanted.
        may_download: False on all ranks but the first of a node, once that one has finished.

    Raises:
        ModelError: not there, not reachable, or without usable weights.
    """
    name = config.model or ARCHITECTURES[config.architecture][0]
    model_dir = base_dir = None
    revision, weights = "", []
    if not (config.architecture and config.init):
        model_dir, revision = _local_files(
            "--model", name, config.revision, may_download, config.allow_pickle
        )
        base_dir = _base_of_adapter(model_dir, may_download)
        if base_dir is None and not (model_dir / "config.json").is_file():
            raise ModelError(f"--model {name}: {model_dir} holds no config.json; is it a model's directory?")
        if not config.init:
            folders = [model_dir] if base_dir is None else [base_dir, model_dir]
            weights = [path for folder in folders for path in _weight_files(folder, config.allow_pickle)]
    if config.tokenizer:
        tokenizer_dir, _ = _local_files("--tokenizer", config.tokenizer, "", may_download)
    else:
        assert model_dir is not None  # ModelConfig asks for --tokenizer where there is no model directory
        own = base_dir is None or (model_dir / "tokenizer_config.json").is_file()
        tokenizer_dir = model_dir if own or base_dir is None else base_dir
    for path in weights:
        _check_whole(path)
    return ModelFiles(config, model_dir, base_dir, tokenizer_dir, tuple(weights), revision)


def _check_whole(path: Path) -> None:
    """Read the header of a safetensors file, which says how long the file is."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="np"):
                return
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is damaged ({error}): copy or download it again") from error


def _base_of_adapter(folder: Path, may_download: bool) -> Path | None:
    """The folder of the model that a PEFT adapter changes; None where the folder is a whole model."""
    settings = folder / "adapter_config.json"
    if (folder / "config.json").is_file() or not settings.is_file():
        return None
    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"--model {folder} is a PEFT adapter: pip install 'gradproj[peft]'")
    try:
        base = json.loads(settings.read_text())["base_model_name_or_path"]
    except (ValueError, KeyError) as error:
        raise ModelError(f"{settings} does not name the adapter's base model: {error}") from error
    return _local_files("--model (the adapter's base)", base, "", may_download)[0]


def _local_files(
    flag: str, name: str, revision: str, may_download: bool, pickled: bool = False
) -> tuple[Path, str]:
    """``(folder, hub commit)``; the commit is empty for a local directory."""
    if Path(name).is_dir():
        if revision:
            raise ModelError(f"--revision {revision}: {name} is a local directory, which has no revisions")
        return Path(name), ""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"{flag} {name}: no such directory")
    patterns = [
        "*.json",
        "*.safetensors",
        "*.model",
        "*.txt",
        "*.py",
        "*.jinja",
        *(["*.bin"] if pickled else []),
    ]
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision or None, allow_patterns=patterns, local_files_only=not may_download
        )
    except LocalEntryNotFoundError as error:
        offline = huggingface_hub.constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE is set" if offline else "the hub could not be reached"
        raise ModelError(
            f"{flag} {name}: not a directory here, not in the local Hugging Face cache, and {why}. "
            "Download it where there is a network (hf download NAME) and give its directory"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"{flag} {name}: neither a local directory nor to be had from the hub: {reason}"
        ) from error
    return Path(folder), Path(folder).name


def _weight_files(folder: Path, allow_pickle: bool) -> list[Path]:
    """The files with the weights, complete by their index; safetensors unless the user says otherwise."""
    endings = ("safetensors", "bin") if allow_pickle else ("safetensors",)
    for ending in endings:
        stems = {"safetensors": ("model", "adapter_model"), "bin": ("pytorch_model", "adapter_model")}[ending]
        for stem in stems:
            index = folder / f"{stem}.{ending}.index.json"
            if index.is_file():
                return _indexed_files(index)
            if (folder / f"{stem}.{ending}").is_file():
                return [folder / f"{stem}.{ending}"]
    pickled = sorted(p.name for p in folder.glob("*.bin"))
    if pickled and not allow_pickle:
        raise ModelError(
            f"--model {folder} has its weights only as {pickled[0]}, a pickle, which can run code: convert it "
            "to safetensors, or give --allow_pickle if you trust its source"
        )
    raise ModelError(f"--model {folder} holds no weights (model.safetensors or model.safetensors.index.json)")


def _indexed_files(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} is not an index of weights: {error}") from error
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelError(
            f"{index.parent} lacks {', '.join(missing[:4])} ({len(missing)} of {len(names)} weight files)"
        )
    return [index.parent / name for name in names]


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
        return AutoModelForCausalLM.from_config(config, trust_remote_code=files.config.trust_remote_code)
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
    before, after = (model(input_ids=x, use_cache=False).logits[0, :-1].float() for x in (ids, changed))
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
        raise ModelError(f"--special_tokens {config.special_tokens}: the tokenizer has no bos token")
    if "eos" in config.special_tokens and tokenizer.eos_token_id is None:
        raise ModelError(f"--special_tokens {config.special_tokens}: the tokenizer has no eos token")
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
