"""Preconditioners equal damped inverses, survive a file, and belong to one store."""

from itertools import islice

import numpy as np
import pytest
import torch
from helpers.analysis_stores import (
    NAMES,
    WIDTHS,
    columns_of,
    damped,
    dense_curvature,
    make_store,
    ok_rows,
)

from gradproj import ProjectionStore
from gradproj.analysis import Preconditioner, curvature
from gradproj.analysis.preconditioner import _Part, auto_damping
from gradproj.analysis.second_moment import DenseSum, TruncatedSum
from gradproj.corpus.sampling import spread_order
from gradproj.errors import ConfigError, StoreError
from gradproj.store.writer import update_attributes

C = 0.05


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("preconditioner") / "out")


@pytest.fixture
def store(output):
    with ProjectionStore(output.path) as opened:
        yield opened


def some_rows(width, n=4):
    return torch.from_numpy(np.random.default_rng(1).standard_normal((n, width)))


def by_hand(matrix, x):
    """Return ``x C^-1`` and ``x C^-1 x^T``."""
    inverse = np.linalg.inv(matrix)
    return x @ inverse, np.einsum("nd,de,ne->n", x, inverse, x)


def assert_is_inverse(fitted, matrix):
    x = some_rows(len(matrix))
    solved, products = by_hand(matrix, x.numpy())
    np.testing.assert_allclose(
        fitted.solve(x), solved, rtol=1e-9, atol=1e-12 * np.abs(solved).max()
    )
    np.testing.assert_allclose(fitted.self_products(x), products, rtol=1e-9)


@pytest.mark.parametrize(
    "layers", [None, [NAMES[2]], [NAMES[1], NAMES[0]]], ids=["all", "one", "two-reversed"]
)
@pytest.mark.parametrize("kind", ["kfac", "second_moment"])
def test_preconditioner_is_the_inverse_of_the_damped_curvature(output, store, kind, layers):
    fitted = Preconditioner.fit(store, kind, C, layers)
    assert_is_inverse(fitted, dense_curvature(output, kind, C, layers))
    assert fitted.layers == (layers or NAMES)


def test_joint_preconditioner_inverts_one_matrix_over_all_layers(output, store):
    rows = output.decoded().astype(np.float64)[ok_rows(output)][:, columns_of(None)]
    fitted = Preconditioner.fit(store, "second_moment", C, joint=True)
    assert_is_inverse(fitted, damped(rows.T @ rows / len(rows), C))


def test_truncation_to_all_directions_equals_the_whole_matrix(output, store):
    want = dense_curvature(output, "second_moment", C)
    assert_is_inverse(
        Preconditioner.fit(store, "second_moment", C, largest_width=1, directions=64), want
    )


