"""The command ``report``: a complete, harmless page with the store's numbers."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers.outputs import uncommit
from helpers.report_page import (
    HOSTILE_DOMAIN,
    HOSTILE_KEY,
    N_DOCUMENTS,
    SCRIPT,
    StrictPage,
    shared_job,
)
from helpers.stores import Output

from gradproj import ProjectionStore
from gradproj.__main__ import main
from gradproj.analysis import self_influence, top_and_bottom
from gradproj.formatting import one_line
from gradproj.job.recorded import recorded_config
from gradproj.model.token_texts import TokenText
from gradproj.query import QueryProjector, read_queries
from gradproj.query.token_scores import TokenScore, TokenScores
from gradproj.report.number_format import exponent_of, minus, places_for, scaled
from gradproj.report.token_shading import Scale, shading_of
from gradproj.store import STATUS
from gradproj.store.writer import update_attributes


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return shared_job(tmp_path_factory.getbasetemp() / "report")


@pytest.fixture(scope="module")
def parsed(job):
    return StrictPage(job.page.read_text(encoding="utf-8"))


def report(capsys, *argv):
    """``(exit code, standard output, standard error)``."""
    code = main(["report", *map(str, argv), "--device", "cpu"])
    return code, *capsys.readouterr()


# --- structure and safety ---


def test_page_is_balanced_has_a_heading_for_each_link_and_loads_nothing(job, parsed):
    ids = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    links = [a["href"] for tag, a in parsed.tags if tag == "a"]
    assert len(links) >= 6
    assert {link.removeprefix("#") for link in links} <= set(ids)
    for tag, attributes in parsed.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "img")
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href", "action", "data", "style", "background"):
            assert attributes.get(name, "#").startswith("#"), (tag, attributes)
    assert "@import" not in parsed.css
    assert "url(" not in parsed.css
    assert "http" not in parsed.css
    policy = next(
        a["content"] for _, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy.startswith("default-src 'none'")
    assert job.page.stat().st_size < 990_000  # the megabyte of one line is not in it


def test_hostile_texts_keys_domains_and_queries_stay_text(parsed):
    assert f"{SCRIPT} and then some" in parsed.text
    assert one_line(HOSTILE_DOMAIN, 60) in parsed.text
    assert HOSTILE_KEY in parsed.text
    assert "{{ 7 * 7 }} {% raw %}" in parsed.text
    assert "</style></title></svg></td><img src=x onerror=" in parsed.text
    assert f"first {SCRIPT}�" in parsed.text
    forbidden = re.findall(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        "".join(parsed.words),
    )
    assert not forbidden
    for _, attributes in parsed.tags:
        assert all((value or "").isprintable() for value in attributes.values())
    assert "x" * 50 in parsed.text
    assert "x" * 400 not in parsed.text


def test_every_figure_has_a_label_and_every_table_has_headings(parsed):
    pictures = [a for tag, a in parsed.tags if tag == "svg"]
    assert len(pictures) == 7  # coverage, throughput, two histograms, boxes, two matrices
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in pictures)
    names = [tag for tag, _ in parsed.tags]
    assert names.count("h1") == 1
    assert names.count("h2") == 6
    assert names.count("table") == names.count("thead") == 6
    assert "font-variant-numeric: tabular-nums" in parsed.css
    assert "@media print" in parsed.css


# --- numbers ---


def ids_in_order(parsed, heading):
    """Sample ids of the table after a heading, as the page lists them."""
    rest = parsed.text.split(heading)[1]
    return [
        int(n)
        for n in re.findall(r"(\d+) (?:Github|ArXiv|Pile-CC|no domain|</text>\S+)\S* loss ", rest)
    ]


def test_run_section_shows_what_the_store_recorded(job, parsed):
    with ProjectionStore(job.output) as store:
        counts = store.status_counts()
        assert f"Complete: {counts['ok']} of {N_DOCUMENTS} documents have a row" in parsed.text
        assert f"{store.dim:,} in {len(store.layers)} layers of 16" in parsed.text
        assert store.attributes["corpus"]["fingerprint"] in parsed.text
    for what in (
        "rademacher",
        "float16",
        str(job.tars),
        str(job.model),
        "4 of 4 committed",
        "torch 2.",
    ):
        assert what in parsed.text
    for name in ("ok", "empty"):
        assert f"{name} {counts[name]}" in parsed.text
    assert "rank 0" in parsed.text  # from the logs


def test_outliers_are_the_largest_norms_and_self_influences(job, parsed):
    with ProjectionStore(job.output) as store:
        norms = np.where(store.column("status") == STATUS["ok"], store.column("grad_norm"), -1)
        influence = np.nan_to_num(self_influence(store), nan=-1)
    n_rows = int((norms >= 0).sum())
    for heading, values in (
        ("They weigh most in every score", norms),
        ("largest kfac score with them", influence),
    ):
        assert (
            ids_in_order(parsed, heading)[:n_rows]
            == np.argsort(-values, kind="stable")[:n_rows].tolist()
        )


def test_each_query_shows_its_top_and_bottom_documents_side_by_side_with_the_meaning(job, parsed):
    with ProjectionStore(job.output) as store:
        rows = QueryProjector(store, recorded_config(job.output), "cpu").rows(
            read_queries(job.queries)
        )
        top, bottom = top_and_bottom(rows.rows, store, 60, 60)
    for number, heading in enumerate((f"Query 1: first {SCRIPT}�", "Query 2: second")):
        pairs = [i for pair in zip(top.ids[number], bottom.ids[number], strict=True) for i in pair]
        assert ids_in_order(parsed, heading)[: len(pairs)] == pairs
        assert (
            f"{rows.n_tokens[number]:,} target tokens, loss {rows.loss[number]:.3f}" in parsed.text
        )
    n_found = len({*np.asarray(top.ids).ravel().tolist()} - {-1})
    assert f"{n_found} different documents, of at most {top.n_scored};" in parsed.text
    assert "Score kfac : influence with the curvature" in parsed.text
    assert "Positive: training more on the document lowers the query's loss" in parsed.text


def test_scores_are_shaded_by_token_and_layer_with_the_numbers_of_the_query_command(
    job, tmp_path, capsys
):
    words = ["--queries", job.queries, "--score", "dot", "--top_k", 3]
    main(["query", str(job.output), *map(str, words), "--tokens", "--format", "jsonl"])
    hits = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    best = next(hit for hit in hits if hit["end"] == "top")
    report(capsys, job.output, *words, "--page", tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = StrictPage(text)
    largest = max(abs(hit["score"]) for hit in hits if hit["query"] == best["query"])
    exponent = exponent_of([largest])
    places = places_for([largest], exponent) + 1

    def number(value):
        return minus(scaled(value, exponent, places))

    row = text.split('<table class="documents pairs">')[1].split("<tr>")[2]
    row = row.split('<td class="n">')[2]  # the highest document, without the lowest
    marks = dict.fromkeys(re.findall(r'<mark class="(\w\d)" title="([^"]*)">', row))
    strongest = max(best["tokens"], key=lambda token: abs(token["part"]))["part"]
    assert (f"{'p' if strongest > 0 else 'n'}6", number(strongest)) in marks
    numbers = {number(token["part"]) for token in best["tokens"]}
    assert {value for _, value in marks} <= numbers
    titles = re.findall(r'<span(?: class="\w\d")? title="([^"]*)"></span>', row)
    assert titles == [f"{name}: {number(value)}" for name, value in best["layers"].items()]
    assert f"recomputed {number(best['recomputed_score'])}" in row
    assert len([a for tag, a in page.tags if a.get("class") == "strip"]) == 12
    report(capsys, job.output, *words, "--page", tmp_path / "plain.html", "--no-tokens")
    plain = (tmp_path / "plain.html").read_text(encoding="utf-8")
    assert "<mark" not in plain
    assert ids_in_order(StrictPage(plain), "highest lower") == ids_in_order(page, "highest lower")


def test_excerpt_is_the_part_of_a_text_with_the_largest_parts():
    tokens = [TokenText(f"{n:04d} ", str(n), 5 * n, 5 * n + 5) for n in range(1000)]
    parts = np.full(1000, 0.01)
    parts[700:720] = 1, *([-0.5] * 19)
    found = TokenScore(parts.sum(), parts, np.arange(60.0), 2.0)
    scores = TokenScores(
        [f"m.h.{n // 6}.l{n}" for n in range(60)], True, {3: tokens}, {}, {(0, 3): found}
    )
    shading = shading_of(scores, 0, Scale([1.0]), 3)
    text = "".join(piece.text for piece in shading.pieces)
    assert text.startswith(" … ")
    assert text.endswith(" … ")
    assert "0700 0701" in text
    assert "0719" in text
    assert len(text) < 250
    shades = {piece.text: (piece.shade, piece.value) for piece in shading.pieces}
    assert shades["0700 "] == ("p6", "+1.0000")
    assert shades["0701 "] == ("n3", "−0.5000")
    blocks = [f"m.h.{n} (6 layers)" for n in range(10)]
    assert [cell.text for cell in shading.layers] == [*blocks, "head rows"]
    assert shading.layers[9].value == f"+{sum(range(54, 60))}.0000"


def test_domains_are_listed_with_their_counts_and_losses(job, parsed):
    stats = json.loads((job.output / "projection_stats.json").read_text())["by_domain"]
    for name, of_domain in stats.items():
        shown = re.escape(one_line(name, 60))
        line = re.search(
            rf"{shown} (\d+) (\d+) 0 ([\d,]+) ([\d.]+) ", parsed.text.split("effective rank")[1]
        )
        assert int(line[2]) == of_domain["n_rows"]
        assert line[3] == f"{of_domain['n_tokens']:,}"
        assert float(line[4]) == pytest.approx(of_domain["loss"], rel=1e-3)


# --- other stores ---


def test_page_of_an_unfinished_store_lists_what_is_missing_and_uses_a_score_without_sums(
    job, tmp_path, capsys
):
    output = shutil.copytree(job.output, tmp_path / "out")
    uncommit(output, 1)
    code, said, _ = report(capsys, output)
    assert code == 0
    assert str(output / "report.html") in said
    text = StrictPage((output / "report.html").read_text()).text
    assert "Incomplete: 43 of 60 documents have a row; 16 are not computed yet." in text
    assert "by id: 16-31" in text
    assert "Influence by cosine : cosine of the two projected gradients" in text
    assert "missing 16" in text


def test_page_is_made_without_texts_when_the_tars_are_gone(job, tmp_path, capsys, monkeypatch):
    output = shutil.copytree(job.output, tmp_path / "out")
    moved = tmp_path / "moved"
    job.tars.rename(moved)
    try:
        code, _, _ = report(capsys, output, "--score", "dot")
        text = StrictPage((output / "report.html").read_text()).text
        found, _, _ = report(capsys, output, "--score", "dot", "--shards", moved, "--top_k", "60")
        with_texts = StrictPage((output / "report.html").read_text()).text
        refused, _, said = report(capsys, output, "--shards", tmp_path / "nowhere")
    finally:
        moved.rename(job.tars)
    assert (code, found, refused) == (0, 0, 2)
    assert "The documents' texts are not shown:" in text
    assert "Give --shards where the tars are now." in text
    assert "and then some" not in text
    assert "and then some" in with_texts
    assert "nowhere" in said


def test_changed_tar_only_costs_its_texts(job, tmp_path, capsys):
    tars = shutil.copytree(job.tars, tmp_path / "tars")
    data = bytearray((tars / "a.tar").read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    (tars / "a.tar").write_bytes(data)
    path = tmp_path / "page.html"
    code, _, _ = report(capsys, job.output, "--shards", tars, "--page", path, "--score", "dot")
    assert code == 0
    assert "Some texts are not shown:" in StrictPage(path.read_text()).text


def test_store_without_job_domains_and_rows_is_shown(tmp_path, capsys):
    empty = Output(tmp_path / "empty")
    update_attributes(empty.store_path, {"domains": []})
    code, _, said = report(capsys, empty.path, "--score", "dot")
    assert (code, said) == (0, "")
    text = StrictPage((empty.path / "report.html").read_text()).text
    for words in (
        "Incomplete: 0 of 70",
        "No document has a row yet.",
        "The corpus names no domains.",
        "the store is not an output of gradproj.run",
    ):
        assert words in text


def test_domain_code_that_the_store_does_not_name_is_damage(tmp_path, capsys):
    filled = Output(tmp_path / "filled").fill()
    update_attributes(filled.store_path, {"domains": []})
    code, _, said = report(capsys, filled.path, "--score", "dot")
    assert code == 2
    assert "is damaged: a document is of domain 1, and the store names 0" in said


@pytest.mark.parametrize(
    ("score", "of_domains"),
    [("relatif", "kfac"), ("cosine", "cosine"), ("preconditioned", "preconditioned")],
)
def test_each_score_is_named_where_it_is_shown(job, tmp_path, capsys, score, of_domains):
    path = tmp_path / "page.html"
    flags = [
        "--queries",
        job.queries,
        "--score",
        score,
        "--page",
        path,
        "--layers",
        "attn",
        "--top_k",
        3,
    ]
    code, _, _ = report(capsys, job.output, *flags)
    assert code == 0
    text = StrictPage(path.read_text()).text
    assert f"Score {score} :" in text
    assert f"Influence by {of_domains} :" in text
    assert ("Largest self-influence" in text) == (of_domains != "cosine")
    with ProjectionStore(job.output) as store:
        attn = [layer.name for layer in store.layers if "attn" in layer.name]
        rows = QueryProjector(store, recorded_config(job.output), "cpu").rows(
            read_queries(job.queries)
        )
        top, bottom = top_and_bottom(rows.rows, store, 3, 3, score=score, layers=attn)
    pairs = [i for pair in zip(top.ids[1], bottom.ids[1], strict=True) for i in pair]
    assert ids_in_order(StrictPage(path.read_text()), "Query 2: second") == pairs


# --- user errors ---


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top_k", "0"], "--top_k must be from 1 to 200, got 0"),
        (["--top_k", "201"], "--top_k must be from 1 to 200, got 201"),
        (["--queries", "nowhere.jsonl"], "the queries' file nowhere.jsonl cannot be read"),
        (["--score", "euclid"], "--score is 'euclid'; choose one of"),
        (["--layers", "h.9"], "has no layer 'h.9'; it has"),
        (["--page", "{folder}"], "is a folder; name a file, such as"),
        (["--page", "{file}/page.html"], "or a folder above it, is a file; give another path"),
        (["--query", "x"], "unknown flag '--query'; did you mean --queries?"),
    ],
)
def test_invalid_flags_are_rejected_in_one_line(job, tmp_path, capsys, flags, message):
    (tmp_path / "file").write_text("")
    flags = [flag.format(folder=tmp_path, file=tmp_path / "file") for flag in flags]
    code, _, said = report(capsys, job.output, *flags)
    assert code == 2
    assert message in said
    assert len(said.strip().splitlines()) == 1


def test_too_many_queries_and_a_query_that_is_too_long_are_rejected(job, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": "the of"}) + "\n" for i in range(201)))
    code, _, said = report(capsys, job.output, "--queries", path)
    assert code == 2
    assert "holds 201 queries, and a page shows at most 200" in said
    path.write_text(json.dumps({"text": "the of and " * 200}))
    code, _, said = report(capsys, job.output, "--queries", path)
    assert code == 2
    assert "q.jsonl, line 1" in said
    assert not (job.output / "report.html").exists()
