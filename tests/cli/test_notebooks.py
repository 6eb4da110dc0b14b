"""Objects in a notebook, and the example notebook."""

import ast
import json
from pathlib import Path

import pytest
from helpers.outputs import copy_of
from helpers.report_page import SCRIPT, StrictPage

import gradproj
from gradproj import ProjectionStore
from gradproj.analysis import domain_matrix, group_scores, top_k
from gradproj.cli.query import QueryConfig, query
from gradproj.distributed import Process
from gradproj.formatting import Html, html_table
from gradproj.report.number_format import exponent_of, minus, places_for, scaled

NOTEBOOK = Path(gradproj.__file__).parent / "examples" / "explore.ipynb"
PROCESS = Process(0, 1, 0, 1)


def shown(value):
    return StrictPage(value._repr_html_())


def test_cells_of_the_example_run_and_show_what_they_end_with(job, tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    copy_of(job.output, tmp_path / "demo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    names, pages = {}, []
    for cell in cells:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == []
        assert cell["execution_count"] is None
        tree = ast.parse("".join(cell["source"]))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, NOTEBOOK.name, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)
            pages += [shown(value)] if hasattr(value, "_repr_html_") else []
    store, answer, groups, domains = pages
    assert "70: 68 ok" in store.text
    assert len([a for tag, a in answer.tags if "title" in a]) > 20
    assert "standard error" in groups.text
    assert "effective rank" in domains.text
    assert len(names["picked"]) == 6  # a tenth of 68
    assert len(names["places"]) == 3


def test_notebook_is_small_and_has_no_paths_of_a_machine():
    text = NOTEBOOK.read_text()
    assert len(text) < 10_000
    assert "/home" not in text
    assert json.loads(text)["nbformat"] == 4


def test_texts_of_a_store_are_cleaned_and_escaped():
    table = html_table(["a", SCRIPT], [(SCRIPT, 3), ("x\u202ey", 0.25), (Html("<b>z</b>"), None)])
    page = StrictPage(table)
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text == f"a {SCRIPT} {SCRIPT} 3 x\ufffdy 0.25 z"


@pytest.mark.parametrize("flags", [{"tokens": True}, {"by": "domain"}, {"show_text": True}])
def test_answer_shows_the_numbers_of_its_lists(job, flags):
    text = f"the of and to {SCRIPT}"
    config = QueryConfig(
        output=str(job.output), text=text[:24], top_k=3, bottom_k=2, device="cpu", **flags
    )
    answer = query(config, PROCESS)
    page = shown(answer)
    assert "script" not in [tag for tag, _ in page.tags]
    if "by" in flags:
        scores = answer.grouped.scores
        for number in scores.order(0).tolist():
            assert f"{scores.names[number]} {scores.mean[0, number]:.4g}" in page.text
        return
    (ranking,) = answer.rankings
    for end in (ranking.top, ranking.bottom):
        for sample_id, value in zip(end.ids[0].tolist(), end.scores[0].tolist(), strict=True):
            assert f"{value:.4g} {sample_id}" in page.text
    if "tokens" in flags:
        largest = max(abs(x) for end in (ranking.top, ranking.bottom) for x in end.scores[0])
        scale = exponent_of([largest])
        for sample_id in ranking.top.ids[0].tolist():
            total = answer.tokens.found[0, sample_id].score
            places = places_for([largest], scale) + 1
            assert f"recomputed {minus(scaled(total, scale, places))}" in page.text


def test_tables_of_analysis_show_their_numbers(job):
    with ProjectionStore(job.output) as store:
        rows = store.rows([10, 17])
        top = top_k(rows, store, 4)
        page = shown(top)
        line = " ".join(f"{top.ids[q, 0]} {top.scores[q, 0]:.4g}" for q in (0, 1))
        assert line in page.text
        domains = domain_matrix(store)
        facts = f"{domains.names[0]} {domains.n_rows[0]} {domains.n_tokens[0]:,}"
        assert facts in shown(domains).text
        groups = group_scores(rows, store)
        best = int(groups.order(1)[0])
        assert f"{groups.names[best]} {groups.mean[1, best]:.4g}" in shown(groups).text
        facts = shown(store)
        assert "70: 68 ok" in facts.text
        assert all(layer.name in facts.text for layer in store.layers)