def test_truncated_inverse_equals_dense_inverse_for_rows_of_low_rank(tmp_path):
    """Compare Woodbury's identity with the dense inverse, for rows of rank 8."""
    generator = np.random.default_rng(5)
    rows = generator.standard_normal((300, 8)) @ generator.standard_normal((8, 40))
    summed = TruncatedSum(40, 12, torch.device("cpu"))
    for part in np.split(rows, [7, 50, 51, 200]):
        summed.add(torch.from_numpy(part))
    curvature = summed.curvature(300)
    assert len(curvature.values) == 8
    moment = rows.T @ rows / 300
    np.testing.assert_allclose(
        curvature.directions.T @ torch.diag(curvature.values) @ curvature.directions,
        moment,
        atol=1e-9,
    )
    x = some_rows(40)
    solved, products = by_hand(damped(moment, C), x.numpy())
    inverse = curvature.damped(C, "wide")
    np.testing.assert_allclose(inverse.solve(x), solved, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(inverse.self_products(x), products, rtol=1e-7)


def moments_of(rows, directions):
    """Return the second moment, whole and truncated to its largest directions."""
    whole = DenseSum(rows.shape[1], torch.device("cpu"))
    truncated = TruncatedSum(rows.shape[1], directions, torch.device("cpu"))
    for part in rows.split(96):
        whole.add(part)
        truncated.add(part)
    return whole.curvature(len(rows)), truncated.curvature(len(rows))


def test_truncated_complement_has_the_mean_of_the_remaining_spectrum():
    generator = np.random.default_rng(8)
    rows = torch.from_numpy(
        generator.standard_normal((400, 20)) * np.concatenate([[30, 20, 10], np.full(17, 2.0)])
    )
    _, truncated = moments_of(rows, 3)
    u, e = truncated.directions.numpy(), truncated.values.numpy()
    total = (rows**2).sum().item() / len(rows)
    left = (total - e.sum()) / 17
    matrix = u.T @ np.diag(e - left) @ u + left * np.eye(20)
    x = some_rows(20)
    solved, products = by_hand(matrix + C * total / 20 * np.eye(20), x.numpy())
    inverse = truncated.damped(C, "wide")
    np.testing.assert_allclose(inverse.solve(x), solved, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(inverse.self_products(x), products, rtol=1e-9)


@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_truncated_scores_correlate_with_those_of_the_whole_matrix(size):
    """Use a quarter of the directions of a decaying spectrum, and norms of different magnitude."""
    generator = np.random.default_rng(9)
    width, n = 256, 1_000
    rotation = np.linalg.qr(generator.standard_normal((width, width)))[0]
    rows = generator.standard_normal((n, width)) * np.arange(1, width + 1) ** -0.7 @ rotation
    rows = torch.from_numpy(rows * np.exp(generator.standard_normal((n, 1))) * size)
    whole, truncated = moments_of(rows, 64)
    queries, documents = rows[:8] + rows[8:16], rows[16:]
    for c, least in ((1.0, 0.995), (0.1, 0.9)):
        want, got = (
            part.damped(c, "wide").solve(queries) @ documents.T for part in (whole, truncated)
        )
        for query in range(8):
            assert np.corrcoef(want[query], got[query])[0, 1] > least


def test_truncation_keeps_the_largest_directions():
    generator = np.random.default_rng(6)
    spectrum = np.concatenate([[30, 20, 10], np.full(17, 0.01)])
    rows = torch.from_numpy(generator.standard_normal((400, 20)) * spectrum)
    whole, got = moments_of(rows, 3)
    moment = whole.moment
    np.testing.assert_allclose(got.values, torch.linalg.eigvalsh(moment).flip(0)[:3], rtol=1e-3)
    assert got.mean_diagonal.item() == pytest.approx(moment.diagonal().mean().item())


@pytest.mark.parametrize("kind", ["kfac", "second_moment"])
def test_with_damping_equals_fitting_again_without_a_scan(store, kind, monkeypatch):
    fitted = Preconditioner.fit(store, kind, 1.0)
    want = Preconditioner.fit(store, kind, C)
    monkeypatch.setattr(store, "scan", None)
    x = some_rows(store.dim)
    torch.testing.assert_close(fitted.with_damping(C).solve(x), want.solve(x))
    assert fitted.damping == 1.0


def test_auto_damping_follows_the_documented_rule(store):
    assert auto_damping("kfac", 256) == auto_damping("kfac", 4096) == 0.03
    assert [auto_damping("second_moment", w) for w in (256, 1023, 1024, 4096)] == [
        0.1,
        0.1,
        1.0,
        1.0,
    ]
    x = some_rows(store.dim)
    for kind, c in (("kfac", 0.03), ("second_moment", 0.1)):
        auto, numeric = (Preconditioner.fit(store, kind, damping) for damping in ("auto", c))
        torch.testing.assert_close(auto.solve(x), numeric.solve(x))


@pytest.mark.parametrize("unit", [1e-15, 1e15])
def test_scale_of_the_rows_does_not_change_the_result(tmp_path, unit):
    output = make_store(tmp_path / "out")
    x = some_rows(output.layout.dim)
    with ProjectionStore(output.path) as store:
        want = Preconditioner.fit(store, "second_moment", C).solve(x)
    output.stored = output.stored * np.float32(unit)
    for number in (0, 1, 3, 4):
        (output.path / output.layout.shard_name(number)).unlink()
        output.commit(number)
    with ProjectionStore(output.path) as store:
        got = Preconditioner.fit(store, "second_moment", C).solve(x)
    torch.testing.assert_close(got * unit**2, want, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "settings",
    [
        {"kind": "kfac"},
        {"kind": "kfac", "layers": [NAMES[2], NAMES[0]], "damping": 0.5},
        {"kind": "second_moment"},
        {"kind": "second_moment", "largest_width": 7, "directions": 3},
        {"kind": "second_moment", "joint": True},
    ],
    ids=["kfac", "kfac-layers", "second_moment", "truncated", "joint"],
)
def test_load_returns_what_save_wrote(store, tmp_path, settings):
    fitted = Preconditioner.fit(store, **settings)
    path = fitted.save(store, tmp_path / "new" / "it.safetensors")
    loaded = Preconditioner.load(store, path=path)
    x = some_rows(sum(k_o * k_i for k_o, k_i in WIDTHS) if "layers" not in settings else 15)
    torch.testing.assert_close(loaded.solve(x), fitted.solve(x), rtol=0, atol=0)
    torch.testing.assert_close(loaded.self_products(x), fitted.self_products(x), rtol=0, atol=0)
    assert (loaded.kind, loaded.damping, loaded.layers) == (
        fitted.kind,
        fitted.damping,
        fitted.layers,
    )
    assert loaded.n_rows == fitted.n_rows


def test_default_path_is_one_file_per_kind(output, store):
    for kind in ("kfac", "second_moment"):
        path = Preconditioner.fit(store, kind).save(store)
        assert path == output.path / "preconditioners" / f"{kind}.safetensors"
        assert Preconditioner.load(store, kind).kind == kind


def test_file_of_another_store_damaged_or_missing_is_rejected(store, tmp_path):
    path = Preconditioner.fit(store).save(store, tmp_path / "it.safetensors")
    other = make_store(tmp_path / "other")
    with ProjectionStore(other.path) as opened:
        with pytest.raises(
            StoreError, match=r"fitted on another store\n  store_id: fitted on '.*', this store"
        ):
            Preconditioner.load(opened, path=path)
        with pytest.raises(
            StoreError, match=r"there is no preconditioner at .*kfac\.safetensors; fit one"
        ):
            Preconditioner.load(opened)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(StoreError, match=r"is damaged .*: delete it and fit"):
        Preconditioner.load(store, path=path)


def test_changed_byte_in_a_file_is_detected(store, tmp_path):
    path = Preconditioner.fit(store, "second_moment").save(store, tmp_path / "it.safetensors")
    whole = path.read_bytes()
    at = whole.index(b'"n_rows') if b'"n_rows' in whole else whole.index(b"n_rows")
    for place, byte in ((len(whole) - 3, whole[-3] ^ 1), (at + whole[at:].index(b"5"), ord("4"))):
        path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        with pytest.raises(
            StoreError, match=r"is damaged \(its checksum does not match\): delete it and fit"
        ):
            Preconditioner.load(store, path=path)


def test_only_used_layers_are_factorized(store, monkeypatch):
    fitted, names = Preconditioner.fit(store, "second_moment"), []
    real = curvature.inverse_root
    monkeypatch.setattr(
        curvature, "inverse_root", lambda m, c, name: names.append(name) or real(m, c, name)
    )
    wanted = fitted.for_layers([NAMES[1]]).with_damping(C)
    assert not names
    for _ in range(2):
        wanted.solve(some_rows(8))
    wanted.to(torch.device("cpu"), torch.float32).self_products(some_rows(8))
    assert names == [f"the second moment of {NAMES[1]}'s rows"]


def test_larger_damping_inverts_what_auto_cannot(store):
    bad = torch.diag(torch.tensor([1.0, -0.5], dtype=torch.float64))
    settings = {"kind": "kfac", "damping": "auto", "layers": ["x"], "n_rows": 1, "joint": False}
    fitted = Preconditioner(settings, [_Part("x", 4, curvature.Kronecker(bad, bad.abs()))])
    with pytest.raises(
        ConfigError, match=r"^the token covariance of x's output gradients, 2 wide, has no inv"
    ):
        fitted.ready()
    fitted.with_damping(100.0).ready()


def test_for_layers_selects_parts_and_names_a_missing_one(store):
    fitted = Preconditioner.fit(store, "kfac", C, [NAMES[0], NAMES[2]])
    x = some_rows(9)
    torch.testing.assert_close(
        fitted.for_layers([NAMES[2]]).solve(x),
        Preconditioner.fit(store, "kfac", C, [NAMES[2]]).solve(x),
    )
    with pytest.raises(
        ConfigError, match=r"has no layer 'h\.1\.mlp'; its layers are h\.0\.mlp, h\.2\.mlp"
    ):
        fitted.for_layers([NAMES[1]])
    joint = Preconditioner.fit(store, "second_moment", joint=True)
    with pytest.raises(ConfigError, match="has one matrix over all its layers"):
        joint.for_layers([NAMES[0]])


def test_store_without_covariances_or_rows_is_rejected(tmp_path):
    output = make_store(tmp_path / "out")
    update_attributes(output.store_path, {"covariance_tokens": 0})
    with (
        ProjectionStore(output.path) as store,
        pytest.raises(
            StoreError, match=r"no token covariances, which kfac is made of.*gradproj merge"
        ),
    ):
        Preconditioner.fit(store)
    for unit in (0, 1, 3, 4):
        (output.path / output.layout.shard_name(unit)).unlink()
    with (
        ProjectionStore(output.path) as store,
        pytest.raises(StoreError, match="has no row to compute a second moment from"),
    ):
        Preconditioner.fit(store, "second_moment")


def test_singular_matrix_is_reported_with_its_layer(tmp_path):
    output = make_store(tmp_path / "out")
    output.stored[:, 8] = output.stored[:, 9] = 0  # h.1's values 2 and 3
    for unit in (0, 1, 3, 4):
        (output.path / output.layout.shard_name(unit)).unlink()
        output.commit(unit)
    with ProjectionStore(output.path) as store:
        with pytest.raises(
            ConfigError,
            match=r"h\.1\.mlp's rows, 8 wide, has no inverse with damping 0: give a lar",
        ):
            Preconditioner.fit(store, "second_moment", 0)
        with pytest.raises(ConfigError, match="which has no inverse without damping"):
            Preconditioner.fit(store, "second_moment", 0, largest_width=1, directions=2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "shampoo"}, "kind is 'shampoo'; choose one of kfac, ekfac, second_moment"),
        ({"joint": True}, "joint requires kind second_moment"),
        ({"directions": 0}, "largest_width and directions must be at least 1"),
        ({"damping": float("nan")}, "damping is nan"),
        ({"layers": ["mlp"]}, "has no layer 'mlp'"),
    ],
)
def test_invalid_arguments_are_rejected(store, wrong, message):
    with pytest.raises(ConfigError, match=message):
        Preconditioner.fit(store, **wrong)


def test_rows_of_another_width_are_rejected(store):
    with pytest.raises(
        ConfigError, match=r"rows are \(4, 5\); this preconditioner takes \(n, 23\)"
    ):
        Preconditioner.fit(store).solve(some_rows(5))


def test_ekfac_is_measured_on_summed_losses_at_equal_steps(tmp_path, monkeypatch):
    """A store of means has the curvature that its rows times their tokens have."""
    monkeypatch.setattr("gradproj.analysis.eigen_moments.MAX_ROWS", 6)
    output = make_store(tmp_path / "mean", loss_reduction="mean")
    with ProjectionStore(output.path) as store:
        ids = [i for i in islice(spread_order(70), 40) if ok_rows(output)[i]][:6]
        fitted = Preconditioner.fit(store, "ekfac")
        assert fitted.n_rows == 6
        n_tokens = store.column("n_tokens")[ids]
        layer, of = store.layers[0], fitted._parts[0].curvature
    rows = output.rows[ids, layer.slice_start : layer.slice_end].astype(float) * n_tokens[:, None]
    x = torch.from_numpy(rows).view(-1, layer.k_o, layer.k_i)
    want = (of.u_o.T @ x @ of.u_i).square().mean(0)
    torch.testing.assert_close(of.moments, want)
