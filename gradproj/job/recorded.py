"""Reloads a job from its output directory: settings, corpus, model and engine.

Rows made with these are the job's own, up to rounding. A store may come from anybody: that its job
was allowed to run a checkpoint's code does not allow it here.
"""

import dataclasses
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradproj.corpus.index import CorpusIndex
from gradproj.corpus.index_file import load_index_if_any
from gradproj.corpus.tar.paths import default_index_path, list_tars
from gradproj.corpus.tar.places import are_in_place, check_unchanged
from gradproj.distributed import choose_device
from gradproj.engine.batching import AUTO, BatchConfig
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.head_rows import HeadBasis
from gradproj.engine.loss import output_head
from gradproj.engine.sharded_blocks import load_in_blocks
from gradproj.errors import ConfigError, CorpusError, ModelError, StoreError
from gradproj.flags import flag_of
from gradproj.job.chat_template import with_kept_template
from gradproj.job.config import RunConfig
from gradproj.job.query_model import query_model_files
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.model.checkpoint import ModelFiles, fetch, is_local_model
from gradproj.model.fingerprint import model_identity, tokenizer_fingerprint
from gradproj.model.loading import load_model, load_model_config
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.storage.object_path import path_of
from gradproj.store import ProjectionStore
from gradproj.store.layout import RUN_CONFIG_NAME
from gradproj.store.texts import output_index

_NEEDS_CONSENT = {
    "trust_remote_code": "runs code that the checkpoint brings along",
    "allow_pickle": "loads pickled weights, which can run code",
}


def recorded_config(output: Path) -> RunConfig:
    """Return ``run_config.json``'s settings, without permission to run the checkpoint's code."""
    run = with_kept_template(output, _as_recorded(output))
    return replace(run, model=replace(run.model, trust_remote_code=False, allow_pickle=False))


def _as_recorded(output: Path) -> RunConfig:
    path = output / RUN_CONFIG_NAME
    try:
        flags = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise StoreError(
            f"{output} is not a job's --output_dir: it holds no {RUN_CONFIG_NAME}"
        ) from error
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    try:
        # Before there was a choice, rows had no experts.
        return RunConfig.from_flags({"experts": "none", **flags})
    except (TypeError, ConfigError) as error:
        raise StoreError(f"{path} does not hold a job's settings: {error}") from error


def config_from(inputs: RecordedRunArgs, loads_weights: bool = True) -> RunConfig:
    """Return the recorded settings with the given paths and permissions.

    ``loads_weights`` is False if the caller reads only the tokenizer and the model's configuration:
    then pickled weights are no danger.

    ``ModelError`` if the job's checkpoint could run code, which ``inputs`` does not allow.
    """
    output = path_of(inputs.output)
    run = with_kept_template(output, _as_recorded(output))
    allowed = {name: getattr(inputs, name) for name in _NEEDS_CONSENT}
    allowed["allow_pickle"] |= not loads_weights
    for name, effect in _NEEDS_CONSENT.items():
        if getattr(run.model, name) and not allowed[name]:
            raise ModelError(
                f"the job of {inputs.output} was started with --{name}, which {effect}: give "
                f"--{name} here too if you trust "
                f"{inputs.model or run.model.model or run.model.architecture}"
            )
    model = replace(run.model, **allowed)
    if inputs.model:
        model = replace(model, model=inputs.model, architecture="")
    if inputs.tokenizer:
        model = replace(model, tokenizer=inputs.tokenizer)
    corpus = replace(run.corpus, shards=inputs.shards or run.corpus.shards)
    batch = run.batch
    if batch.batch_tokens == AUTO:  # a number measured on the job's device; here the default does
        batch = replace(batch, batch_tokens=BatchConfig.batch_tokens)
    return replace(run, model=model, corpus=corpus, batch=batch)


def recorded_index(output: Path, shards: str = "") -> CorpusIndex:
    """Return the output's own index, with its tars where the job found them or at ``shards``."""
    recorded = recorded_config(output).corpus
    index, shards = output_index(output), shards or recorded.shards
    # The index holds absolute paths; the job's --shards may be relative to another folder.
    in_place = shards == recorded.shards and are_in_place(index.tars)
    if not in_place and not shards.endswith(".json"):
        index = index.relocated(list_tars(shards, anonymous=recorded.anonymous))
    return _with_present_times(index)


def _with_present_times(index: CorpusIndex) -> CorpusIndex:
    """Return the index that ``gradproj index`` made beside tars of the same content, if it did."""
    try:
        check_unchanged(*index.tars)
    except CorpusError:
        beside = default_index_path([tar.path for tar in index.tars])
        newer = load_index_if_any(beside) or index
        same = newer.fingerprint == index.fingerprint
        reads_alike = replace(newer, texts_only=index.texts_only, cache=index.cache)
        return reads_alike if same else index
    return index


@dataclass(frozen=True)
class RecordedEngine:
    """A store's model and engine, ready to make rows; enter ``engine`` around its use."""

    tokenizer: Any
    vocabulary: int
    """Number of token ids the model has."""
    model: nn.Module
    engine: GradProjLoraEngine
    device: torch.device
    batch: BatchConfig
    """The recorded settings."""
    head: HeadBasis | None
    """The basis of the store's head rows, on the device; None too for a query model with another
    number of token ids."""


