"""Another checkpoint of a store's shapes, whose gradients are compared with the store's rows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from gradproj.engine.layers import every_layer
from gradproj.engine.patterns import folded
from gradproj.errors import GradprojError, ModelError
from gradproj.job.config import RunConfig
from gradproj.model.checkpoint import ModelFiles, fetch, is_local_model
from gradproj.model.loading import load_model_config, model_skeleton
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.store import ProjectionStore

FLAG = "--query_model"


def query_model_files(
    store: ProjectionStore, run: RunConfig, folder: str, tokenizer: Any, vocabulary: int
) -> tuple[ModelFiles, bool]:
    """Find another checkpoint and check that its rows are comparable with a store's.

    Args:
        store: the store.
        run: its job's settings, with the caller's permissions.
        folder: of a whole model, or of a PEFT adapter; or a GGUF file.
        tokenizer: the job's, which also tokenizes the queries.
        vocabulary: number of token ids of the job's model.

    Returns:
        Its files, and whether its adapter is to be merged into the base model: its layers are then
        those of the store, whose job ran without an adapter.

    Raises:
        ModelError: it has other layers, other shapes or a tokenizer with other token ids.
    """
    if not is_local_model(folder):
        raise ModelError(f"{FLAG} {folder}: no such directory")
    own = (Path(folder) / "tokenizer_config.json").is_file()
    known = run.model.tokenizer or run.model.model
    model = replace(
        run.model,
        model=folder,
        architecture="",
        init="",
        revision="",
        tokenizer="" if own else known,
    )
    try:
        files = fetch(model)
        if own:
            _check_tokenizer(folder, tokenizer, load_tokenizer(files))
        wanted = [(layer.name, layer.n_i, layer.n_o) for layer in store.layers]
        found = _layers(files, store, run, merged=False)
        merged = found != wanted and files.adapter_dir is not None
        if merged:
            found = _layers(files, store, run, merged=True)
    except GradprojError as error:
        raise ModelError(str(error).replace("--model ", f"{FLAG} ", 1)) from error
    if found != wanted:
        raise ModelError(f"{FLAG} {folder}: {_difference(found, wanted, store)}")
    size = load_model_config(files).get_text_config().vocab_size
    if size < vocabulary:
        raise ModelError(
            f"{FLAG} {folder} has {size:,} token ids, the model of {store.path} {vocabulary:,}"
        )
    return files, merged


def _layers(
    files: ModelFiles, store: ProjectionStore, run: RunConfig, merged: bool
) -> list[tuple[str, int, int]]:
    """Return name and widths of a model's layers that have a store's names but for numbers."""
    names = {folded(layer.name) for layer in store.layers}
    layers = every_layer(model_skeleton(files, merged), run.projection.experts)
    return [(layer.name, *layer.widths) for layer in layers if folded(layer.name) in names]


def _difference(
    found: list[tuple[str, int, int]], wanted: list[tuple[str, int, int]], store: ProjectionStore
) -> str:
    way_out = "give a checkpoint of the same architecture and size, such as a fine-tuned one"
    names = [name for name, *_ in found]
    for name, n_i, n_o in wanted:
        if name not in names:
            return f"it has no layer {name}, of which {store.path} has rows; {way_out}"
        shape = next((i, o) for each, i, o in found if each == name)
        if shape != (n_i, n_o):
            there = f"{shape[1]:,} x {shape[0]:,}"
            return (
                f"its layer {name} is {there}, that of the model of {store.path} {n_o:,} x "
                f"{n_i:,}; {way_out}"
            )
    return (
        f"it has {len(found)} layers of these names, and {store.path} has rows of {len(wanted)}; "
        f"{way_out}"
    )


def _check_tokenizer(folder: str, ours: Any, theirs: Any) -> None:
    """Raise ``ModelError`` unless every token has the same id; further tokens are allowed."""
    other = theirs.get_vocab()
    for token, number in ours.get_vocab().items():
        if other.get(token) != number:
            has = "no such token" if token not in other else f"the id {other[token]:,} for it"
            raise ModelError(
                f"{FLAG} {folder}: its tokenizer is another than the store's: token {token!r} has "
                f"the id {number:,} there, and this one has {has}"
            )
