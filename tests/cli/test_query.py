"""The query command prints the scores that ``gradproj.analysis`` gives for its queries."""

import io
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers.corpora import make_corpus, mixed_documents, words
from helpers.jobs import run_job
from helpers.outputs import EMPTY, N_SAMPLES, ONE_TOKEN
from helpers.query_command import TEXT, ask, ok_ids, write_queries

from gradproj import ProjectionStore
from gradproj.analysis import MEANINGS, SIGN, ranking, score, scores
from gradproj.cli.query import QueryConfig, query
from gradproj.corpus.index import build_index
from gradproj.corpus.index_file import load_index, save_index
from gradproj.corpus.tar.paths import list_tars
from gradproj.distributed import Process
from gradproj.job.recorded import config_from
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import QueryProjector, read_queries
from gradproj.store.texts import text_of

assert ask

QUERIES = (
    {"text": TEXT, "id": "first"},
    {"prompt": "the of", "completion": " and to in", "name": "second"},
    {"input_ids": [5, 6, 7, 8]},
)


def scores_of(output, queries, **options):
    """Return scores ``(Q, N)`` from the Python interface."""
    run = config_from(RecordedRunArgs(output=str(output)))
    with ProjectionStore(output) as store:
        return score(QueryProjector(store, run, "cpu").rows(queries).rows, store, **options)


@pytest.mark.parametrize("kind", MEANINGS)
def test_rankings_equal_sorting_the_scores_of_the_python_interface(output, tmp_path, ask, kind):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    answers = ask.objects(output, "--queries", path, "--score", kind, "--top_k", 5, "--bottom_k", 4)
    assert [x["query"] for x in answers] == ["first"] * 9 + ["second"] * 9 + ["line 3"] * 9
    assert [(x["end"], x["rank"]) for x in answers[:9]] == (
        [("top", rank) for rank in range(1, 6)] + [("bottom", rank) for rank in range(1, 5)]
    )
    wanted = scores_of(output, read_queries(path), score=kind)
    for number, values in enumerate(wanted):
        ids = np.flatnonzero(~np.isnan(values))
        order = ids[np.argsort(-values[ids], kind="stable")]
        got = answers[9 * number : 9 * number + 9]
        assert [x["id"] for x in got] == [*order[:5], *order[: -4 - 1 : -1]]
        np.testing.assert_allclose(
            [x["score"] for x in got], values[[x["id"] for x in got]], rtol=1e-4
        )


def test_answer_holds_the_columns_of_each_document(job, ask):
    answers = ask.objects(
        job.output, "--text", TEXT, "--top_k", N_SAMPLES, "--bottom_k", 0, "--show_text"
    )
    assert len(answers) == N_SAMPLES - 2
    assert not {EMPTY, ONE_TOKEN} & {x["id"] for x in answers}
    documents = mixed_documents(N_SAMPLES)
    with ProjectionStore(job.output) as store:
        for x, sample in zip(answers, store.samples([x["id"] for x in answers]), strict=True):
            assert (x["key"], x["domain"], x["n_tokens"]) == (
                sample.key,
                sample.domain,
                sample.n_tokens,
            )
            assert x["loss"] == pytest.approx(sample.loss)
            assert x["text"] == documents[x["id"]]["text"][:1000]
    assert {x["damping"] for x in answers} == {"auto"}


def test_pandas_reads_the_json_lines(job, ask, tmp_path):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    lines, errors = ask(
        job.output, "--queries", path, "--format", "jsonl", "--top_k", 2, "--score", "cosine"
    )
    table = pd.read_json(io.StringIO("\n".join(lines)), lines=True)
    assert len(table) == 3 * (2 + 20)
    assert table.groupby("query")["score"].max().between(-1, 1).all()
    assert SIGN in " ".join(errors.split())


