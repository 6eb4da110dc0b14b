"""The command ``domains``: its numbers by hand, its table, its figure, its errors."""

import itertools
import json
import re

import numpy as np
import pytest
from helpers.analysis_stores import (
    EMPTY,
    MISSING_UNIT,
    N_SAMPLES,
    NAMES,
    columns_of,
    dense_curvature,
    make_store,
    ok_rows,
)
from helpers.outputs import ROWS_PER_UNIT, uncommit
from helpers.stores import Output

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.analysis import domain_matrix
from gradproj.cli.domains import table_lines
from gradproj.formatting import clean, one_line
from gradproj.report.distributions import count_rows
from gradproj.report.domain_figure import draw_domains
from gradproj.report.domain_summary import by_similarity, facts_from_matrix
from gradproj.store.layout import StoreConfig
from gradproj.store.writer import update_attributes

C = 0.1
DOMAIN = np.arange(N_SAMPLES) % 3 - 1


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_store(tmp_path_factory.mktemp("domains") / "out", "float16")


def run(capsys, *argv):
    """``(exit code, standard output, standard error)``."""
    code = main(["domains", *map(str, argv), "--device", "cpu"])
    return code, *capsys.readouterr()


def strictly(text):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("layers", [None, [NAMES[2], NAMES[0]]], ids=["all", "two"])
@pytest.mark.parametrize("score", ["kfac", "preconditioned", "dot", "cosine"])
def test_json_matches_the_dense_computation(made, tmp_path, capsys, score, layers):
    flags = ["--score", score, "--output_dir", tmp_path, "--format", "json"]
    flags += ["--damping", C] if score in ("kfac", "preconditioned") else []
    flags += ["--layers", ",".join(layers)] if layers else []
    layers_in_order = [name for name in NAMES if layers is None or name in layers]
    code, printed, _ = run(capsys, made.path, *flags)
    assert code == 0
    got = strictly(printed)
    assert got == strictly((tmp_path / "domains.json").read_text())

    rows, members = (
        made.decoded().astype(np.float64)[:, columns_of(layers_in_order)],
        [DOMAIN == 0, DOMAIN == 1],
    )
    members = [here & ok_rows(made) for here in members]
    mean = np.stack([rows[here].mean(axis=0) for here in members])
    norms = np.linalg.norm(mean, axis=1)
    np.testing.assert_allclose(got["cosine"], mean @ mean.T / np.outer(norms, norms), rtol=1e-7)
    if score == "cosine":
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        mean = np.stack([unit[here].mean(axis=0) for here in members])
        influence = mean @ mean.T
    else:
        kind = {"kfac": "kfac", "preconditioned": "second_moment"}.get(score)
        inverse = (
            np.linalg.inv(dense_curvature(made, kind, C, layers_in_order))
            if kind
            else np.eye(rows.shape[1])
        )
        influence = mean @ inverse @ mean.T
    np.testing.assert_allclose(got["influence"], influence, rtol=1e-6)

    ids = np.arange(N_SAMPLES)
    for domain, here, norm in zip(got["domains"], members, norms, strict=True):
        tokens = ids[here] + 1
        assert (domain["rows"], domain["tokens"]) == (here.sum(), tokens.sum())
        assert domain["loss"] == pytest.approx((ids[here] / 8 * tokens).sum() / tokens.sum())
        assert domain["mean_norm"] == pytest.approx(np.linalg.norm(rows[here], axis=1).mean())
        assert domain["norm_of_mean"] == pytest.approx(norm)
    saved = np.load(tmp_path / got["mean_rows"])
    np.testing.assert_allclose(saved, [rows[here].mean(axis=0) for here in members], rtol=1e-5)
    assert [layer["name"] for layer in got["layers"]] == layers_in_order
    assert sum(np.prod(layer["shape"]) for layer in got["layers"]) == saved.shape[1]


def test_json_explains_every_key_and_the_score(made, tmp_path, capsys):
    got = strictly(run(capsys, made.path, "--output_dir", tmp_path, "--format", "json")[1])
    assert got["score"] == "kfac"
    assert "nats of the query's loss" in got["meaning"]
    assert got["sign"].startswith("positive: training more on the document lowers")
    explained = {key.removeprefix("domains[].") for key in got["keys"]}
    assert set(got["domains"][0]) - {"name"} <= explained
    assert {"cosine", "influence", "order", "mean_rows", "null"} <= explained
    assert (got["n_documents"], got["n_rows"], got["n_missing"]) == (70, ok_rows(made).sum(), 16)
    assert got["missing_ids"] == [[32, 48]]
    assert sum(sum(domain["without_row"].values()) for domain in got["domains"]) == sum(
        DOMAIN[i] >= 0 for i in EMPTY
    )


