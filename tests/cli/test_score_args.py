"""``--layers`` of ``query``, ``domains`` and ``report``: the patterns of ``--proj_layers``."""

from types import SimpleNamespace

import pytest
import torch

from gradproj.cli.score_args import ScoreArgs, matching_layers
from gradproj.errors import ConfigError

NAMES = [f"layers.{i}.{part}" for i in (0, 1, 10) for part in ("self_attn.q", "mlp.up", "mlp.gate")]
STORE = SimpleNamespace(
    path="out", head=None, layers=[SimpleNamespace(name=name) for name in NAMES]
)


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["layers.1"], NAMES[3:6]),
        (["layers.*.mlp.up"], NAMES[1::3]),
        (["attn"], NAMES[::3]),
        (["mlp", "-gate"], NAMES[1::3]),
        (["-mlp"], NAMES[::3]),
        (["layers"], None),
        ([], None),
    ],
)
def test_layers_are_chosen_as_by_proj_layers(words, chosen):
    assert matching_layers(words, STORE) == chosen


def test_exclusion_of_no_layer_is_a_note(capsys):
    assert matching_layers(["mlp", "-experts"], STORE) == matching_layers(["mlp"], STORE)
    assert "--layers -experts: out has no such layer to leave out" in capsys.readouterr().err


@pytest.mark.parametrize(("score", "named"), [("kfac", True), ("dot", False)])
def test_domains_say_that_kfac_is_without_head_rows(score, named, capsys):
    store = SimpleNamespace(**vars(STORE) | {"head": object()})
    ScoreArgs(score=score).fitted_options(store, torch.device("cpu"))
    assert ("without the store's head rows" in capsys.readouterr().err) is named


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ayers.0"], r"has no layer 'ayers.0'; it has layers\.\*\.self_attn\.q"),
        (["mlp", "-layers"], "mlp,-layers leaves out all layers"),
    ],
)
def test_pattern_that_chooses_nothing_is_an_error(words, message):
    with pytest.raises(ConfigError, match=message):
        matching_layers(words, STORE)
