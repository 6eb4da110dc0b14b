"""Laws of the plain query: the row is the job's, the scores are numpy's, and what is wrong is said."""

import json
import shutil

import numpy as np
import pytest
from jobs import make_corpus, make_model, mixed_documents, run_job, words

from gradproj import ProjectionStore
from gradproj.corpus.index import list_tars, load_index, save_index
from gradproj.demo_commands import query_command
from gradproj.errors import ConfigError, CorpusError, ModelError, StoreError
from gradproj.query import QueryConfig, QueryProjector, query, recorded_config, score_rows, top_documents
from gradproj.store.layout import STATUS

N_DOCUMENTS = 70
TEXT = words(12, 5)


def documents():
    made = mixed_documents(N_DOCUMENTS)
    made[5]["text"] = TEXT
    made[6]["text"] = ""
    made[7] = {"input_ids": [5, 6, 7, 8], "meta": {"pile_set_name": "ArXiv"}}
    made[8]["text"] = "control \x1b[31m and\n\n  spaces" + words(60, 3)
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished job: model, tars, output."""
    folder = tmp_path_factory.mktemp("query")
    make_corpus(folder / "tars", documents())
    make_model(folder / "model", "gpt2")
    run_job(**job_settings(folder, "out"))
    return folder


def job_settings(folder, output, **changes):
    settings = {"shards": folder / "tars", "model": folder / "model", "output_dir": folder / output}
    return settings | {"proj_rank_total": 16, "proj_rank_min": 4, "proj_dtype": "float32"} | changes


def ask(output, text=TEXT, **changes):
    return query(QueryConfig(**{"output": str(output), "text": text, "device": "cpu", **changes}))


def ok_ids(store):
    return np.flatnonzero(store.column("status") == STATUS["ok"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "special_tokens": "bos_eos",
            "loss_reduction": "sum",
            "include_embeddings": True,
            "proj_kind": "gaussian",
        },
        {"long_documents": "windows", "max_length": 10, "special_tokens": "bos"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())) or "defaults",
)
def test_a_query_s_row_is_the_store_s_row_of_the_same_text(made, tmp_path, changes):
    output = made / "out"
    if changes:
        output = tmp_path / "out"
        run_job(**job_settings(made, "unused", **changes) | {"output_dir": output})
    with ProjectionStore(output) as store:
        got = QueryProjector(store, recorded_config(output), "cpu").row(TEXT)
        (want,), (sample,) = store.rows([5]), store.samples([5])
    assert np.linalg.norm(got.row - want) < 1e-5 * np.linalg.norm(want)
    assert got.n_tokens == sample.n_tokens
    assert got.loss == pytest.approx(sample.loss, rel=1e-5)


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_scores_are_numpy_s_over_the_rows_and_the_best_come_first(made, score):
    result = ask(made / "out", score=score, top_k=N_DOCUMENTS)
    with ProjectionStore(made / "out") as store:
        ids = ok_ids(store)
        rows = store.rows(ids).astype(np.float64)
    row = result.query.row.astype(np.float64)
    want = rows @ row
    if score == "cosine":
        want /= np.linalg.norm(rows, axis=1) * np.linalg.norm(row)
    order = np.argsort(-want)
    assert [s.sample_id for s in result.samples] == ids[order].tolist()
    np.testing.assert_allclose(result.scores, want[order], rtol=1e-4, atol=1e-6 * np.abs(want).max())
    assert result.n_scored == len(ids) == N_DOCUMENTS - 1
    assert result.n_missing == 0


def test_a_document_s_own_text_finds_it_first_with_cosine_one(made):
    result = ask(made / "out", top_k=3)
    assert result.samples[0].sample_id == 5
    assert result.scores[0] == pytest.approx(1, abs=1e-5)
    assert len(result.samples) == len(result.scores) == 3


def test_a_positive_score_means_that_training_on_the_document_lowers_the_query_s_loss(made):
    """One plain gradient step on a document, over the layers that are projected."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    output = made / "full"
    # So many values that nothing is lost: the projections are orthonormal and square, the dot product exact.
    settings = {"proj_rank_total": 2**20, "proj_kind": "orthonormal", "proj_layers": "mlp", "max_samples": 12}
    run_job(**job_settings(made, "full", **settings))
    result = ask(output, text=words(9, 77), score="dot", top_k=12)
    texts = {i: d["text"] for i, d in enumerate(documents()[:12]) if "text" in d}
    rate = 1e-4
    for score, sample in zip(result.scores.tolist(), result.samples, strict=True):
        if sample.sample_id not in texts:
            continue
        model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float64).eval()

        def loss(text, model=model):
            ids = torch.tensor([tokenizer(text).input_ids[:64]])
            return model(input_ids=ids, labels=ids).loss

        before = loss(words(9, 77)).item()
        loss(texts[sample.sample_id]).backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".mlp." in name and name.endswith("weight"):
                    parameter -= rate * parameter.grad
        fall = (before - loss(words(9, 77)).item()) / rate
        assert fall == pytest.approx(score, rel=0.05, abs=0.02 * float(abs(result.scores).max()))


def test_a_scan_in_small_blocks_gives_the_same_best_documents(made, monkeypatch):
    row = ask(made / "out").query.row
    with ProjectionStore(made / "out") as store:
        want = top_documents(store, row, "dot", 9)
        scan = store.scan
        monkeypatch.setattr(store, "scan", lambda: scan(rows_per_block=7))
        got = top_documents(store, row, "dot", 9)
    assert got[0].tolist() == want[0].tolist()
    np.testing.assert_allclose(got[1], want[1], rtol=1e-5)
    assert got[2] == want[2]


