"""Disk, host memory and files of a job over the whole Pile, by arithmetic: the sums of `python -m
gradproj plan`.

    python tests/bench/table_sizes.py

The layers are those of the models' published shapes, found on models without weights; everything
else is gradproj's default (16 x 16 values of each linear layer, float16 rows, documents cut at
1,024 tokens). Keys of 12 bytes.
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

from gradproj.engine.projection import ProjectionConfig, place_widths
from gradproj.engine.selection import find_layers
from gradproj.formatting import human_bytes
from gradproj.job.plan import DEFAULT_MAX_LENGTH, Plan
from gradproj.store.layout import StoreConfig, plan_layout

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


def main() -> None:
    """One line a model."""
    print(
        f"{N_DOCUMENTS:,} documents in {N_TARS:,} tars; host memory of a rank with float32 and "
        "bfloat16 weights\n"
    )
    print("| model | weights | row | units of rows | disk | files | host memory a rank |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, config in MODELS.items():
        plan = plan_of(config)
        host = [human_bytes(plan.host_bytes(plan.n_weights * itemsize)) for itemsize in (4, 2)]
        print(
            f"| {name} | {plan.n_weights / 1e6:,.0f} M "
            f"| {len(plan.layers)} layers, {plan.layout.dim:,} values, "
            f"{human_bytes(plan.row_bytes)} "
            f"| {plan.layout.n_units:,} of {plan.layout.rows_per_shard:,} | "
            f"{human_bytes(plan.store_bytes())} "
            f"| {plan.n_files():,} | {host[0]}, {host[1]} |"
        )


def plan_of(config: PretrainedConfig) -> Plan:
    """The part of a job's plan that its sums need."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    projection = ProjectionConfig()
    layers = place_widths(find_layers(model, projection.patterns), projection)
    widths = [layer.slice_end - layer.slice_start for layer in layers]
    layout = plan_layout(N_DOCUMENTS, widths, KEY_BYTES, StoreConfig())
    settings: Any = SimpleNamespace(batch=SimpleNamespace(max_length=DEFAULT_MAX_LENGTH))
    index: Any = SimpleNamespace(tars=range(N_TARS))
    return Plan(
        config=settings,
        files=cast(Any, None),
        index=index,
        layers=layers,
        layout=layout,
        vocabulary=config.vocab_size,
        wanted=np.arange(layout.n_units),
        n_selected=N_DOCUMENTS,
        n_weights=sum(p.numel() for p in model.parameters()),
        shared=[],
        identity={},
    )


if __name__ == "__main__":
    main()
