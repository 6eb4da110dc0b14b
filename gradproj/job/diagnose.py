"""Compares rows alone, batched and padded, in float32 and bfloat16: the command ``diagnose``.

Some documents of the corpus run through the engine alone, in the job's batches and beside padding,
in each precision. Every row is compared with the document's own in float32 alone. Rows are in the
basis of the output's store, if there is one. Nothing is written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from gradproj.distributed import choose_device
from gradproj.engine.batching import BatchConfig, fit_padding
from gradproj.engine.compile import compiler_errors_explained
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.matrix_file import Matrices
from gradproj.engine.projection import job_matrices
from gradproj.errors import CorpusError, ModelError
from gradproj.flags import Flags, flag
from gradproj.job.config import RunConfig
from gradproj.job.plan import Plan, make_plan
from gradproj.job.precision import (
    BATCHED,
    MAX_ERROR,
    MIN_COSINE,
    PADDED,
    USUAL_COSINE,
    WAYS,
    Agreement,
    rows_of,
)
from gradproj.job.unit_reader import UnitReader
from gradproj.kernels.torch_setup import prepare_torch
from gradproj.model.config import MODEL_DTYPES
from gradproj.model.loading import load_model, model_quantization
from gradproj.model.sequences import TokenSequence
from gradproj.model.tokenizer_loading import load_tokenizer
from gradproj.store import ProjectionStore
from gradproj.store.layout import STATUS, STORE_NAME

SOUND, BEYOND = 0, 1
_TRIES = 8
"""Documents tried for each one wanted: some are empty, or of other domains."""


@dataclass(frozen=True, kw_only=True)
class DiagnoseConfig(Flags, title="diagnose"):
    """Flags of ``diagnose`` besides the job's."""

    n_documents: int = flag("Number of documents of the corpus to compare.", 16, minimum=1)
    as_json: bool = flag("Print one JSON object.", False, name="json")


@dataclass(frozen=True)
class Comparison:
    """Rows made in one way, compared with the same documents' in float32 alone."""

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
    """The result. ``--json`` prints its ``asdict``."""

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
        GradprojError: an error of the job's own checks, or no document that makes a row.
        ModelError: the device has no memory for a batch, or for the model in float32.
    """
    prepare_torch(config.job.threads, config.job.deterministic)
    device, _ = choose_device(config.job.device, 0)
    plan = make_plan(config)
    ids, sequences = _choose(plan, n_documents)
    diagnosis = Diagnosis(str(device), config.model.model_dtype, ids, sum(map(len, sequences)))
    reference: Tensor | None = None
    for dtype in MODEL_DTYPES:
        for way, rows in _rows_in(dtype, plan, sequences, device):
            reference = rows if reference is None else reference
            diagnosis.comparisons.append(Comparison(dtype, way, Agreement.of(rows, reference)))
            if way == BATCHED:
                diagnosis.layers += _by_layer(plan, dtype, rows, reference)
    if reference is not None and (other := _not_packed(plan)) is not None:
        name, unpacked = other
        for _, rows in _rows_in("bfloat16", unpacked, sequences, device, (BATCHED,)):
            compared = Comparison("bfloat16", name, Agreement.of(rows, reference))
            diagnosis.comparisons.append(compared)
    _judge(diagnosis)
    return diagnosis


def _not_packed(plan: Plan) -> tuple[str, Plan] | None:
    """Return a name and the plan of the model without packed weights; None if it has none.

    That is the checkpoint itself if it is quantized on load, else its dequantized copy.
    """
    quantization, config = model_quantization(plan.files), plan.files.config
    if quantization is None or not quantization.stays_packed:
        return None
    name = "unquantized" if quantization.on_load else "dequantized"
    config = replace(config, quantize="", dequantize=not quantization.on_load)
    return name, replace(plan, files=replace(plan.files, config=config))


def _choose(plan: Plan, n_documents: int) -> tuple[list[int], list[TokenSequence]]:
    """Choose documents that make rows, from all wanted units; the same ones every time."""
    reader = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)
    rows = plan.layout.rows_per_shard
    wanted = len(plan.wanted) * rows
    generator, size = np.random.default_rng(0), _TRIES * n_documents
    few = wanted <= size
    places = generator.permutation(wanted) if few else generator.integers(0, wanted, size)
    ids: list[int] = []
    sequences: list[TokenSequence] = []
    for place in dict.fromkeys(places.tolist()):
        unit = int(plan.wanted[place // rows])
        sample_id = unit * rows + place % rows
        if sample_id >= plan.layout.n_samples:
            continue
        prepared = reader.read_samples(unit, sample_id, sample_id + 1)
        if prepared is not None and prepared.columns["status"][0] == STATUS["ok"]:
            sequences += [sequence.owned_by(len(ids)) for sequence in prepared.sequences]
            ids.append(sample_id)
        if len(ids) == n_documents:
            break
    if not ids:
        raise CorpusError(
            f"none of {len(places):,} documents looked at makes a row: they are empty, too short, "
            "or not of --domains"
        )
    return ids, sequences


def _rows_in(
    dtype: str,
    plan: Plan,
    sequences: list[TokenSequence],
    device: torch.device,
    ways: Sequence[str] = WAYS,
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(way, rows)`` with the model in one precision. One model is in memory at a time.

    Nothing is padded where the job does not pad.
    """
    files = replace(plan.files, config=replace(plan.files.config, model_dtype=dtype))
    options, batch = plan.config.job, plan.config.batch
    try:
        model = load_model(files, device)
        batch = fit_padding(model, batch)
        if not batch.batch_tokens:  # --batch_tokens auto, which the job has yet to measure
            batch = replace(batch, batch_tokens=BatchConfig.batch_tokens)
        projection = plan.config.projection
        engine = GradProjLoraEngine.from_config(
            model,
            projection.of_layers(plan.layers),
            job_matrices(projection, plan.layers),
            options.gradient_checkpointing,
            options.compile,
            _basis_of(plan),
        )
        with compiler_errors_explained(), engine:
            for way in ways if batch.max_padding else [w for w in ways if w != PADDED]:
                yield way, rows_of(model, engine, sequences, way, batch)
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"the device has no memory for the comparison in {dtype}: give a smaller "
            "--batch_tokens, or --device cpu"
        ) from error