def test_a_row_of_zeros_has_cosine_zero():
    scores = score_rows(np.zeros((1, 3), np.float32), np.ones(3, np.float32), "cosine")
    assert scores.tolist() == [0.0]


def test_an_unfinished_store_answers_and_says_how_many_rows_are_missing(made, tmp_path, capsys):
    output = tmp_path / "out"
    shutil.copytree(made / "out", output)
    unmerge(output)
    for unit in (0, 2):
        (output / "units" / f"{unit:08d}.safetensors").unlink()
    result = ask(output, top_k=N_DOCUMENTS)
    assert result.n_missing == 32
    assert not {s.sample_id for s in result.samples} & {*range(16), *range(32, 48)}
    query_command([str(output), "--text", TEXT, "--device", "cpu"])
    assert "32 more are not computed yet" in capsys.readouterr().out
    for record in (output / "units").glob("*"):
        record.unlink()
    with pytest.raises(StoreError, match=r"has no row yet \(70 of 70 documents are still to be computed"):
        ask(output)


def unmerge(output):
    """Take the merged columns away, as if the job had been stopped before its end."""
    for column in ("status", "loss", "row_scale"):
        for chunk in (output / "projections.zarr" / column).glob("c.*"):
            chunk.unlink()


def test_the_answer_names_score_unit_sign_and_documents(made, capsys):
    query_command([str(made / "out"), "--text", TEXT, "--top_k", "4", "--show_text", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("query ")
    assert "target tokens, loss" in lines[0]
    assert "69 documents compared" in lines[1]
    assert "cosine" in lines[2]
    assert "-1 to 1" in lines[2]
    assert "positive: training more on the document lowers the query's loss" in lines[3]
    assert lines[6].split()[:3] == ["1", "+1.0000", "5"]
    assert lines[7].strip() == TEXT
    query_command([str(made / "out"), "--text", TEXT, "--score", "dot", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "how many nats the query's loss" in printed
    assert "falls per unit of learning rate" in printed


def test_texts_cannot_disturb_a_terminal_and_token_ids_are_shown_as_such(made, capsys):
    query_command([str(made / "out"), "--text", TEXT, "--top_k", "70", "--show_text", "--device", "cpu"])
    printed = capsys.readouterr().out
    assert "\x1b" not in printed
    assert "control \N{REPLACEMENT CHARACTER}[31m and spaces" in printed
    assert "token ids [5, 6, 7, 8]" in printed
    assert max(map(len, printed.splitlines())) < 300


def test_model_and_tars_may_move_if_they_are_named(made, tmp_path, monkeypatch):
    for name in ("out", "model", "tars"):
        shutil.copytree(made / name, tmp_path / "old" / name)
    flags = json.loads((tmp_path / "old/out/run_config.json").read_text())
    flags |= {"model": "old/model", "shards": "old/tars"}
    (tmp_path / "old/out/run_config.json").write_text(json.dumps(flags))
    index = load_index(tmp_path / "old/out/corpus.json").relocated(list_tars(str(tmp_path / "old/tars")))
    save_index(index, tmp_path / "old/out/corpus.json", replace_existing=True)
    monkeypatch.chdir(tmp_path)
    assert ask("old/out", show_text=True).samples[0].text == TEXT
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(
        ModelError,
        match=r"--model old/model, as the job recorded it, is no directory here: .*give --model DIR",
    ):
        ask("new/out")
    assert ask("new/out", model="new/model").samples[0].sample_id == 5
    with pytest.raises(CorpusError, match="old/tars"):
        ask("new/out", model="new/model", show_text=True)
    assert ask("new/out", model="new/model", shards="new/tars", show_text=True).samples[0].text == TEXT


def test_another_model_or_tokenizer_than_the_store_s_is_refused(made, tmp_path):
    make_model(tmp_path / "other", "gpt2", n_layer=1)
    with pytest.raises(
        ModelError,
        match=r"other is not what .* was made with; its --model \(weights\) and --model \(config\)",
    ):
        ask(made / "out", model=str(tmp_path / "other"))
    shutil.copytree(made / "model", tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(ModelError, match="its --tokenizer changed since"):
        ask(made / "out", model=str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": " \n"}, "--text is empty"),
        ({"text": "a"}, "--text is a single token, which has no target"),
        (
            {"text": words(90, 1)},
            r"--text has \d+ tokens, and the rows cover the first 64 of a document: shorten it",
        ),
        ({"top_k": 0}, "--top_k must be at least 1, got 0"),
        ({"score": "euclid"}, "--score is 'euclid'; choose one of cosine, dot"),
        ({"device": "tpu"}, "--device is 'tpu'"),
    ],
)
def test_a_query_that_cannot_be_answered_is_refused_by_name(made, changes, message):
    with pytest.raises(ConfigError, match=message):
        ask(made / "out", **changes)


def test_a_folder_that_is_no_output_is_refused(made, tmp_path):
    with pytest.raises(StoreError, match=r"is not a job's --output_dir: it holds no run_config\.json"):
        ask(tmp_path)
    (tmp_path / "run_config.json").write_text("{torn")
    with pytest.raises(StoreError, match=r"run_config\.json cannot be read"):
        ask(tmp_path)
    shutil.copy(made / "out" / "run_config.json", tmp_path)
    with pytest.raises(StoreError, match="is not a gradproj store"):
        ask(tmp_path)