def test_table_describes_score_sign_unit_damping_and_rows(job, ask, monkeypatch):
    monkeypatch.setattr("gradproj.cli.score_args.DEFAULT_SCORE", "kfac")
    lines, errors = ask(job.output, "--text", TEXT, "--top_k", 3, "--bottom_k", 2, "--show_text")
    text = " ".join(" ".join(lines).split())
    assert f"score kfac: {MEANINGS['kfac']} {SIGN}" in text
    assert "damping 0.03 times each matrix's mean diagonal (auto)" in text
    assert "rows 68 documents compared; without a row: 1 empty, 1 with no target token" in text
    assert "query text: 9 target tokens, loss " in text
    assert lines.index("         " + TEXT) < next(
        i for i, line in enumerate(lines) if line.startswith("top ")
    )
    top, bottom = (
        next(i for i, line in enumerate(lines) if line.startswith(end))
        for end in ("top ", "bottom ")
    )
    assert [line.split()[0] for line in lines[top + 1 : bottom : 2]] == ["1", "2", "3"]
    assert len(lines) == bottom + 1 + 2 * 2
    assert errors == ""


def test_text_of_a_document_ranks_it_first_with_cosine_one(job, ask):
    texts = [d["text"] for d in mixed_documents(N_SAMPLES)]
    sample_id = next(i for i, text in enumerate(texts) if 5 < len(text.split()) < 9)
    answers = ask.objects(job.output, "--text", texts[sample_id], "--score", "cosine", "--top_k", 1)
    assert answers[0]["id"] == sample_id
    assert answers[0]["score"] == pytest.approx(1, abs=1e-5)
    assert answers[0]["query_loss"] == pytest.approx(answers[0]["loss"], rel=1e-5)


def test_layers_and_domains_restrict_the_scan(job, tmp_path, ask):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    with ProjectionStore(job.output) as store:
        chosen = [
            layer.name for layer in store.layers if ".0." in layer.name or "mlp" in layer.name
        ]
        others = [layer.name for layer in store.layers if layer.name not in chosen]
        domain = store.column("domain")
    assert others
    wanted = scores_of(
        job.output, read_queries(path), layers=chosen
    )  # by the default score, as the command
    wanted[:, ~np.isin(domain, [store.domains.index(name) for name in ("Github", "ArXiv")])] = (
        np.nan
    )
    words = ("--layers", "layers.0,mlp", "--domains", "Github,ArXiv", "--top_k", 6, "--bottom_k", 0)
    answers = ask.objects(job.output, "--queries", path, *words)
    assert {x["domain"] for x in answers} == {"Github", "ArXiv"}
    for number, values in enumerate(wanted):
        got = answers[6 * number : 6 * number + 6]
        assert [x["id"] for x in got] == np.argsort(-np.nan_to_num(values, nan=-np.inf))[
            :6
        ].tolist()
    lines, _ = ask(job.output, "--queries", path, *words)
    assert any("documents of Github, ArXiv compared" in line for line in lines)
    assert any(line.startswith("layers   model.layers.0.self_attn") for line in lines)


def test_layers_match_whole_components(job, ask):
    message = ask.mistake(job.output, "--text", TEXT, "--layers", "layers.1,ayers.0")
    assert "--layers: " in message
    assert "has no layer 'ayers.0'; it has model.layers.*.self_attn.q_proj" in message


@pytest.mark.parametrize("kind", ["kfac", "preconditioned", "relatif"])
def test_several_dampings_are_ranked_and_compared(output, ask, monkeypatch, kind):
    flags = (output, "--text", TEXT, "--score", kind, "--layers", "mlp", "--top_k", 5)
    one = {c: ask.objects(*flags, "--damping", c) for c in ("0.001", "30")}
    scans = []
    scan = scores.score_blocks
    monkeypatch.setattr(scores, "score_blocks", lambda *a: scans.append(1) or scan(*a))
    both = ask.objects(*flags, "--damping", "0.001,30")
    assert len(scans) == (2 if kind == "relatif" else 1)
    for x, y in zip(both, one["0.001"] + one["30"], strict=True):
        assert x.pop("score") == pytest.approx(y["score"], rel=1e-3)
        assert x == {key: value for key, value in y.items() if key != "score"}
    tops = [{x["id"] for x in answers if x["end"] == "top"} for answers in one.values()]
    share = len(tops[0] & tops[1]) / 5
    lines, _ = ask(*flags, "--damping", "0.001,30")
    assert "share of the top 5 in common, by damping, mean over the queries" in lines
    assert lines[-2].split() == ["0.001", "1.00", f"{share:.2f}"]
    if kind == "kfac":
        assert share < 1