def _basis_of(plan: Plan) -> Matrices | None:
    """Return the basis of a store that is there; before a pilot has run, rows have none."""
    if not (plan.output / STORE_NAME).exists():
        return None
    with ProjectionStore(plan.output) as store:
        return store.basis


def _by_layer(plan: Plan, dtype: str, rows: Tensor, reference: Tensor) -> list[LayerComparison]:
    comparisons = []
    for layer in plan.layers:
        columns = slice(layer.slice_start, layer.slice_end)
        agreement = Agreement.of(rows[:, columns], reference[:, columns])
        comparisons.append(LayerComparison(dtype, layer.name, agreement))
    return sorted(comparisons, key=lambda each: each.agreement.least_cosine)


def _judge(diagnosis: Diagnosis) -> None:
    """Set the verdicts in words and the exit code."""
    agreements = [c.agreement for c in diagnosis.comparisons if c.dtype == "float32"]
    most = max(agreement.most_error for agreement in agreements)
    what = "batching and padding move"
    if len(agreements) < len(WAYS):
        what = "batching without padding moves"
        diagnosis.verdicts.append(
            "the model's output depends on padding, or --max_padding is 0: the job puts sequences "
            "of one length in a batch"
        )
    if most <= MAX_ERROR:
        diagnosis.verdicts.append(f"float32: {what} no row by more than {most:.1e} of its length")
    else:
        diagnosis.exit_code = BEYOND
        diagnosis.verdicts.append(
            f"float32: a row in a batch or beside padding is {most:.1e} of its length away from "
            f"itself alone; rounding explains {MAX_ERROR:.0e}. The model mixes the documents of a "
            "batch, or sees its padding: do not use these rows"
        )
    for dtype in MODEL_DTYPES:
        if dtype != "float32":
            _judge_precision(diagnosis, dtype)
    for compared in diagnosis.comparisons:
        if compared.way not in WAYS:
            found = compared.agreement
            diagnosis.verdicts.append(
                f"quantized: cosine with the {compared.way} model in {compared.dtype} "
                f"{found.median_cosine:.5f} in the median, {found.least_cosine:.5f} at least"
            )


def _judge_precision(diagnosis: Diagnosis, dtype: str) -> None:
    agreements = [c.agreement for c in diagnosis.comparisons if c.dtype == dtype and c.way in WAYS]
    worst = min(agreements, key=lambda a: a.least_cosine)
    not_finite = max(a.n_not_finite for a in agreements)
    chosen = dtype == diagnosis.model_dtype
    usual, least = min(a.median_cosine for a in agreements), worst.least_cosine
    figure = f"{dtype}: cosine with float32 {usual:.5f} in the median, {least:.5f} at least"
    if all(a.holds for a in agreements):
        diagnosis.verdicts.append(f"{figure}: its rows can replace float32's")
        return
    if not_finite:
        figure = f"{dtype}: {not_finite} of {len(diagnosis.sample_ids)} rows are not finite"
    layer = next(each.layer for each in diagnosis.layers if each.dtype == dtype)
    diagnosis.verdicts.append(
        f"{figure}; a median of {USUAL_COSINE} and a least of {MIN_COSINE} are required. Worst: "
        f"sample {diagnosis.sample_ids[worst.worst]}, layer {layer}. "
        f"{'Give' if chosen else 'Keep'} --model_dtype float32"
    )
    if chosen:
        diagnosis.exit_code = BEYOND
