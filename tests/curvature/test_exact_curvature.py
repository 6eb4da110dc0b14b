"""Exact curvature and scores with whole gradients equal float64 autograd, sample by sample."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers.outputs import copy_of
from helpers.whole_gradients import ExactModel, ekfac_scores, kfac_scores
from safetensors.torch import load_file

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.curvature import layer_curvature
from gradproj.curvature.fit import CurvatureConfig, draw_sample, fit_curvature, split_layers
from gradproj.curvature.folder import CurvatureFolder
from gradproj.curvature.layer_curvature import Side
from gradproj.curvature.recorded_model import RecordedModel
from gradproj.curvature.rescore import rescore
from gradproj.engine import whole_gradients
from gradproj.errors import ConfigError, ModelError, StoreError
from gradproj.job.recorded import config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.model.sequences import TokenSequence
from gradproj.store import STATUS

TOKENS = 600
LAYERS = ("mlp", "o_proj", "lm_head")


def fitted(output, **settings):
    settings = {"curvature_tokens": TOKENS, "layers": LAYERS, "device": "cpu", **settings}
    lines = []
    fit_curvature(CurvatureConfig(output=str(output), **settings), lines.append)
    return lines


@pytest.fixture(scope="module")
def measured(job, tmp_path_factory):
    """A copy of the finished job's output with curvature; read only."""
    output = copy_of(job.output, tmp_path_factory.mktemp("measured"))
    fitted(output)
    return output


@pytest.fixture(scope="module")
def opened(measured):
    with ProjectionStore(measured) as store:
        run = config_from(RecordedRunArgs(output=str(measured)))
        yield store, RecordedModel(store, run, torch.device("cpu"), layers=LAYERS)


@pytest.fixture(scope="module")
def exact(opened):
    _, recorded = opened
    return ExactModel(recorded.model, list(recorded.targets))


@pytest.fixture(scope="module")
def sample(opened):
    """Token ids of the documents of the sample."""
    store, recorded = opened
    windows = recorded.sequences(CurvatureFolder(store).recipe()["sample_ids"])
    return [torch.from_numpy(window.ids) for window in windows]


@pytest.fixture(scope="module")
def factors(exact, sample):
    return exact.factors(sample)


def test_sample_is_spread_over_the_store_and_has_just_enough_tokens(opened):
    store, _ = opened
    ids = draw_sample(store, TOKENS)
    columns = store.columns_at(("status", "n_tokens"), ids)
    assert (columns["status"] == STATUS["ok"]).all()
    assert TOKENS <= columns["n_tokens"].sum() < TOKENS + columns["n_tokens"].max()
    assert ids[0] < 4
    assert ids[-1] > len(store) - 8
    assert len(draw_sample(store, 10**9)) == (store.column("status") == STATUS["ok"]).sum()


def test_factors_are_the_means_over_target_tokens(opened, factors):
    store, recorded = opened
    assert "lm_head" in recorded.targets
    for name, (a, s) in factors.items():
        curvature = CurvatureFolder(store).read(name, "kfac")
        for side, want in ((curvature.i, a), (curvature.o, s)):
            basis = side.basis.double()
            got = basis @ torch.diag(side.values) @ basis.T
            assert (got - want).norm() <= 1e-5 * want.norm()


@pytest.fixture(scope="module")
def texts(sample):
    """Two queries, one with a late loss and a factor, and documents; the last has two windows."""
    queries = [TokenSequence.of(sample[0]), TokenSequence.of(sample[1], -2.0, owner=1, first=5)]
    documents = [TokenSequence.of(ids, owner=n) for n, ids in enumerate(sample[2:9])]
    return queries, [*documents, TokenSequence.of(sample[9], 0.5, owner=6)]


def exact_gradients(exact, windows):
    """Return the whole gradients of every owner, summed over its windows."""
    sums = {}
    for window in windows:
        first = len(window) - window.n_targets
        gradient = exact.gradient(torch.from_numpy(window.ids), first)
        before = sums.get(window.owner, dict.fromkeys(gradient, 0))
        sums[window.owner] = {
            name: before[name] + window.factor * g for name, g in gradient.items()
        }
    return [sums[owner] for owner in sorted(sums)]