@pytest.mark.parametrize("layers", [None, "mlp"])
def test_joint_inverts_one_second_moment_of_all_layers(output, tmp_path, ask, layers):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    flags = ("--queries", path, "--score", "preconditioned", "--joint", "--bottom_k", 0)
    flags += ("--layers", layers) if layers else ()
    with ProjectionStore(output) as store:
        ids = ok_ids(store)
        flags += ("--reduction", store.attributes["identity"]["--loss_reduction"])
        chosen = np.concatenate(
            [
                np.arange(x.slice_start, x.slice_end)
                for x in store.layers
                if layers is None or layers in x.name
            ]
        )
        rows = store.rows(ids)[:, chosen].astype(np.float64)
        projector = QueryProjector(store, device="cpu")
        query_rows = projector.rows(read_queries(path)).rows[:, chosen].astype(np.float64)
    moment = rows.T @ rows / len(rows)
    flags += ("--top_k", N_SAMPLES)
    answers = ask.objects(output, *flags, "--damping", "0.1,3")
    for damping in (0.1, 3):
        damped = moment + damping * np.trace(moment) / len(moment) * np.eye(len(moment))
        wanted = np.linalg.solve(damped, query_rows.T).T @ rows.T
        for number, values in enumerate(wanted):
            name = ["first", "second", "line 3"][number]
            got = {
                x["id"]: x["score"]
                for x in answers
                if (x["query"], x["damping"]) == (name, damping)
            }
            np.testing.assert_allclose(
                [got[i] for i in ids], values, rtol=1e-3, atol=1e-4 * abs(values).max()
            )
    each = ask.objects(output, *(flag for flag in flags if flag != "--joint"), "--damping", "0.1")
    assert [x["id"] for x in each] != [x["id"] for x in answers[: len(each)]]
    text = " ".join(" ".join(ask(output, *flags)[0]).split())
    assert "score preconditioned, all layers jointly: influence" in text


def test_many_queries_with_several_dampings_take_several_scans(output, tmp_path, ask, monkeypatch):
    path = write_queries(tmp_path / "q.jsonl", *QUERIES)
    flags = (
        output,
        "--queries",
        path,
        "--score",
        "kfac",
        "--layers",
        "mlp",
        "--damping",
        "0.001,30",
    )
    want = ask.objects(*flags, "--top_k", 4, "--bottom_k", 3)
    assert [x["damping"] for x in want] == [0.001] * 21 + [30] * 21
    sizes, scan = [], scores.score_blocks
    monkeypatch.setattr(
        scores,
        "score_blocks",
        lambda scanned, queries: sizes.append(len(queries.weights)) or scan(scanned, queries),
    )
    with ProjectionStore(output) as store:
        monkeypatch.setattr(ranking, "_QUERY_BYTES_PER_SCAN", 5 * 8 * store.dim)
    got = ask.objects(*flags, "--top_k", 4, "--bottom_k", 3)
    assert sizes == [4, 2]  # of two queries and one, by two dampings each
    for x, y in zip(got, want, strict=True):
        assert x.pop("score") == pytest.approx(y.pop("score"), rel=1e-5)
        assert x == y


def test_documents_of_a_query_store_are_named_by_their_keys(job, tmp_path, ask):
    other = tmp_path / "queries"
    make_corpus(tmp_path / "tars", mixed_documents(9, seed=4))
    settings = {"proj_rank_total": 16, "proj_rank_min": 2, "max_length": 24, "batch_size": 2}
    run_job(shards=tmp_path / "tars", model=job.model, output_dir=other, **settings)
    answers = ask.objects(job.output, "--query_store", other, "--top_k", 3, "--bottom_k", 0)
    with ProjectionStore(other) as queries, ProjectionStore(job.output) as store:
        wanted = score(queries.rows(range(9)), store)
        samples = queries.samples(range(9))
    for number, sample in enumerate(samples):
        got = answers[3 * number : 3 * number + 3]
        assert {x["query"] for x in got} == {sample.key}
        assert [x["id"] for x in got] == np.argsort(-np.nan_to_num(wanted[number], nan=-np.inf))[
            :3
        ].tolist()
        assert got[0]["query_loss"] == pytest.approx(sample.loss)
    # No model is needed where the rows are there.
    flags = json.loads((other / "run_config.json").read_text())
    moved = shutil.copytree(job.output, tmp_path / "moved")
    (moved / "run_config.json").write_text(json.dumps(flags | {"model": "nowhere"}))
    assert ask.objects(moved, "--query_store", other, "--top_k", 3, "--bottom_k", 0) == answers


