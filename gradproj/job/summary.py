"""Text for a person before and after a run: the plan, the checks, the result."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gradproj.coordinator.merge import is_complete
from gradproj.corpus.stream import read_documents
from gradproj.engine.batching import AUTO
from gradproj.errors import CorpusError, GradprojError
from gradproj.formatting import escaped, human_bytes, human_seconds, one_line
from gradproj.job.memory import batch_bytes
from gradproj.job.plan import Plan
from gradproj.job.sizes import free_bytes
from gradproj.job.unit_reader import UnitReader
from gradproj.job.weights import gpu_weight_bytes, host_weight_bytes, weights_lines
from gradproj.model.config import MODEL_DTYPES
from gradproj.model.loading import model_quantization, model_skeleton
from gradproj.model.quantized import packed_bytes
from gradproj.model.tokenizer_loading import larger_tokenizer, load_tokenizer
from gradproj.store import STATUS, ProjectionStore
from gradproj.store.layout import STATS_NAME, UNITS_DIR
from gradproj.store.unit_record import list_records, read_record, record_name


def plan_lines(plan: Plan, n_recorded: int) -> list[str]:
    """Return the plan as lines of text: the work ahead and what it takes."""
    layout, batch = plan.layout, plan.config.batch
    shapes = Counter(f"{layer.k_o} x {layer.k_i}" for layer in plan.layers)
    widths = {layer.k_o * layer.k_i for layer in plan.layers}
    each = f" x {widths.pop()}" if len(widths) == 1 else ""
    by_domain = bool(plan.config.corpus.chosen_domains)
    selected = f", at most {plan.n_selected:,} of the chosen domains" if by_domain else ""
    lines = [
        f"documents     {layout.n_samples:,} in {len(plan.index.tars):,} tars{selected}",
        f"row           D = {len(plan.layers)} layers{each} = {layout.dim:,} values, "
        f"{layout.stored_as}, {human_bytes(plan.row_bytes)}",
        *_head_lines(plan),
        *_hidden_lines(plan),
        f"widths        {', '.join(f'{shape} in {n} layers' for shape, n in shapes.most_common())}",
        f"basis         {_basis_of(plan)}",
        *plan.coverage.lines(),
        f"sequences     at most {batch.max_length} tokens ({batch.long_documents}); "
        f"batches of {batch.batch_size} sequences, {batch.batch_tokens or 'auto'} tokens",
        f"units         {len(plan.wanted):,} of {layout.rows_per_shard:,} rows"
        + (f", {n_recorded:,} of them done" if n_recorded else ""),
        f"disk          {human_bytes(plan.store_bytes())} in {plan.n_files():,} files; "
        f"{_free(plan.output)} at {plan.output}",
        *plan.notes,
    ]
    if plan.shared:
        example = " = ".join(plan.shared[0])
        lines.append(
            f"shared        {len(plan.shared)} layers have a weight that several modules use "
            f"({example}): one layer, its gradient the sum of all uses"
        )
    larger = larger_tokenizer(plan.n_tokens, plan.vocabulary)
    if larger:
        lines.append(f"tokenizer     {larger}: a document with one of the others is bad input")
    seconds = seconds_per_unit(plan)
    if seconds is not None:
        left = (len(plan.wanted) - n_recorded) * seconds
        lines.append(
            f"time          {human_seconds(seconds)} a unit so far; "
            f"{human_seconds(left)} left for one rank"
        )
    if by_domain:
        wasted = human_bytes(plan.wasted_bytes())
        lines.append(f"wasted        {wasted} of rows that no chosen document fills")
    return lines


def _free(output: Path) -> str:
    free = free_bytes(output)
    return "no limit known" if math.isinf(free) else f"{human_bytes(free)} free"


def _head_lines(plan: Plan) -> list[str]:
    if (head := plan.head) is None:
        return []
    return [
        f"head rows     {head.n_rows} of {head.vocabulary:,} words a document, {head.k} signs "
        f"each: {human_bytes(head.n_bytes)} of the row"
    ]


def _hidden_lines(plan: Plan) -> list[str]:
    width = plan.layout.hidden_width
    if not width:
        return []
    of = {"mean": "the mean over the target positions", "last": "that of the last token"}
    return [
        f"hidden state  {of[plan.config.store.hidden_state]}: {width:,} values, "
        f"{human_bytes(plan.hidden_bytes)}"
    ]


def _basis_of(plan: Plan) -> str:
    projection = plan.config.projection
    if projection.basis == "random":
        return "random: the matrices as they are drawn"
    if projection.basis_from:
        return f"eigen, that of {projection.basis_from}"
    tokens = f"at least {projection.pilot_tokens:,} target tokens (or all there are)"
    return f"eigen, measured by a pilot of {tokens}"


def memory_lines(plan: Plan, device: torch.device) -> list[str]:
    """Return the lines of a rank's memory: the host's, and a GPU's unless the job has none.

    On the CPU, the host's includes the largest batch.
    """
    config, on_cpu = plan.config, device.type == "cpu"
    is_measured = config.batch.batch_tokens == AUTO
    counted = None
    if not is_measured:
        counted = batch_bytes(
            plan.files,
            config.projection.of_layers(plan.layers),
            config.batch,
            config.job.gradient_checkpointing,
        )
    without = "its batches, which cannot be counted for this model"
    without = "batches that fit what is free" if is_measured else without
    rest = "" if counted else f", and {without}"
    whole = model_bytes(plan)
    weights = host_weight_bytes(plan, device, whole)
    total = human_bytes(plan.host_bytes(weights, (counted or 0) if on_cpu else 0))
    host = f"host memory   about {total} a rank{rest if on_cpu else ''}"
    lines = [*weights_lines(plan, whole), host]
    if config.job.device != "cpu":
        weights = gpu_weight_bytes(plan, whole)
        parts = [("weights", weights), ("unit's rows", plan.unit_bytes())]
        if counted:
            parts.insert(1, ("batch", counted))
        total = human_bytes(sum(n_bytes for _, n_bytes in parts))
        named = ", ".join(f"{name} {human_bytes(n_bytes)}" for name, n_bytes in parts)
        lines.append(f"GPU memory    about {total} a rank: {named}{rest}")
    return lines


def seconds_per_unit(plan: Plan) -> float | None:
    """Return the mean seconds of up to 32 committed units, or None before the first."""
    recorded = list_records(plan.output / UNITS_DIR)
    if not len(recorded):
        return None
    chosen = recorded[:: max(1, math.ceil(len(recorded) / 32))].tolist()
    records = (read_record(plan.output / record_name(unit)) for unit in chosen)
    return sum(record.stats["seconds"] for record in records) / len(chosen)


def model_bytes(plan: Plan) -> int:
    dtype = MODEL_DTYPES[plan.config.model.model_dtype]
    quantization = model_quantization(plan.files)
    if quantization is None or not quantization.stays_packed:
        return plan.n_weights * dtype.itemsize
    return packed_bytes(model_skeleton(plan.files), quantization, dtype)


def print_start(plan: Plan, device: torch.device, chunked: tuple[bool, str]) -> None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    for line in plan_lines(plan, len(list_records(plan.output / UNITS_DIR))):
        print(line)
    print(f"device        {device} ({name}), {torch.get_num_threads()} CPU threads a rank")
    way = "in chunks" if chunked[0] else "from the plain logits"
    print(f"loss          {way}: {chunked[1]}", flush=True)


def print_compiled(seconds: float) -> None:
    print(f"compile       the model's blocks, in {human_seconds(seconds)}", flush=True)


def print_unchecked(reason: str) -> None:
    print(f"rows          not checked: {one_line(reason, 200)}", flush=True)


def print_padding(plan: Plan, is_old: bool) -> None:
    line = "padding       changes this model's output: a batch has sequences of one length"
    print(line, flush=True)
    if is_old and len(list_records(plan.output / UNITS_DIR)):
        # Stores of format 1 may be older than the check of padding.
        print(
            "WARNING: rows that an earlier version of gradproj put into this store may be wrong, "
            "since it padded them. Which are: python -m gradproj verify "
            f"{plan.output} --recompute 64, and --repair gives up their units",
            file=sys.stderr,
            flush=True,
        )


def print_precision(figure: str, warning: bool) -> None:
    if warning:
        print(f"WARNING: {figure}", file=sys.stderr, flush=True)
    else:
        print(f"precision     {figure}", flush=True)


def print_result(plan: Plan, complete: bool, stopped_by: str) -> None:
    """Print what the run achieved and how to continue.

    Raises:
        CorpusError: the store is complete, and no document has a row.
    """
    if not complete:
        done = len(list_records(plan.output / UNITS_DIR))
        why = f"Stopped ({stopped_by})" if stopped_by else "Ended"
        rest = (
            "other jobs are working on the rest"
            if not stopped_by
            else "run the same command to continue"
        )
        if is_complete(plan.output):
            rest = "all units are done; `python -m gradproj merge` ends it"
        print(f"{why}: {done:,} of {len(plan.wanted):,} units are committed; {rest}.", flush=True)
        return
    stats = json.loads((plan.output / STATS_NAME).read_text())
    for line in stats_lines(stats):
        print(line)
    first = first_bad_input(plan) if stats["by_status"].get("bad_input") else ""
    if first:
        print(f"              the first: {first}", flush=True)
    if not stats["by_status"].get("ok"):
        raise CorpusError(
            f"{plan.output}: every unit was computed, and no document has a row. Change the "
            "documents, --shards or --tokenizer, and give --output_dir a new path"
        )
    print(f"The store is complete: {plan.output / 'projections.zarr'}", flush=True)


def first_bad_input(plan: Plan) -> str:
    """Return the first document of status bad input and its problem; empty if it is not found."""
    try:
        with ProjectionStore(plan.output) as store:
            sample_id = _first_of_status(store, "bad_input")
        if sample_id is None:
            return ""
        (document,) = read_documents(plan.index, sample_id, sample_id + 1, plan.config.limits)
        reader = UnitReader(plan.index, load_tokenizer(plan.files), plan.unit_settings)
    except GradprojError:
        return ""  # the tars have gone meanwhile; the logs have the reasons
    _, problem = reader.status_of(document)
    return f"sample {sample_id} ({escaped(document.key)}): {problem}"


def _first_of_status(store: ProjectionStore, name: str) -> int | None:
    block = 2**20  # a large corpus's column is not held whole
    for start in range(0, len(store), block):
        status = store.column("status", start, min(start + block, len(store)))
        found = np.flatnonzero(status == STATUS[name])
        if len(found):
            return start + int(found[0])
    return None


def stats_lines(stats: dict[str, Any]) -> list[str]:
    """Return ``projection_stats.json`` as lines of text."""
    timing = stats["timing"]
    by_status = ", ".join(f"{n:,} {name}" for name, n in stats["by_status"].items())
    lines = [
        f"rows          {stats['n_samples']:,}: {by_status}",
        f"computed      {timing['tokens']:,} tokens in {human_seconds(timing['rank_seconds'])} of "
        f"ranks' time, {timing['tokens_per_rank_second']:,.0f} tokens/s a rank",
    ]
    if stats["all"]["loss"] is not None:
        lines.append(f"loss          {stats['all']['loss']:.4f} nats per target token")
    if stats["by_status"].get("bad_input"):
        lines.append("bad input     why, document by document: in logs/rank-*.log")
    return lines
