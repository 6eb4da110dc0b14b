"""Scores equal their definitions in float64 for any store, layers and block size."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.analysis_stores import (
    N_SAMPLES,
    NAMES,
    columns_of,
    dense_curvature,
    dense_scores,
    make_store,
    ok_rows,
    rewrite_rows,
)
from helpers.encoding import encode_rows

from gradproj import ProjectionStore, analysis
from gradproj.analysis import (
    MEANINGS,
    SIGN,
    Preconditioner,
    bottom_k,
    iter_scores,
    score,
    self_influence,
    top_and_bottom,
    top_k,
)
from gradproj.analysis.row_blocks import decoded_on
from gradproj.analysis.score_types import DEFAULT_SCORE, DOMAIN_SCORES, SCORES, SELF_SCORES
from gradproj.errors import ConfigError, StoreError

DTYPES = ("float32", "float16", "bfloat16")
C = 0.2


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    made = {dtype: make_store(folder / dtype, dtype) for dtype in DTYPES}
    made["zstd"] = make_store(folder / "zstd", "float16", compressor="zstd")
    return made


@pytest.fixture
def output(outputs):
    return outputs["float32"]


def queries_for(output, n=3, seed=3):
    return np.random.default_rng(seed).standard_normal((n, output.layout.dim)).astype(np.float32)


def settings_for(kind):
    return {"score": kind} if kind in ("dot", "cosine") else {"score": kind, "damping": C}


def assert_scores(got, want):
    """Check equality within the rounding of a float32 sum, and NaN at the same places."""
    assert got.dtype == np.float32
    np.testing.assert_array_equal(np.isnan(got), np.isnan(want))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=3e-6 * np.nanmax(np.abs(want)))


@pytest.mark.parametrize(
    "layers", [None, [NAMES[1]], [NAMES[2], NAMES[0]]], ids=["all", "one", "two-turned"]
)
@pytest.mark.parametrize("dtype", [*DTYPES, "zstd"])
@pytest.mark.parametrize("kind", sorted(MEANINGS))
def test_scores_equal_their_definitions_in_float64(outputs, kind, dtype, layers):
    output, queries = outputs[dtype], queries_for(outputs[dtype])
    with ProjectionStore(output.path) as store:
        got = score(queries, store, layers=layers, **settings_for(kind))
    assert_scores(got, dense_scores(output, queries, kind, C, layers))


def test_documents_without_a_row_score_nan(output):
    with ProjectionStore(output.path) as store:
        got = score(queries_for(output), store, score="dot")
    assert np.isnan(got).all(axis=0).tolist() == (~ok_rows(output)).tolist()
    assert np.isnan(got).sum() == 3 * 18


@pytest.mark.parametrize("rows_per_block", [1, 7, 16, 1000])
def test_block_size_does_not_change_scores(output, rows_per_block):
    queries = queries_for(output)
    with ProjectionStore(output.path) as store:
        want, got = (score(queries, store, rows_per_block=n) for n in (None, rows_per_block))
        ends = [
            top_and_bottom(queries, store, 9, 9, rows_per_block=n) for n in (None, rows_per_block)
        ]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    for before, after in zip(*ends, strict=True):
        np.testing.assert_array_equal(before.ids, after.ids)


@pytest.mark.parametrize("kind", ["dot", "cosine"])
def test_rows_of_very_different_norms_keep_their_precision(tmp_path, kind):
    output = make_store(tmp_path / "wild", "float16", sizes=1e12)
    queries = queries_for(output)
    with ProjectionStore(output.path) as store:
        got = score(queries, store, score=kind)
    want = dense_scores(output, queries, kind, 0)
    norms = np.linalg.norm(output.decoded(), axis=1) if kind == "dot" else 1
    assert np.nanmax(np.abs(got - want) / norms) < 1e-5


def test_relatif_accepts_either_preconditioner(output):
    queries = queries_for(output)
    with ProjectionStore(output.path) as store:
        fitted = Preconditioner.fit(store, "second_moment", C)
        got = score(queries, store, score="relatif", preconditioner=fitted)
    assert_scores(got, dense_scores(output, queries, "relatif", C, kind="second_moment"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unit", [1e-15, 1e15])
def test_rows_of_extreme_scale_have_scores(tmp_path, unit, dtype):
    """The inverse curvature is about 1e30 or 1e-30, and so are the solved queries."""
    output = make_store(tmp_path / "out", dtype)
    output.rows = (output.decoded() * unit).astype(np.float32)
    output.stored, output.row_scale = encode_rows(output.rows, dtype)
    rewrite_rows(output)
    queries = queries_for(output) * np.float32(unit)
    with ProjectionStore(output.path) as store:
        for kind in ("cosine", "preconditioned", "relatif"):
            fitted = None if kind == "cosine" else Preconditioner.fit(store, "second_moment", C)
            got = score(queries, store, score=kind, preconditioner=fitted)
            want = dense_scores(output, queries, kind, C, kind="second_moment")
            assert_scores(got, want)


def test_row_of_zeros_scores_zero(tmp_path):
    output = make_store(tmp_path / "zero")
    output.rows[:] = 0
    output.stored[:] = 0
    rewrite_rows(output)
    with ProjectionStore(output.path) as store:
        for kind in ("cosine", "relatif", "kfac", "preconditioned"):
            got = score(queries_for(output), store, score=kind)
            assert set(got[~np.isnan(got)].tolist()) == {0.0}


@pytest.mark.parametrize("kind", ["dot", "kfac", "preconditioned"])
@pytest.mark.parametrize("layers", [None, [NAMES[2], NAMES[0]]], ids=["all", "two"])
def test_self_influence_is_the_score_with_itself(output, kind, layers):
    rows = output.decoded()
    with ProjectionStore(output.path) as store:
        got = self_influence(store, layers=layers, **settings_for(kind))
    want = np.diagonal(dense_scores(output, np.nan_to_num(rows), kind, C, layers))
    assert_scores(got, want)
    assert (got[ok_rows(output)] > 0).all()


@pytest.mark.parametrize("kind", sorted(MEANINGS))
def test_top_and_bottom_equal_sorting_all_scores(output, kind):
    queries = queries_for(output)
    with ProjectionStore(output.path) as store:
        all_scores = score(queries, store, **settings_for(kind))
        top = top_k(queries, store, 5, **settings_for(kind))
        bottom = bottom_k(queries, store, 4, **settings_for(kind))
        both = top_and_bottom(queries, store, 5, 4, **settings_for(kind))
    order = np.argsort(-np.where(np.isnan(all_scores), -np.inf, all_scores), axis=1, kind="stable")
    n_ok = int(ok_rows(output).sum())
    np.testing.assert_array_equal(top.ids, order[:, :5])
    np.testing.assert_array_equal(bottom.ids, order[:, :n_ok][:, ::-1][:, :4])
    np.testing.assert_allclose(top.scores, np.take_along_axis(all_scores, top.ids, 1), rtol=1e-5)
    np.testing.assert_allclose(
        bottom.scores, np.take_along_axis(all_scores, bottom.ids, 1), rtol=1e-5
    )
    np.testing.assert_array_equal(both[0].ids, top.ids)
    np.testing.assert_array_equal(both[1].ids, bottom.ids)
    assert top.n_scored == bottom.n_scored == n_ok


def test_ties_are_ordered_by_sample_id(output):
    with ProjectionStore(output.path) as store:
        top = top_k(np.zeros(output.layout.dim), store, N_SAMPLES, score="dot", rows_per_block=9)
    np.testing.assert_array_equal(top.ids[0], np.flatnonzero(ok_rows(output)))


def test_only_chosen_domains_are_scored(output):
    queries = queries_for(output)
    with ProjectionStore(output.path) as store:
        got = score(queries, store, score="dot", domains=["Github"])
        top = top_k(queries, store, N_SAMPLES, score="dot", domains=["Github"])
    wanted = ok_rows(output) & (np.arange(N_SAMPLES) % 3 - 1 == 1)
    np.testing.assert_array_equal(~np.isnan(got), np.tile(wanted, (3, 1)))
    assert sorted(top.ids[0].tolist()) == np.flatnonzero(wanted).tolist()


def test_results_match_the_type_of_the_queries(output, tmp_path):
    queries = queries_for(output)
    memory_map = np.lib.format.open_memmap(
        tmp_path / "scores.npy", "w+", np.float32, (3, N_SAMPLES)
    )
    with ProjectionStore(output.path) as store:
        want = score(queries, store)
        tensor = score(torch.from_numpy(queries).double(), store)
        assert torch.is_tensor(top_k(torch.from_numpy(queries), store, 2).ids)
        np.testing.assert_array_equal(tensor.numpy(), want)
        np.testing.assert_allclose(score(queries[1], store), want[1:2], rtol=1e-5, atol=1e-6)
        score(queries, store, out=memory_map)
        blocks = list(iter_scores(queries, store, rows_per_block=20))
    np.testing.assert_array_equal(np.load(tmp_path / "scores.npy"), want)
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in blocks]), np.arange(N_SAMPLES))


def test_queries_may_hold_only_the_chosen_layers(output):
    queries, layers = queries_for(output), [NAMES[1], NAMES[0]]
    with ProjectionStore(output.path) as store:
        want = score(queries, store, layers=layers)
        got = score(queries[:, columns_of(layers)], store, layers=layers)
    np.testing.assert_array_equal(got, want)


def test_rows_of_a_missing_shard_are_not_ranked(tmp_path):
    output = make_store(tmp_path / "lost")
    (output.path / output.layout.shard_name(0)).unlink()
    with ProjectionStore(output.path) as store:
        top = top_k(queries_for(output), store, N_SAMPLES, score="dot")
        assert np.isfinite(top.scores).all()
        assert top.ids.min() >= 16
        assert Preconditioner.fit(store, "second_moment").n_rows == ok_rows(output)[16:].sum()


@pytest.mark.parametrize("dtype", [*DTYPES, "zstd"])
@pytest.mark.parametrize("layers", [None, [NAMES[2], NAMES[0]]], ids=["all", "two"])
def test_rows_decoded_on_the_device_equal_the_store_s(outputs, dtype, layers):
    """Run the code path of a GPU on the CPU."""
    with ProjectionStore(outputs[dtype].path) as store:
        want = np.concatenate([rows for _, rows in store.scan(layers=layers)])
        got = list(decoded_on(torch.device("cpu"), store, layers, 9))
    assert {rows.dtype for _, rows in got} == {torch.float32}
    np.testing.assert_array_equal(np.concatenate([ids for ids, _ in got]), np.arange(N_SAMPLES))
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in got]), want)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", sorted(MEANINGS))
def test_gpu_gives_the_same_scores(outputs, kind, dtype):
    output, queries = outputs[dtype], queries_for(outputs[dtype])
    with ProjectionStore(output.path) as store:
        got = score(queries, store, device="cuda", **settings_for(kind))
        top = top_k(torch.from_numpy(queries).cuda(), store, 5, device="cuda", **settings_for(kind))
    assert_scores(got, dense_scores(output, queries, kind, C))
    np.testing.assert_array_equal(
        top.ids.cpu(), np.argsort(-np.nan_to_num(got, nan=-np.inf), axis=1, kind="stable")[:, :5]
    )


def test_progress_bar_is_shown_on_request(output, capsys):
    with ProjectionStore(output.path) as store:
        score(queries_for(output), store, score="dot")
        assert capsys.readouterr().err == ""
        score(queries_for(output), store, score="dot", progress=True)
    assert "scores: 100%" in capsys.readouterr().err


def test_meanings_name_sign_and_unit():
    assert "lowers the query's loss" in SIGN
    assert all("nats" in MEANINGS[kind] for kind in ("dot", "kfac", "preconditioned"))
    assert "without unit" in MEANINGS["cosine"]


def test_readme_table_agrees_with_the_scores():
    text = (Path(analysis.__file__).parent / "README.md").read_text()
    rows = [
        line for line in text.splitlines() if re.match(r"\| `\w+` \| .* \| .* \| .* \| .* \|", line)
    ]
    yes = {True: "yes", False: "no"}
    expected = []
    for name, facts in SCORES.items():
        curvature = (facts.curvature or "none") + (", or any given" if facts.any_curvature else "")
        cells = [f"`{name}`", curvature, yes[name in SELF_SCORES], yes[name in DOMAIN_SCORES]]
        expected.append(f"| {' | '.join([*cells, facts.unit or 'none'])} |")
    assert rows[1:] == expected  # after the header
    assert f"The default is `{DEFAULT_SCORE}`." in text


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            {"score": "dott"},
            "score is 'dott'; choose one of kfac, ekfac, preconditioned, dot, cosine, relatif",
        ),
        ({"layers": ["h.9"]}, r"has no layer 'h\.9'; it has h\.0\.mlp"),
        ({"layers": []}, "layers is empty; name some of"),
        ({"layers": NAMES[0]}, "give a list of names"),
        ({"layers": [NAMES[0], NAMES[0]]}, r"names 'h\.0\.mlp' more than once"),
        ({"domains": ["Wiki"]}, "has no domain 'Wiki'; it has ArXiv, Github"),
        ({"domains": []}, "domains is empty; .* has ArXiv, Github"),
        ({"damping": -1.0}, "damping is -1.0; give auto or a number"),
        ({"damping": "none"}, "damping is 'none'"),
    ],
)
def test_invalid_options_are_rejected(output, wrong, message):
    with ProjectionStore(output.path) as store, pytest.raises(ConfigError, match=message):
        score(queries_for(output), store, **wrong)


def test_invalid_queries_are_rejected(output):
    dim = output.layout.dim
    with ProjectionStore(output.path) as store:
        with pytest.raises(ConfigError, match=r"query rows have 5 values, those of .* 23"):
            score(np.ones(5), store)
        with pytest.raises(
            ConfigError, match=r"have 5 values, those of .* 23 \(or 8 for the chosen layers\)"
        ):
            score(np.ones(5), store, layers=[NAMES[1]])
        with pytest.raises(ConfigError, match="not finite: its text has no gradient"):
            score(np.full(dim, np.nan), store)
        with pytest.raises(ConfigError, match="with at least one query"):
            score(np.empty((0, dim)), store)
        with pytest.raises(ConfigError, match=r"71 documents requested; .* has 70"):
            top_k(np.ones(dim), store, 71)
        with pytest.raises(ConfigError, match="out is float64"):
            score(np.ones(dim), store, out=np.empty((1, N_SAMPLES)))
        with pytest.raises(
            ConfigError, match="self_influence does not support score 'cosine'; choose one of kfac"
        ):
            self_influence(store, score="cosine")
        fitted = Preconditioner.fit(store)
        with pytest.raises(ConfigError, match="'dot' takes no preconditioner"):
            score(np.ones(dim), store, score="dot", preconditioner=fitted)
        with pytest.raises(
            ConfigError, match="takes a preconditioner of kind second_moment, this one is kfac"
        ):
            score(np.ones(dim), store, score="preconditioned", preconditioner=fitted)


def test_preconditioner_of_another_store_is_rejected(outputs, output):
    with ProjectionStore(outputs["float16"].path) as other, ProjectionStore(output.path) as store:
        fitted = Preconditioner.fit(other)
        with pytest.raises(
            StoreError, match=r"fitted on another store\n(.|\n)*proj_dtype: fitted on 'float16'"
        ):
            score(queries_for(output), store, preconditioner=fitted)


def test_reference_curvature_is_symmetric_and_positive(output):
    """Check the reference: its matrix is symmetric and positive."""
    matrix = dense_curvature(output, "kfac", C)
    np.testing.assert_allclose(matrix, matrix.T)
    assert np.linalg.eigvalsh(matrix).min() > 0