def test_positive_score_means_training_on_the_document_lowers_the_loss(job, tmp_path):
    """Take one plain gradient step on a document, over the projected layers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    output = tmp_path / "full"
    # Orthonormal square projections lose nothing, so that the inner product is exact.
    settings = {
        "proj_rank_total": 2**20,
        "proj_kind": "orthonormal",
        "proj_layers": "mlp",
        "max_samples": 12,
        "loss_reduction": "mean",
    }
    run_job(shards=job.corpus, model=job.model, output_dir=output, proj_dtype="float32", **settings)
    asked = {"text": words(9, 77), "score": "dot", "reduction": "mean"}
    config = QueryConfig(output=str(output), top_k=12, device="cpu", **asked)
    top = query(config, Process(0, 1, 0, 1)).rankings[0].top
    texts = [d["text"] for d in mixed_documents(12)]
    rate = 1e-4
    assert len(top.ids[0]) == 11
    for value, sample_id in zip(top.scores[0].tolist(), top.ids[0].tolist(), strict=True):
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float64).eval()

        def loss(text, model=model):
            ids = torch.tensor([tokenizer(text).input_ids[:64]])
            logits = model(input_ids=ids).logits[
                0
            ]  # in float64: transformers' own loss is made in float32
            return torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:])

        before = loss(words(9, 77)).item()
        loss(texts[sample_id]).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mlp." in name and name.endswith("weight"):
                    parameter -= rate * parameter.grad
        fall = (before - loss(words(9, 77)).item()) / rate
        assert fall == pytest.approx(value, rel=0.01, abs=0.005 * float(abs(top.scores).max()))


def test_control_characters_are_replaced_in_the_table(job, tmp_path, ask, monkeypatch):
    hostile = "control \x1b[31m and\n\n  spaces" + words(60, 3)
    monkeypatch.setattr("gradproj.cli.query.session.text_of", lambda index, sample_id: hostile)
    path = write_queries(tmp_path / "q.jsonl", {"text": "the of \x1b[0m", "id": "a\x1b[2Jb"})
    lines, _ = ask(job.output, "--queries", path, "--show_text", "--top_k", 6)
    assert "\x1b" not in "\n".join(lines)
    assert "      control \N{REPLACEMENT CHARACTER}[31m and spaces" in "\n".join(lines)
    assert max(map(len, lines)) <= 118
    # Programs get the text as it is, in JSON's own letters.
    lines, _ = ask(job.output, "--queries", path, "--show_text", "--format", "jsonl")
    assert "\x1b" not in "\n".join(lines)
    assert json.loads(lines[0])["text"] == hostile[:1000]


def test_document_of_token_ids_shows_its_ids(tmp_path):
    make_corpus(tmp_path, [{"text": "a"}, {"input_ids": [5, 6, 7, 8]}])
    assert (
        text_of(build_index(list_tars(str(tmp_path)), progress=False), 1)
        == "token ids [5, 6, 7, 8]"
    )


def test_moved_model_and_tars_are_found_by_flags(job, tmp_path, monkeypatch, ask):
    for name, folder in (("out", job.output), ("model", job.model), ("tars", job.corpus)):
        shutil.copytree(folder, tmp_path / "old" / name)
    flags = json.loads((tmp_path / "old/out/run_config.json").read_text())
    flags |= {"model": "old/model", "shards": "old/tars"}
    (tmp_path / "old/out/run_config.json").write_text(json.dumps(flags))
    index = load_index(tmp_path / "old/out/corpus.json").relocated(
        list_tars(str(tmp_path / "old/tars"))
    )
    save_index(index, tmp_path / "old/out/corpus.json", replace_existing=True)
    monkeypatch.chdir(tmp_path)
    want = ask.objects("old/out", "--text", TEXT, "--show_text")
    (tmp_path / "old").rename(tmp_path / "new")
    message = ask.mistake("new/out", "--text", TEXT)
    assert "--model old/model, as the job recorded it, is no directory here: " in message
    assert "give --model DIR" in message
    moved = ("--text", TEXT, "--model", "new/model")
    assert "old/tars" in ask.mistake("new/out", *moved, "--show_text")
    assert ask.objects("new/out", *moved, "--shards", "new/tars", "--show_text") == want
    with ProjectionStore("new/out") as store:
        assert {x["id"] for x in want} <= set(ok_ids(store).tolist())