def test_missing_rows_are_counted_by_domain_from_the_corpus_index(output, tmp_path, capsys):
    uncommit(output, 1, 3)
    code, printed, _ = run(capsys, output, "--output_dir", tmp_path, "--format", "json")
    assert code == 0
    got = strictly(printed)
    names = ["Github", "ArXiv", "Pile-CC"]
    lost = [*range(ROWS_PER_UNIT, 2 * ROWS_PER_UNIT), *range(3 * ROWS_PER_UNIT, 4 * ROWS_PER_UNIT)]
    for domain in got["domains"]:
        mine = [i for i in range(70) if names[i % 3] == domain["name"]]
        assert domain["documents"] == len(mine)
        assert domain["missing"] == len(set(mine) & set(lost))
        assert domain["rows"] + domain["missing"] + sum(domain["without_row"].values()) == len(mine)
    # An unmerged store has no token covariances, so the score falls back to cosine.
    assert got["score"] == "cosine"


def test_table_shows_domains_counts_score_and_sign(made, tmp_path, capsys):
    _, printed, _ = run(capsys, made.path, "--output_dir", tmp_path)
    assert re.search(r"rows +52 of 70 documents: 16 not computed yet, 2 empty", printed)
    assert "score      kfac: influence with the curvature" in printed
    assert "positive: training more on the document lowers the query's loss" in printed
    assert re.search(r"\d +ArXiv +– +18 +–", printed)
    *lines, written = printed.splitlines()
    assert written == f"written    domains.json, mean_rows.npy, domains.png in {tmp_path}"
    assert max(map(len, lines)) <= 120


def many_domains(path, names, n_samples=260):
    """Make a store with rows of every named domain but the last."""
    output = Output(
        path,
        n_samples,
        ((2, 3), (3, 3)),
        StoreConfig(encoding="dense", rows_per_shard=130, proj_dtype="float32"),
    )
    generator = np.random.default_rng(3)
    domain = np.arange(n_samples) % (len(names) - 1)
    centres = generator.standard_normal((len(names), output.layout.dim))
    output.rows = (centres[domain] + 0.5 * generator.standard_normal(output.rows.shape)).astype(
        np.float32
    )
    output.stored = output.rows
    output.row_scale[:] = 1
    output.fill()
    from gradproj.store.writer import write_column_block

    write_column_block(output.store_path, output.layout, 0, {"domain": domain.astype(np.int16)})
    update_attributes(output.store_path, {"domains": names})
    return output


HOSTILE = [
    "$\\frac{1}{0}$",
    "<script>alert(1)</script>",
    "\u202eevil\x1b[31m",
    "a" * 300,
    "Википедия",
    "",
]


def test_domain_without_a_row_is_null_and_hostile_names_stay_names(tmp_path, capsys):
    names = [*HOSTILE, "nobody's"]
    output = many_domains(tmp_path / "out", names)
    code, printed, _ = run(capsys, output.path, "--score", "dot")
    assert code == 0
    got = strictly((output.path / "domains" / "domains.json").read_text())
    assert [domain["name"] for domain in got["domains"]] == names
    last = got["domains"][-1]
    assert (last["rows"], last["loss"], last["effective_rank"]) == (0, None, None)
    assert got["cosine"][-1] == got["influence"][-1] == [None] * len(names)
    assert sorted(got["order"]) == list(range(len(names)))
    assert got["order"][-1] == len(names) - 1
    assert "\x1b" not in printed
    assert "\u202e" not in printed


def picture_of(path):
    """Read a PNG as ``(height, width, 3)`` from 0 to 1."""
    from matplotlib.image import imread

    return imread(path)[..., :3]


@pytest.mark.parametrize("n_domains", [2, 10, 22], ids=str)
def test_numbers_in_the_figure_fit_their_cells_and_names_do_not_overlap(
    tmp_path, monkeypatch, n_domains
):
    from matplotlib.figure import Figure

    names = [f"Domain of a long name {i}" for i in range(n_domains)] + ["nobody's"]
    output = many_domains(tmp_path / "out", names)
    saved = []
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, image, **options: (saved.append(self), plain_save(self, image)),
    )
    with ProjectionStore(output.path) as store:
        draw_domains(facts_in(store), tmp_path / "figure.png")
    (figure,) = saved
    matrices = [axes for axes in figure.get_axes() if axes.collections and axes.texts]
    assert len(matrices) == 2
    for axes in matrices:
        numbers = [text for text in axes.texts if text.get_text()]
        assert len(numbers) == n_domains**2
        cell = axes.get_window_extent().width / n_domains
        assert max(text.get_window_extent().width for text in numbers) <= 0.95 * cell
        boxes = [label.get_window_extent() for label in axes.get_yticklabels()]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
        height = axes.get_xticklabels()[0].get_fontsize() * figure.dpi / 72
        assert cell * np.sin(np.pi / 4) > height  # turned names do not overlap
        limits = axes.collections[0].get_clim()
        assert limits[0] == -limits[1] < 0  # white is 0
    shown = " ".join(
        text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
    )
    assert "positive: training more on the document lowers" in " ".join(shown.split()).replace(
        "Positive", "positive"
    )
    picture = picture_of(tmp_path / "figure.png")
    assert picture.std() > 0.05
    assert (
        picture[:4].min() == picture[-4:].min() == picture[:, -2:].min() == 1
    )  # nothing is cut off


