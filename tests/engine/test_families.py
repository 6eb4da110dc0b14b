"""Layers that a default takes of each family; exact rows of hybrids and mixtures of experts."""

from pathlib import Path

import pytest
import torch
from helpers.models import EVERY_FAMILY, HYBRIDS, MIXTURES, ragged_batch, small_model
from helpers.references import relative_error, row_by_autograd

from gradproj.engine.coverage import coverage_of
from gradproj.engine.engine import GradProjLoraEngine
from gradproj.engine.loss import per_sample_loss
from gradproj.engine.reach import reached_layers
from gradproj.engine.selection import find_layers

README = Path(__file__).parents[2] / "gradproj/engine/README.md"
LENGTHS = [9, 21, 2, 14]


def chosen(family):
    """Return what a job takes of a family by default: its layers, their names and the coverage."""
    with torch.device("meta"):
        model = small_model(family)
    found = find_layers(model, ["all"])
    taken = reached_layers(model, found, ["all"], 64)
    names = [target.name for target in taken]
    unreached = [target for target in found if target.name not in names]
    return names, coverage_of(model, taken, unreached)


def row_of_table(family):
    """Return a family's row in the README's table, but for its error."""
    _, coverage = chosen(family)
    left = {"not reached": coverage.not_reached, "no rule": coverage.not_projectable}
    short = {why: [f"`{x.name.rpartition('*.')[2]}`" for x in names] for why, names in left.items()}
    named = "; ".join(f"{why}: {', '.join(names)}" for why, names in short.items() if names)
    assert not coverage.not_selected
    return f"| {family} | {coverage.n_selected} of {coverage.n_layers} | {named or '-'} |"


TABLE = HYBRIDS | MIXTURES


@pytest.mark.parametrize("family", TABLE)
def test_rows_of_a_family_are_its_samples_gradients_alone_and_in_a_batch(family):
    names, _ = chosen(family)
    model = small_model(family)
    ids, labels = ragged_batch(LENGTHS)
    layers = [f"={name}" for name in names]
    with GradProjLoraEngine(model, layers, 24, 3, freeze_weights=True) as engine:
        assert not engine.only_alone

        def rows_of(ids, labels):
            per_sample_loss(model, {"input_ids": ids, "labels": labels}).sum().backward()
            return engine.collect_batch()

        together = rows_of(ids, labels)
        alone = [
            rows_of(ids[[n], :length], labels[[n], :length]) for n, length in enumerate(LENGTHS)
        ]
    want = torch.stack(
        [row_by_autograd(model, engine, ids[n, :length]) for n, length in enumerate(LENGTHS)]
    )
    worst = max(map(relative_error, [*together, *torch.cat(alone)], [*want, *want]))
    assert worst < 1e-5
    expected = row_of_table(family)
    rows = [line for line in README.read_text().splitlines() if line.startswith(expected)]
    assert rows, f"give the table the row: {expected} {worst:.0e} |"
    assert float(rows[0].removeprefix(expected).strip(" |")) < 1e-5


@pytest.mark.parametrize("family", sorted(EVERY_FAMILY.keys() - TABLE.keys() - {"zamba"}))
def test_default_takes_every_linear_layer_of_other_families(family):
    assert row_of_table(family).endswith(" | - |"), "give it a row of the README's table"
