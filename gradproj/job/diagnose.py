"""``python -m gradproj diagnose`` with the job's flags: whether a row depends on its batch, its padding, its precision.

Some documents of the corpus go through the engine alone, in the job's batches and beside padding, in float32 and in
bfloat16; every row is held against the document's own in float32 alone. Nothing is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gradproj.distributed import choose_device
from gradproj.engine.batching import BatchConfig
from gradproj.engine.compile import compiler_errors_explained
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.projection import draw_matrices, place_widths
from gradproj.errors import ConfigError, CorpusError, ModelError
from gradproj.job.config import RunConfig
from gradproj.job.plan import Plan, make_plan
from gradproj.job.precision import (
    LEAST_COSINE,
    MOST_ERROR,
    USUAL_COSINE,
    WAYS,
    Agreement,
    Documents,
    rows_of,
)
from gradproj.job.unit_reader import UnitReader
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.model.config import MODEL_DTYPES
from gradproj.model.loading import load_model, load_tokenizer
from gradproj.store.layout import STATUS

SOUND, BEYOND = 0, 1
_TRIES = 8
"""Documents looked at for each one wanted: some are empty, or of other domains."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig:
    """What ``diagnose`` takes beside the job's flags."""

    n_documents: int = field(default=16, metadata={"help": "documents of the corpus to compare"})
    as_json: bool = field(
        default=False, metadata={"flag": "json", "help": "print the result as JSON"}
    )

    def __post_init__(self) -> None:
        if self.n_documents < 1:
            raise ConfigError(f"--n_documents must be at least 1, got {self.n_documents}")


@dataclass(frozen=True)
class Comparison:
    """Rows made in one way, against the same documents' in float32 alone."""

    dtype: str
    way: str
    agreement: Agreement


@dataclass(frozen=True)
class LayerComparison:
    """One layer's part of the rows in the job's batches."""

    dtype: str
    layer: str
    agreement: Agreement


@dataclass
class Diagnosis:
    """What was found. ``asdict`` of it is what ``--json`` prints."""

    device: str
    model_dtype: str
    """The job's."""
    sample_ids: list[int]
    n_tokens: int
    comparisons: list[Comparison] = field(default_factory=list)
    layers: list[LayerComparison] = field(default_factory=list)
    """Of every precision the layers with the least cosine first."""
    verdicts: list[str] = field(default_factory=list)
    exit_code: int = SOUND


def diagnose(config: RunConfig, n_documents: int) -> Diagnosis:
    """Run the documents through the engine in every way and compare.

    Raises:
        GradprojError: what the job itself would refuse, or no document that makes a row.
        ModelError: the device has no memory for a batch or for the model in float32.
    """
    prepare_torch(config.job.threads, config.job.deterministic)
    device, _ = choose_device(config.job.device, 0)
    plan = make_plan(config)
    ids, documents = _choose(plan, n_documents)
    found = Diagnosis(str(device), config.model.model_dtype, ids, documents.n_tokens)
    reference: Tensor | None = None
    for dtype in MODEL_DTYPES:
        for way, rows in _rows_in(dtype, plan, documents, device):
            reference = rows if reference is None else reference
            found.comparisons.append(Comparison(dtype, way, Agreement.of(rows, reference)))
            if way == "batched":
                found.layers += _by_layer(plan, dtype, rows, reference)
    _judge(found)
    return found


