"""Examples give the results of ``gradproj.analysis`` with other tools."""

import subprocess
import sys

import numpy as np
import pytest
from helpers.analysis_stores import NAMES, columns_of, make_store, ok_rows

from gradproj import ProjectionStore
from gradproj.analysis import domain_matrix
from gradproj.examples.domain_cosines import domain_cosines, main
from gradproj.store.writer import update_attributes


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("examples") / "out", "float16")


def by_hand(output, layers=None):
    """Return the cosines of the two domains' mean rows, float64."""
    rows = output.decoded().astype(np.float64)[:, columns_of(layers)]
    domain = np.arange(70) % 3 - 1
    means = np.stack([rows[ok_rows(output) & (domain == number)].mean(axis=0) for number in (0, 1)])
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    return unit @ unit.T


@pytest.mark.parametrize("rows_per_chunk", [None, 9])
def test_domain_cosines_equal_those_of_domain_matrix(output, rows_per_chunk):
    with ProjectionStore(output.path) as store:
        got = domain_cosines(store.to_xarray(rows_per_chunk), store.domains)
        want = domain_matrix(store, score="dot").cosine
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(got, by_hand(output), atol=1e-6)
    assert got.domain.values.tolist() == ["ArXiv", "Github"]


def test_domain_cosines_of_one_layer(output):
    with ProjectionStore(output.path) as store:
        dataset = store.to_xarray()
        got = domain_cosines(dataset.sel(layer=NAMES[1]), store.domains)
    np.testing.assert_allclose(got, by_hand(output, [NAMES[1]]), atol=1e-6)


def test_example_runs_as_a_command(output):
    command = [sys.executable, "-m", "gradproj.examples.domain_cosines", str(output.path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    want = by_hand(output)
    assert done.stdout.splitlines() == [
        f"ArXiv  {want[0, 0]:7.4f} {want[0, 1]:7.4f}",
        f"Github {want[1, 0]:7.4f} {want[1, 1]:7.4f}",
    ]


def test_control_characters_in_names_are_replaced(tmp_path, capsys):
    made = make_store(tmp_path / "out", "float16")
    with ProjectionStore(made.path) as store:
        path, names = store.path, store.domains
    update_attributes(path, {"domains": [f"\x1b[2J{name}\n" for name in names]})
    assert main([str(made.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [f"�[2J{name}" for name in names]


def test_user_errors_are_one_line(output, tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path)]) == 2
    assert "is not a gradproj store" in capsys.readouterr().err
    assert main([str(output.path), "--layer", "h.9"]) == 2
    assert "has no layer 'h.9'; it has h.0.mlp, h.1.mlp, h.2.mlp" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "xarray", None)
    assert main([str(output.path)]) == 2
    assert "pip install 'gradproj[xarray]'" in capsys.readouterr().err