def rescored(opened, texts, kind, damping=0.03, budget=2**40):
    store, recorded = opened
    folder = CurvatureFolder(store)
    queries, documents = texts
    return rescore(
        recorded, folder, list(recorded.targets), queries, documents,
        kind=kind, damping=damping, budget=budget,
    )  # fmt: skip


@pytest.mark.parametrize("damping", [0.03, 1.0])
def test_kfac_scores_equal_those_of_explicit_gradients(opened, exact, factors, texts, damping):
    queries, documents = (exact_gradients(exact, windows) for windows in texts)
    want = kfac_scores(factors, queries, documents, damping).numpy()
    got = rescored(opened, texts, "kfac", damping).scores
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize("damping", [0.03, 1.0])
def test_ekfac_scores_equal_those_of_explicit_gradients(
    opened, exact, factors, sample, texts, damping
):
    queries, documents = (exact_gradients(exact, windows) for windows in texts)
    gradients = [exact.gradient(ids) for ids in sample]
    n_tokens = sum(len(ids) - 1 for ids in sample)
    want = ekfac_scores(factors, gradients, n_tokens, queries, documents, damping).numpy()
    got = rescored(opened, texts, "ekfac", damping).scores
    assert np.abs(got - want).max() <= 1e-4 * np.abs(want).max()


def test_groups_of_layers_and_parts_of_batches_give_the_same_scores(opened, texts, monkeypatch):
    whole = rescored(opened, texts, "ekfac")
    monkeypatch.setattr(whole_gradients, "VALUES_AT_ONCE", 1)
    parts = rescored(opened, texts, "ekfac", budget=1)
    assert whole.n_groups == 1
    assert parts.n_groups == len(opened[1].targets)
    assert parts.matrix_bytes < whole.matrix_bytes
    np.testing.assert_allclose(parts.scores, whole.scores, rtol=1e-4, atol=1e-6)


def test_without_damping_a_singular_curvature_is_refused(opened, texts):
    with pytest.raises(ConfigError, match="no inverse with damping 0: give a larger"):
        rescored(opened, texts, "kfac", damping=0.0)


def test_layers_go_into_groups_within_the_budget():
    assert split_layers("abcd", [3, 3, 9, 1], 6) == [["a", "b"], ["c"], ["d"]]
    assert split_layers("", [], 6) == []


class Killed(Exception):
    pass


def test_killed_run_continues_where_it_was(measured, tmp_path, monkeypatch):
    output = tmp_path / "out"
    shutil.copytree(measured, output, ignore=shutil.ignore_patterns("curvature"))
    write, calls = CurvatureFolder.write_second_moments, []

    def write_two(self, layer, moments, factors_sum):
        calls.append(layer)
        if len(calls) == 3:
            raise Killed
        write(self, layer, moments, factors_sum)

    monkeypatch.setattr(CurvatureFolder, "write_second_moments", write_two)
    with pytest.raises(Killed):
        fitted(output)
    lines = fitted(output, memory=1e-9)
    assert len([line for line in lines if line.startswith("kfac")]) == 0
    assert len([line for line in lines if line.startswith("ekfac")]) == len(calls) - 3
    for path in sorted((measured / "curvature").glob("*.safetensors")):
        continued = load_file(output / "curvature" / path.name)
        for name, tensor in load_file(path).items():
            # A group with the head makes the logits at once, others in chunks.
            torch.testing.assert_close(continued[name], tensor, rtol=1e-4, atol=1e-9)