def _choose(plan: Plan, n_documents: int) -> tuple[list[int], Documents]:
    """Documents that make rows, from all over what the job will compute; the same ones every time."""
    reader = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)
    rows = plan.layout.rows_per_shard
    wanted = len(plan.wanted) * rows
    generator = np.random.default_rng(0)
    few = wanted <= _TRIES * n_documents
    places = (
        generator.permutation(wanted)
        if few
        else generator.integers(0, wanted, _TRIES * n_documents)
    )
    ids: list[int] = []
    sequences: list[np.ndarray] = []
    document_of: list[int] = []
    for place in dict.fromkeys(places.tolist()):
        unit = int(plan.wanted[place // rows])
        sample_id = unit * rows + place % rows
        if sample_id >= plan.layout.n_samples:
            continue
        prepared = reader.read_samples(unit, sample_id, sample_id + 1)
        if prepared.columns["status"][0] == STATUS["ok"]:
            sequences += prepared.sequences
            document_of += [len(ids)] * len(prepared.sequences)
            ids.append(sample_id)
        if len(ids) == n_documents:
            break
    if not ids:
        raise CorpusError(
            f"none of {len(places):,} documents looked at makes a row: they are empty, too short, or not of --domains"
        )
    return ids, Documents(sequences, np.array(document_of, dtype=np.int64), len(ids))


def _rows_in(
    dtype: str, plan: Plan, documents: Documents, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """``(way, rows)`` with the model in one precision; one model is in memory at a time."""
    files = replace(plan.files, config=replace(plan.files.config, model_dtype=dtype))
    projection = plan.config.projection
    try:
        model = load_model(files, device)
        matrices = {w.name: draw_matrices(projection, w) for w in place_widths(model, projection)}
        own, batch = plan.config.job, plan.config.batch
        if not batch.batch_tokens:  # --batch_tokens auto, which the job has yet to measure
            batch = replace(batch, batch_tokens=BatchConfig.batch_tokens)
        engine = GradProjLoraEngine.from_config(
            model, projection, matrices, own.gradient_checkpointing, own.compile
        )
        with compiler_errors_explained(), engine:
            for way in WAYS:
                yield way, rows_of(model, engine, documents, way, batch)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the device has no memory for the comparison in {dtype}: give a smaller --batch_tokens, or --device cpu"
        ) from error


def _by_layer(plan: Plan, dtype: str, rows: Tensor, reference: Tensor) -> list[LayerComparison]:
    found = []
    for layer in plan.layers:
        columns = slice(layer.slice_start, layer.slice_end)
        found.append(
            LayerComparison(
                dtype, layer.name, Agreement.of(rows[:, columns], reference[:, columns])
            )
        )
    return sorted(found, key=lambda each: each.agreement.least_cosine)


def _judge(found: Diagnosis) -> None:
    """The verdicts in words, and the exit code."""
    own = [c.agreement for c in found.comparisons if c.dtype == "float32"]
    most = max(agreement.most_error for agreement in own)
    if most <= MOST_ERROR:
        found.verdicts.append(
            f"float32: batching and padding move no row by more than {most:.1e} of its length"
        )
    else:
        found.exit_code = BEYOND
        found.verdicts.append(
            f"float32: a row in a batch or beside padding is {most:.1e} of its length away from itself alone; rounding "
            f"explains {MOST_ERROR:.0e}. The model mixes the documents of a batch, or sees its padding: do not use "
            "these rows"
        )
    for dtype in MODEL_DTYPES:
        if dtype != "float32":
            _judge_precision(found, dtype)


def _judge_precision(found: Diagnosis, dtype: str) -> None:
    agreements = [c.agreement for c in found.comparisons if c.dtype == dtype]
    worst = min(agreements, key=lambda a: a.least_cosine)
    lost, chosen = max(a.n_not_finite for a in agreements), dtype == found.model_dtype
    usual = min(a.median_cosine for a in agreements)
    figure = (
        f"{dtype}: cosine with float32 {usual:.5f} in the middle, {worst.least_cosine:.5f} at least"
    )
    if all(a.holds for a in agreements):
        found.verdicts.append(f"{figure}: its rows stand for float32's")
        return
    if lost:
        figure = f"{dtype}: {lost} of {len(found.sample_ids)} rows are not finite"
    layer = next(each.layer for each in found.layers if each.dtype == dtype)
    found.verdicts.append(
        f"{figure}; {USUAL_COSINE} in the middle and {LEAST_COSINE} at least are wanted. Worst: sample "
        f"{found.sample_ids[worst.worst]}, layer {layer}. {'Give' if chosen else 'Keep'} --model_dtype float32"
    )
    if chosen:
        found.exit_code = BEYOND
