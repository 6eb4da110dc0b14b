"""Disk, host memory and files of a job over the whole Pile, by arithmetic: the sums of `python -m
gradproj plan`.

    python tests/bench/table_sizes.py

The layers are those of the models' published shapes, found on models without weights; documents are
cut at 1,024 tokens, keys have 12 bytes. Rows: the default (signs of 64 x 64 values of each linear
layer in the eigenbasis), what ``--bytes_per_document`` chooses, and 16 x 16 float16 values.
"""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PretrainedConfig,
)

from gradproj.engine.coverage import coverage_of
from gradproj.engine.projection import place_widths
from gradproj.engine.selection import find_layers
from gradproj.formatting import human_bytes
from gradproj.job.allocation import with_allocation
from gradproj.job.config import run_config
from gradproj.job.plan import Plan
from gradproj.store.layout import plan_layout

N_DOCUMENTS, N_TARS, KEY_BYTES = 210_607_728, 26_000, 12

MODELS: dict[str, PretrainedConfig] = {
    "GPT-2-small": GPT2Config(),
    "Pythia-1.4B": GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
    ),
    "Llama-3-8B": LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
}


SIGNS = ("--encoding", "signs", "--basis", "eigen", "--proj_rank_total", "4096")
ROWS: dict[str, tuple[str, ...]] = {
    "64 x 64 signs": SIGNS,
    "`--bytes_per_document 25k`": ("--bytes_per_document", "25k"),
    "`--bytes_per_document 5k`": ("--bytes_per_document", "5k"),
    "16 x 16 float16": ("--encoding", "dense", "--basis", "random", "--proj_rank_total", "256"),
}
NEEDED = ("--shards", "pile", "--model", "m", "--output_dir", "out", "--max_length", "1024")


def main() -> None:
    """Print a line for each model and kind of row."""
    print(
        f"{N_DOCUMENTS:,} documents in {N_TARS:,} tars; host memory of a rank with float32 and "
        "bfloat16 weights\n"
    )
    print("| model | rows | layers | bytes a document | disk | files | host memory a rank |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, shape in MODELS.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(shape)
        for rows, flags in ROWS.items():
            plan = plan_of(model, flags)
            host = [human_bytes(plan.host_bytes(plan.n_weights * itemsize)) for itemsize in (4, 2)]
            widths = f"{plan.layers[0].k_o} x {plan.layers[0].k_i}"
            print(
                f"| {name}, {plan.n_weights / 1e6:,.0f} M | {rows} "
                f"| {len(plan.layers)} of {widths} | {plan.row_bytes:,} "
                f"| {human_bytes(plan.store_bytes())} | {plan.n_files():,} "
                f"| {host[0]}, {host[1]} |"
            )


def plan_of(model: Any, flags: tuple[str, ...]) -> Plan:
    """Return the part of a job's plan that its sums need."""
    config, _ = with_allocation(run_config([*NEEDED, *flags], "table"), model)
    targets = find_layers(model, config.projection.patterns)
    layers = place_widths(targets, config.projection)
    widths = [layer.slice_end - layer.slice_start for layer in layers]
    layout = plan_layout(N_DOCUMENTS, widths, KEY_BYTES, config.store)
    index: Any = SimpleNamespace(tars=range(N_TARS))
    return Plan(
        config=config,
        files=cast(Any, None),
        index=index,
        layers=layers,
        coverage=coverage_of(model, targets),
        layout=layout,
        n_tokens=0,
        vocabulary=0,
        wanted=np.arange(layout.n_units),
        n_selected=N_DOCUMENTS,
        n_weights=sum(p.numel() for p in model.parameters()),
        shared=[],
        identity={},
    )


if __name__ == "__main__":
    main()