def test_wide_side_keeps_its_diagonal(output, monkeypatch):
    monkeypatch.setattr(layer_curvature, "MAX_SIDE", 40)
    fitted(output, layers=("layers.0.mlp.up_proj",), curvature_tokens=100)
    with ProjectionStore(output) as store:
        folder = CurvatureFolder(store)
        curvature = folder.read("model.layers.0.mlp.up_proj", "ekfac")
        assert curvature.i.basis is not None
        assert curvature.o.basis is None
        run = config_from(RecordedRunArgs(output=str(output)))
        recorded = RecordedModel(store, run, torch.device("cpu"), layers=("layers.0.mlp.up_proj",))
        ids = [torch.from_numpy(w.ids) for w in recorded.sequences(folder.recipe()["sample_ids"])]
        exact = ExactModel(recorded.model, list(recorded.targets))
        ((_, s),) = exact.factors(ids).values()
    torch.testing.assert_close(curvature.o.values, s.diagonal(), rtol=1e-4, atol=1e-9)


# --- refusals ---


def test_other_number_of_tokens_is_refused(measured):
    with pytest.raises(StoreError, match="begun with --curvature_tokens 600, this call has 700"):
        fitted(measured, curvature_tokens=700)


def test_curvature_of_another_model_is_refused_by_the_setting(output):
    fitted(output, layers=("layers.0.mlp.up_proj",), curvature_tokens=100)
    path = output / "curvature" / "recipe.json"
    recipe = json.loads(path.read_text())
    recipe["belongs_to"]["--model (weights)"] = "0123"
    path.write_text(json.dumps(recipe))
    with ProjectionStore(output) as store, pytest.raises(StoreError) as error:
        CurvatureFolder(store).recipe()
    assert "--model (weights): curvature '0123', store '" in str(error.value)
    assert "curvature" in str(error.value).splitlines()[-1]


def test_second_moments_of_other_eigenvectors_are_missing(output):
    name = "model.layers.0.mlp.up_proj"
    settings = {"layers": ("layers.0.mlp.up_proj",), "curvature_tokens": 100}
    fitted(output, **settings)
    path = output / "curvature" / f"{name}.kfac.safetensors"
    tensors = load_file(path)
    basis = tensors["i.basis"].flip(1)
    with ProjectionStore(output) as store:
        folder = CurvatureFolder(store)
        assert folder.lacking([name], "ekfac") == []
        i = Side(tensors["i.values"].flip(0), basis)
        folder.write_factors(name, i, Side(tensors["o.values"], tensors["o.basis"]))
        assert folder.lacking([name], "kfac") == []
        assert folder.lacking([name], "ekfac") == [name]
        with pytest.raises(StoreError, match=r"along other eigenvectors .* run `.*curvature"):
            folder.read(name, "ekfac")
        lines = fitted(output, **settings)
        assert [line.split(":")[0] for line in lines[1:]] == ["ekfac"]
        path.unlink()
        assert folder.lacking([name], "ekfac") == [name]
        lines = fitted(output, **settings)
        assert [line.split(":")[0] for line in lines[1:]] == ["kfac", "ekfac"]
        assert folder.read(name, "ekfac").second_moments is not None


def test_two_calls_at_once_are_refused(output):
    with (
        ProjectionStore(output) as store,
        CurvatureFolder(store).locked(),
        pytest.raises(StoreError, match="another `gradproj curvature` measures in"),
    ):
        fitted(output)


@pytest.mark.parametrize("content", ["", "[]", '{"format_version": 1}'])
def test_damaged_recipe_names_the_way_out(output, content):
    (output / "curvature").mkdir()
    (output / "curvature" / "recipe.json").write_text(content)
    with ProjectionStore(output) as store, pytest.raises(StoreError, match=r"is damaged .* delete"):
        CurvatureFolder(store).recipe()


def test_command_says_what_it_measured(output, capsys):
    words = ["--curvature_tokens", "100", "--layers", "layers.0.mlp", "--device", "cpu"]
    assert main(["curvature", str(output), *words]) == 0
    printed = capsys.readouterr()
    assert "3 layers, from " in printed.out
    assert "sample: " in printed.err


def test_changed_model_is_refused(output, job, tmp_path):
    moved = tmp_path / "model"
    shutil.copytree(job.model, moved)
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    with pytest.raises(ModelError, match=r"--model \(config\)"):
        fitted(output, model=str(moved))