def recorded_engine(
    store: ProjectionStore, run: RunConfig, device: str = "auto", query_model: str = ""
) -> RecordedEngine:
    """Load a store's unchanged model and make an engine with the store's matrices and basis.

    ``query_model``: the folder of another checkpoint of the same shapes, in place of that model.
    """
    merged = False
    if query_model:
        tokenizer, vocabulary = recorded_tokenizer(store, run)
        files, merged = query_model_files(store, run, query_model, tokenizer, vocabulary)
    else:
        files, tokenizer = recorded_model(store, run)
    chosen, _ = choose_device(device, 0)
    # As much of it as the job had on a device at a time.
    in_blocks = (run.job.offload or run.job.ranks_per_model > 1) and not merged
    model = (
        load_in_blocks(files, chosen, None)[0] if in_blocks else load_model(files, chosen, merged)
    )
    engine = GradProjLoraEngine.from_config(
        model,
        run.projection.of_layers(store.layers),
        store.projection_matrices,
        run.job.gradient_checkpointing,
        basis=store.basis,
    )
    vocabulary = load_model_config(files).get_text_config().vocab_size
    head = HeadBasis.of_store(store, chosen)
    if head is not None and query_model and len(head.scale) != _n_head_words(model):
        head = None  # the store has no rows of the further words
    return RecordedEngine(tokenizer, vocabulary, model, engine, chosen, run.batch, head)


def _n_head_words(model: nn.Module) -> int:
    """Return the number of words that a model's head tells apart."""
    head = output_head(model)
    weight = getattr(head, "weight", None)
    return len(weight) if isinstance(weight, torch.Tensor) else 0


def recorded_model(store: ProjectionStore, run: RunConfig) -> tuple[ModelFiles, Any]:
    """Return ``(files, tokenizer)`` of the store's model; ``ModelError`` if either has changed."""
    files, identity = _recorded_files(store, run)
    tokenizer = load_tokenizer(files)
    _check_unchanged(store, files, identity, model_identity(files, tokenizer))
    return files, tokenizer


def recorded_tokenizer(store: ProjectionStore, run: RunConfig) -> tuple[Any, int]:
    """Return ``(tokenizer, number of the model's token ids)``, without reading any weight.

    Raises:
        ModelError: the tokenizer has changed, or the model's files are not there.
    """
    files, identity = _recorded_files(store, run)
    tokenizer = load_tokenizer(files)
    _check_unchanged(store, files, identity, {"--tokenizer": tokenizer_fingerprint(tokenizer)})
    return tokenizer, load_model_config(files).get_text_config().vocab_size


def _recorded_files(store: ProjectionStore, run: RunConfig) -> tuple[ModelFiles, dict[str, Any]]:
    """Find the files of the store's model; return them with the identity it was made with."""
    recorded, identity = (store.attributes.get(key) for key in ("model", "identity"))
    if not isinstance(recorded, dict) or not isinstance(identity, dict):
        raise StoreError(
            f"{store.path} does not record the model of its rows: it was not written by the job, "
            "or its attributes are damaged (gradproj.analysis takes rows of your own)"
        )
    commit = str(recorded.get("revision") or "")  # of a hub's model; else empty
    name = run.model.model
    is_local = is_local_model(name)
    if name and not commit and not is_local:  # only a hub's model has a commit
        original = recorded_config(store.path.parent).model.model
        if name != original:
            raise ModelError(
                f"--model {name} is no directory here; give one that holds the job's model, "
                f"{original}"
            )
        raise ModelError(
            f"--model {name}, as the job recorded it, is no directory here: change to the folder "
            "in which the job was started, or give --model DIR with its present place"
        )
    files = fetch(replace(run.model, revision="" if is_local else commit))
    return files, identity


def _check_unchanged(
    store: ProjectionStore, files: ModelFiles, identity: dict[str, Any], present: dict[str, str]
) -> None:
    """Raise ``ModelError`` if a fingerprint is not the recorded one."""
    changed = [name for name, value in present.items() if identity.get(name) != value]
    if changed:
        # If only the tokenizer changed, name its folder.
        of_tokenizer = changed == ["--tokenizer"]
        place = (
            files.tokenizer_dir if of_tokenizer else files.model_dir or files.config.architecture
        )
        raise ModelError(
            f"{place} is not what {store.path} was made with; its {' and '.join(changed)} changed "
            f"since. Restore it, give {'--tokenizer' if of_tokenizer else '--model'} DIR with the "
            "original, or make a new store"
        )


def job_command(output: Path) -> str:
    """Return the command of one rank that continues the job. More ranks take the same flags."""
    run = _as_recorded(output)
    defaults = {
        flag_of(f): f.default
        for section in RunConfig.sections().values()
        for f in dataclasses.fields(section)
    }
    words = ["python", "-m", "gradproj.run"]
    for flag, value in {**run.as_flags(), "output_dir": str(output)}.items():
        if value == defaults[flag]:
            continue
        is_switch = isinstance(value, bool)
        words += [f"--{'' if value else 'no-'}{flag}"] if is_switch else [f"--{flag}", str(value)]
    return shlex.join(words)