def plain_save(figure, file):
    figure.canvas.print_png(file)


def facts_in(store):
    how = {"score": "dot"}
    return facts_from_matrix(store, domain_matrix(store, **how), how, count_rows(store))


def test_extreme_pairs_are_printed_when_a_matrix_is_too_wide(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("gradproj.cli.domains.draw_domains", lambda facts, path: None)
    output = many_domains(tmp_path / "out", [f"domain {i}" for i in range(41)])
    _, printed, _ = run(capsys, output.path, "--score", "dot")
    assert "the 8 highest and lowest of 780 pairs (all are in the JSON)" in printed
    got = strictly((output.path / "domains" / "domains.json").read_text())
    cosine = np.array(got["cosine"], float)[:40, :40]
    a, b = np.unravel_index(np.argmin(cosine), cosine.shape)
    last = printed.split("cosine of the mean gradients")[1].split("\n\n")[0].splitlines()[-1]
    assert {f"domain {a}", f"domain {b}"} == set(re.findall(r"domain \d+", last))


def test_single_domain_is_shown_without_a_matrix(tmp_path, capsys):
    output = many_domains(tmp_path / "out", ["only", "nobody's"])
    code, printed, _ = run(capsys, output.path, "--score", "dot")
    assert code == 0
    assert "cosine of" not in printed
    assert (output.path / "domains" / "domains.png").stat().st_size > 1000


def test_similar_domains_are_neighbours_and_those_without_rows_last():
    cosine = np.full((6, 6), np.nan)
    there = [0, 1, 3, 4, 5]
    group = {0: 0, 3: 0, 1: 1, 4: 1, 5: 1}
    for i in there:
        for j in there:
            cosine[i, j] = 1 if i == j else 0.8 if group[i] == group[j] else 0.1
    order = by_similarity(cosine, np.array([9, 8, 0, 7, 6, 5]))
    assert order[-1] == 2
    assert len({group[i] for i in order[:2]}) == 1 or len({group[i] for i in order[:3]}) == 1
    assert sorted(order) == list(range(6))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--score", "euclid"],
            "--score is 'euclid'; choose one of kfac, ekfac, preconditioned, dot, cosine, relatif",
        ),
        (["--damping", "much"], "--damping is 'much'; give auto or a number"),
        (["--damping", "-1"], "damping"),
        (["--damping", "0.1,1"], "--damping is '0.1,1'; this command takes one value"),
        (["--layers", "h.9"], "has no layer 'h.9'; it has h.*.mlp"),
        (["--format", "xml"], "--format is 'xml'; choose one of table, json"),
        (["--scor", "dot"], "unknown flag '--scor'; did you mean --score?"),
        (["--output_dir", __file__], "is a file; give another path"),
    ],
)
def test_invalid_flags_are_rejected_in_one_line(made, capsys, flags, message):
    code, _, said = run(capsys, made.path, *flags)
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_missing_and_damaged_stores_and_stores_without_domains_or_rows_are_rejected(
    tmp_path, capsys
):
    assert "there is no store at" in run(capsys, tmp_path / "nowhere")[2]
    empty = Output(tmp_path / "empty")
    assert (
        "has no row yet (70 of 70 documents are still to be computed)" in run(capsys, empty.path)[2]
    )
    filled = Output(tmp_path / "filled").fill()
    update_attributes(filled.store_path, {"domains": ["only"]})
    assert (
        "is of domain 1, and the store names 1. Run"
        in run(capsys, filled.path, "--score", "dot")[2]
    )
    update_attributes(empty.store_path, {"domains": []})
    assert "has no domains: its documents name none" in run(capsys, empty.path)[2]


def test_relatif_compares_domains_by_its_own_curvature(made, tmp_path, capsys):
    _, printed, _ = run(
        capsys, made.path, "--score", "relatif", "--output_dir", tmp_path, "--format", "json"
    )
    assert strictly(printed)["score"] == "kfac"


def test_documents_of_units_that_the_job_leaves_out_are_not_missing(output):
    uncommit(output, 4)
    update_attributes(output / "projections.zarr", {"wanted_units": [[0, 4]]})
    with ProjectionStore(output) as store:
        counts = count_rows(store)
    assert counts.total("missing") == 0
    assert counts.total("not_selected") == 70 - 4 * ROWS_PER_UNIT


def test_cleaned_text_is_one_line_of_visible_characters():
    hostile = "a\x00b\x1b[0m\u202ec\u2028d\ud800e\u2066f\u200dg\u00adh\n\n  i\tj\x85k"
    assert clean(hostile) == "a�b�[0m�c d�e�f\u200dgh i j k"
    assert one_line(" " * 10**6 + "x" * 10**6, 20) == "x" * 19 + "…"
    clean("".join(map(chr, range(0x11000)))).encode("utf-8")


def test_table_lines_are_printable(made):
    with ProjectionStore(made.path) as store:
        lines = table_lines(facts_in(store))
    assert all(line.isprintable() for line in lines)
    assert MISSING_UNIT == 2
