"""``--bytes_per_document``: the layers and widths it stands for, and effective dimensions."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.jobs import flags
from helpers.models import small_model

from gradproj.engine.projection import place_widths
from gradproj.engine.selection import find_layers
from gradproj.errors import ConfigError
from gradproj.job.allocation import (
    dimension_lines,
    effective_dimension,
    read_bytes,
    with_allocation,
)
from gradproj.job.config import run_config
from gradproj.store.layout import StoreConfig, plan_layout

WIDE = {
    "gpt2": {"n_embd": 128, "n_head": 4},
    "llama": {
        "hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 4
    },
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 256},
    "opt": {"hidden_size": 128, "ffn_dim": 256},
}  # fmt: skip
N_LAYERS = {"gpt2": 8, "llama": 14, "gpt_neox": 8, "opt": 12}
OUTPUTS = {
    "gpt2": "mlp.c_proj", "llama": "down_proj", "gpt_neox": "dense_4h_to_h", "opt": "fc2"
}  # fmt: skip


def config_of(*words, **settings):
    needed = {"shards": "s", "model": "m", "output_dir": "o"}
    return run_config([*flags(**needed, **settings), *words], "test")


def model_of(family, wide=True):
    with torch.device("meta"):
        return small_model(family, **(WIDE[family] if wide else {}))


def targets_of(family, projection, wide=True):
    return find_layers(model_of(family, wide), projection.patterns)


def allocated(family, n_bytes, wide=True, **settings):
    """Return the settings, the placed layers and the lines of a budget."""
    config = config_of(bytes_per_document=n_bytes, **settings)
    config, lines = with_allocation(config, model_of(family, wide))
    layers = place_widths(targets_of(family, config.projection, wide), config.projection)
    return config, layers, lines


def values(layer):
    return layer.k_i * layer.k_o


def row_bytes(widths, more_bytes=0):
    """Return the bytes of a row of a store with layers of so many values."""
    config = StoreConfig(encoding="signs")
    return plan_layout(1, list(widths), 8, config, more_bytes).row_bytes


@pytest.mark.parametrize("family", WIDE)
def test_all_layers_are_taken_where_each_has_64_by_64_and_else_the_mlps_outputs(family):
    n = N_LAYERS[family]
    least = row_bytes([4096] * n)
    config, layers, lines = allocated(family, least)
    assert [(layer.k_i, layer.k_o) for layer in layers] == [(64, 64)] * n
    assert config.projection.layers == "all"
    assert f"64 x 64 signs of all layers ({n})" in lines[0]
    quality = "0.57 on GPT-2 3 x 128, 0.47 on GPT-2 3 x 384, 0.50 on SmolLM2-135M"
    assert lines[1] == f"quality       64 x 64 signs of all layers, LDS {quality}"
    config, layers, lines = allocated(family, least - 1)
    assert config.projection.layers == OUTPUTS[family]
    assert len(layers) == 2
    # Four layers of 64 x 64 a block are one of 128 x 128.
    assert {(layer.k_i, layer.k_o) for layer in layers} == {(128, 128)}
    quality = "128 x 128 signs of the MLPs' output projections, LDS 0.64 on GPT-2 3 x 128, "
    quality += "0.51 on GPT-2 3 x 384"
    assert lines[1] == f"quality       {quality}"
    _, _, lines = allocated(family, 4096)
    assert lines[1] == f"quality       not measured at this width; nearest: {quality}"
    assert (config.store.encoding, config.projection.basis) == ("signs", "eigen")
    assert config.projection.bytes_per_document == ""


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("head_rows", ["0", "8x16"])
@pytest.mark.parametrize("n_bytes", ["200", "1k", "1.5k", "4k", "7k", "20k", "1m"])
@pytest.mark.parametrize("wide", [True, False])
def test_whole_row_takes_as_many_bytes_as_fit(family, head_rows, n_bytes, wide):
    config, layers, lines = allocated(family, n_bytes, wide=wide, head_rows=head_rows)
    head = config.head.segment(64)
    more = head.n_bytes if head else 0
    assert row_bytes(map(values, layers), more) <= read_bytes(n_bytes)
    k = int(config.projection.rank_total**0.5)
    assert f"{k} x {k} signs" in lines[0]
    projection = replace(config.projection, rank_total=(k + 4) ** 2)
    wider = place_widths(targets_of(family, projection, wide), projection)
    assert k == 128 or row_bytes(map(values, wider), more) > read_bytes(n_bytes)


def test_layers_are_chosen_from_proj_layers():
    config, layers, _ = allocated("llama", "1k", proj_layers="attn")
    assert config.projection.layers == "attn"
    assert {(layer.k_i, layer.k_o) for layer in layers} == {(28, 28)}
    config, layers, _ = allocated("llama", "1k", proj_layers="mlp,-layers.0")
    assert [layer.name for layer in layers] == ["model.layers.1.mlp.down_proj"]
    assert config.projection.layers == "down_proj,-layers.0"
    config, _, _ = allocated("llama", "1k", proj_layers="layers.1")
    assert config.projection.layers == "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bytes_per_document": "67"}, r"67 is too little for the signs .* at least 68,"),
        (
            {"bytes_per_document": "500", "head_rows": "64x64"},
            r"500 is too little .* \(2\) and 704 bytes of --head_rows: give at least 772, .*fewer",
        ),
        ({"bytes_per_document": "5kk"}, "'5kk'; give a number such as 800, 5k"),
        ({"bytes_per_document": "0"}, "'0'; give a number"),
        ({"bytes_per_document": "5k", "proj_rank_total": 99}, "leave out --proj_rank_total"),
        ({"bytes_per_document": "5k", "matrices": "m.safetensors"}, "leave out --matrices"),
        ({"bytes_per_document": "5k", "encoding": "int8"}, "leave out --encoding int8"),
    ],
)
def test_impossible_or_contradicting_budget_is_an_error(settings, message):
    with pytest.raises(ConfigError, match=message):
        allocated("llama", **{"n_bytes": settings.pop("bytes_per_document"), **settings})


def test_settings_without_a_budget_stay_as_they_are():
    config = config_of()
    assert with_allocation(config, None) == (config, [])


def test_effective_dimension_counts_what_damping_leaves():
    assert effective_dimension(np.ones(64), 0.0) == 64
    assert effective_dimension(np.ones(64), 1.0) == 32
    assert effective_dimension([8.0, 0, 0, 0], 0.5) == pytest.approx(8 / 9)
    assert effective_dimension(np.zeros(4), 0.03) == 0
    # A covariance with few directions has few, in whatever basis it was measured.
    generator = np.random.default_rng(0)
    x = generator.standard_normal((1000, 5)) @ generator.standard_normal((5, 40))
    assert 4 < effective_dimension(np.linalg.eigvalsh(x.T @ x), 1e-3) <= 5


def test_plan_names_the_width_that_is_enough_for_each_kind_of_layer():
    flat, steep = np.ones(64), np.r_[np.ones(8), np.zeros(56)]
    names = [f"layers.{i}.{part}" for i in range(2) for part in ("up", "down")]
    layers = [SimpleNamespace(name=name, k_i=64, k_o=64, n_i=900, n_o=900) for name in names]
    eigenvalues = {name: (flat if name.endswith("up") else steep, steep) for name in names}
    store = SimpleNamespace(layers=layers, basis_eigenvalues=eigenvalues)
    up, down = dimension_lines(store)
    assert up.endswith("layers.*.up: A 62 of 64, S 8 of 64; 128 x 16 or more would be enough")
    assert down.endswith("layers.*.down: A 8 of 64, S 8 of 64; 16 x 16 is enough")
    assert dimension_lines(SimpleNamespace(layers=layers, basis_eigenvalues=None)) == []
    layers[0].n_i = layers[2].n_i = 64
    assert dimension_lines(store)[0].endswith("64 x 16 is enough")
    many = [replace_name(layer, n) for layer in layers[:1] for n in range(20)]
    store = SimpleNamespace(layers=many, basis_eigenvalues={x.name: (flat, flat) for x in many})
    assert dimension_lines(store)[12:] == ["dimension     and 8 more names"]


def replace_name(layer, n):
    return SimpleNamespace(**{**vars(layer), "name": f"part_{n}.down"})
