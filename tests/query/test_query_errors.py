"""Laws of wrong questions: one line that says what is wrong, where, and the way out; exit code 2, no traceback."""

import json
import shutil

import pytest
from helpers.corpora import words
from helpers.models import make_model
from helpers.outputs import N_SAMPLES, cut, shard_of, uncommit, unmerge
from helpers.query_command import TEXT, ask, write_queries

from gradproj import ProjectionStore
from gradproj.analysis.row_blocks import chosen_layers, scan_blocks
from gradproj.coordinator.merge import merge
from gradproj.errors import ConfigError, ModelError
from gradproj.formatting import human_bytes
from gradproj.job.recorded import config_from, recorded_config
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import QueryProjector
from gradproj.query import projector as rows_module
from gradproj.store.metadata import read_attributes
from gradproj.store.writer import update_attributes, write_array

assert ask

ASKED = ("--text", TEXT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), 'there is no query; give --text "...", --queries FILE.jsonl or --query_store DIR'),
        (("--text", ""), "there is no query; give --text"),
        (("--text", " \n"), "--text is empty; give --text"),
        ((*ASKED, "--queries", "q.jsonl"), "--text and --queries are given: give one of them"),
        (("--text", "a"), "--text: a single token: no target to take a gradient of"),
        (
            ("--text", words(90, 1)),
            "tokens, and the store's rows cover the first 24 of a document; shorten it",
        ),
        ((*ASKED, "--score", "euclid"), "--score"),
        ((*ASKED, "--format", "xml"), "--format"),
        ((*ASKED, "--device", "tpu"), "--device"),
        ((*ASKED, "--top_k", "-1"), "--top_k must be at least 0, got -1"),
        ((*ASKED, "--top_k", "0", "--bottom_k", "0"), "nothing to answer"),
        ((*ASKED, "--top_k", N_SAMPLES + 1), "--top_k is 71, and "),
        ((*ASKED, "--bottom_k", 1000), "has 70 documents: give at most that many"),
        ((*ASKED, "--damping", "much"), "--damping is 'much'; give auto or a number, 0 or more"),
        ((*ASKED, "--damping", "-1"), "--damping is '-1'; give auto or a number, 0 or more"),
        ((*ASKED, "--damping", "0.1,x,1"), "--damping is '0.1,x,1'; give auto or a number"),
        ((*ASKED, "--damping", "nan"), "--damping is 'nan'; give auto or a number"),
        ((*ASKED, "--damping", "inf"), "--damping is 'inf'; give auto or a number"),
        (
            (*ASKED, "--damping", "1", "--score", "cosine"),
            "--score cosine has no damping; leave --damping out",
        ),
        (
            (*ASKED, "--damping", "1,2", "--save_scores", "s.npy"),
            "--save_scores takes one --damping",
        ),
        (
            (*ASKED, "--curvature", "kfac"),
            "--curvature kfac requires --score relatif",
        ),
        (
            (*ASKED, "--layers", "nothing"),
            "has no layer 'nothing'; it has model.layers.*.self_attn.q_proj",
        ),
        (
            (*ASKED, "--domains", "Github,Fiction"),
            "has no domain 'Fiction'; it has ArXiv, Github, Pile-CC",
        ),
        ((*ASKED, "--joint"), "--joint requires --score preconditioned"),
        (
            (*ASKED, "--layers", ""),
            "--layers is empty; give a list such as A,B, or leave it out",
        ),
        ((*ASKED, "--layers", ","), "--layers is empty"),
        ((*ASKED, "--layers", " , "), "--layers is empty"),
        (
            (*ASKED, "--layers", "h.3", "mlp"),
            "unexpected argument 'mlp'; --layers takes one list with commas: --layers A,B",
        ),
        (
            (*ASKED, "--domains", ""),
            "--domains is empty; give a list such as A,B, or leave it out",
        ),
        (
            ("--queries", "none.jsonl"),
            "the queries' file none.jsonl cannot be read: No such file or directory",
        ),
        (("--query_store", "nowhere"), "there is no store at nowhere: no such folder"),
        (("--txt", "a"), "did you mean --text"),
    ],
)
def test_a_wrong_flag_is_named(job, tmp_path, monkeypatch, ask, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in ask.mistake(job.output, *flags)
    assert not (job.output / "preconditioners").exists()


def test_fewer_documents_than_are_shown_by_default_are_no_mistake(job, ask):
    few = ask.objects(job.output, *ASKED, "--domains", "ArXiv", "--top_k", N_SAMPLES)
    assert 0 < sum(x["end"] == "top" for x in few) < N_SAMPLES


def test_a_bad_line_of_a_file_is_named(job, tmp_path, ask):
    path = write_queries(tmp_path / "q.jsonl", {"text": TEXT}, {"text": words(80, 2)}, {"txt": ""})
    assert f"{path}, line 3: nothing to ask about; give one of " in ask.mistake(
        job.output, "--queries", path
    )
    path = write_queries(path, {"text": TEXT}, {"text": words(80, 2)})
    assert f"{path}, line 2: " in ask.mistake(job.output, "--queries", path)
    path = write_queries(path, {"text": TEXT}, {"input_ids": [2, 300]})
    assert f"{path}, line 2: token id 300; the model knows those from 0" in ask.mistake(
        job.output, "--queries", path
    )


def test_another_model_or_tokenizer_than_the_store_s_is_refused(job, tmp_path, ask):
    make_model(tmp_path / "other", num_hidden_layers=1)
    message = ask.mistake(job.output, *ASKED, "--model", tmp_path / "other")
    assert "other is not what " in message
    assert "its --model (weights) and --model (config) changed since" in message
    shutil.copytree(job.model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))
    # Both ways, the tokenizer's place is what is named.
    for flag in ("--model", "--tokenizer"):
        message = ask.mistake(job.output, *ASKED, flag, tmp_path / "model")
        assert message.startswith(f"gradproj: {tmp_path / 'model'} is not what ")
        assert "its --tokenizer changed since" in message
        assert "give --tokenizer DIR" in message
    assert "holds no tokenizer that loads" in ask.mistake(
        job.output, *ASKED, "--tokenizer", tmp_path
    )


def test_a_place_without_a_model_is_named_as_it_was_given(job, ask):
    message = ask.mistake(job.output, *ASKED, "--model", "nosuchdir")
    assert (
        f"--model nosuchdir is no directory here; give one that holds the job's model, {job.model}"
        in message
    )


@pytest.mark.parametrize("changes", [{"model": None}, {"model": "a"}, {"identity": 3}])
def test_a_store_that_names_no_model_is_refused(output, ask, changes):
    update_attributes(output / "projections.zarr", changes)
    assert "does not record the model of its rows" in ask.mistake(output, *ASKED)


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle"])
def test_a_store_cannot_say_that_its_checkpoint_is_trusted(output, ask, name):
    path = output / "run_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), name: True}))
    assert f"give --{name} here too if you trust" in ask.mistake(output, *ASKED)
    with (
        ProjectionStore(output) as store,
        pytest.raises(ModelError, match=f"give --{name} here too"),
    ):
        QueryProjector(store)
    assert not getattr(recorded_config(output).model, name)
    trusting = config_from(RecordedRunArgs(output=str(output), **{name: True}))
    assert getattr(trusting.model, name)


def test_queries_of_another_kind_of_rows_are_refused_with_every_difference(
    job, output, tmp_path, ask
):
    identity = read_attributes(output / "projections.zarr")["identity"]
    changes = {"--model (weights)": "f" * 32, "--loss_reduction": "sum"}
    update_attributes(output / "projections.zarr", {"identity": identity | changes})
    message = ask.mistake(job.output, "--query_store", output)
    assert "their rows do not mean the same" in message
    assert "  --model (weights): queries ffffffff..., store " in message
    assert "  --loss_reduction: queries 'sum', store 'mean'" in message
    assert "--proj" not in message
    # Its own corpus, lengths and storage may differ; its matrices may not.
    harmless = {
        "--shards (corpus index)": "x",
        "--max_length": 9,
        "--proj_dtype": "float32",
        "--proj_rank_min": 3,
    }
    update_attributes(output / "projections.zarr", {"identity": identity | harmless})
    ask(job.output, "--query_store", output)


def test_queries_of_other_matrices_are_refused_whatever_was_recorded(job, output, ask):
    with ProjectionStore(output) as store:
        matrices = store.array("projection_matrices").copy()
        matrices[-1] = -matrices[-1]
        write_array(store.path, "projection_matrices", matrices)
    message = ask.mistake(job.output, "--query_store", output)
    (difference,) = message.splitlines()[1:-1]
    assert difference.startswith("  layers or projection matrices: queries ")
    identity = read_attributes(output / "projections.zarr")["identity"]
    update_attributes(output / "projections.zarr", {"identity": identity | {"--proj_seed": 7}})
    message = ask.mistake(job.output, "--query_store", output)
    assert message.splitlines()[1:-1] == ["  --proj_seed: queries 7, store 42"]


def test_names_that_a_store_brings_along_disturb_no_terminal(output, ask):
    path = output / "projections.zarr"
    attributes = read_attributes(path)
    domains = ["\x1b[2Jevil", *attributes["domains"][1:]]
    layers = [layer | {"name": f"\x1b]0;{layer['name']}\x07\n"} for layer in attributes["layers"]]
    update_attributes(path, {"domains": domains, "layers": layers})
    with ProjectionStore(output) as store:
        layer = store.layers[0].name
        for ask_for in (
            lambda: chosen_layers(store, ["none"]),
            lambda: chosen_layers(store, []),
            lambda: next(scan_blocks(store, domains=["none"])),
        ):
            with pytest.raises(ConfigError) as refused:
                ask_for()
            assert str(refused.value).isprintable()
    asked = ("--query_store", output, "--top_k", 2)
    for flag in ("--layers", "--domains"):
        message = ask.mistake(output, *asked, flag, "nothing")
        assert "�" in message
        assert message.removesuffix("\n").isprintable()
    lines, said = ask(
        output, *asked, "--layers", layer, "--domains", domains[0], "--score", "cosine"
    )
    assert said == ""
    assert all(line.isprintable() for line in lines)
    assert any("of �[2Jevil compared" in line for line in lines)
    assert any(line.startswith("layers   �]0;") for line in lines)


def test_queries_that_do_not_fit_the_memory_are_refused_before_any_row_is_made(
    job, output, tmp_path, ask, monkeypatch
):
    path = write_queries(tmp_path / "q.jsonl", *({"text": TEXT} for _ in range(3)))
    with ProjectionStore(output) as store:
        monkeypatch.setattr(rows_module, "MOST_ROWS_BYTES", 4 * store.dim * 2)
        monkeypatch.setattr(ProjectionStore, "rows", None)
        monkeypatch.setattr("gradproj.cli.query.QueryProjector", None)
        size = (
            f"whose rows of {store.dim:,} values take {human_bytes(4 * store.dim * 3)} of memory; "
        )
    message = ask.mistake(output, "--queries", path)
    assert f"--queries {path} asks 3 queries, {size}" in message
    assert "2 queries, is the most at once. Split the file into several" in message
    message = ask.mistake(output, "--query_store", job.output)
    assert f"asks {N_SAMPLES - 2} queries, whose rows" in message
    assert (
        "2 queries, is the most at once. Ask some at a time in Python: gradproj.analysis.top_k("
        in message
    )


def test_rows_too_wide_for_one_second_moment_are_refused(job, ask, monkeypatch):
    monkeypatch.setattr("gradproj.cli.query_config.MAX_JOINT_WIDTH", 10)
    flags = (*ASKED, "--score", "preconditioned", "--joint")
    with ProjectionStore(job.output) as store:
        width = store.dim
    message = ask.mistake(job.output, *flags)
    assert (
        f"has rows of {width:,} values, and one second moment covers at most 10: name fewer"
        in message
    )
    assert "--joint: these layers have " in ask.mistake(job.output, *flags, "--layers", "mlp")


def test_an_unfinished_store_answers_and_says_which_rows_are_missing(output, ask, monkeypatch):
    monkeypatch.setattr("gradproj.cli.score_args.DEFAULT_SCORE", "kfac")
    uncommit(output, 0, 2)
    update_attributes(output / "projections.zarr", {"covariance_tokens": 0})
    lines, said = ask(output, *ASKED, "--top_k", N_SAMPLES)
    text = " ".join(" ".join(lines).split())
    assert (
        "37 documents compared; without a row: 32 not computed yet, 1 with no target token" in text
    )
    assert "(ids 0 to 15, 32 to 47)" in text
    assert "score cosine: cosine of the two projected gradients" in text
    assert (
        "score cosine: kfac needs token covariances, which the store does not have yet: python -m gradproj merge"
        in said
    )
    ids = {int(line.split()[2]) for line in lines if line[:5].strip().isdigit()}
    assert ids
    assert not ids & {*range(16), *range(32, 48)}
    assert "needs" not in ask(output, *ASKED, "--score", "preconditioned")[1]
    message = ask.mistake(output, *ASKED, "--score", "kfac")
    assert "has no token covariances, which kfac is made of" in message
    assert "Run `python -m gradproj merge" in message
    assert "name one by --score" in ask.mistake(output, *ASKED, "--damping", "0.1")
    merge(output)
    lines, said = ask(output, *ASKED)
    assert said == ""
    assert any(line.startswith("score    kfac") for line in lines)


def test_a_store_without_any_row_cannot_be_asked(output, ask):
    unmerge(output)
    for record in (output / "units").glob("*"):
        record.unlink()
    assert (
        "has no row yet (70 of 70 documents are still to be computed); start the job again on it"
        in ask.mistake(output, *ASKED)
    )


def test_a_damaged_store_is_named_and_the_way_out(output, ask):
    cut(shard_of(output, 1))
    message = ask.mistake(output, *ASKED)
    assert "c.1.0" in message
    assert "verify" in message
    shutil.copy(shard_of(output, 2), shard_of(output, 1))
    cut(output / "projections.zarr" / "status" / "c.0")
    assert "status" in ask.mistake(output, *ASKED)
    (output / "projections.zarr" / "zarr.json").write_text("{torn")
    assert "is damaged or not a gradproj store" in ask.mistake(output, *ASKED)


def test_rows_whose_shard_is_gone_are_said_and_ask_nothing(job, output, ask):
    shard_of(output, 1).unlink()
    text = " ".join(" ".join(ask(output, *ASKED, "--score", "dot")[0]).split())
    assert (
        "53 documents compared; without a row: 1 empty, 1 with no target token; 15 are recorded and their"
        in text
    )
    assert f"shard is gone: python -m gradproj verify {output}" in text
    message = ask.mistake(job.output, "--query_store", output)
    assert "rows of unit 1 are recorded as ok but their shard " in message


def test_a_folder_that_is_no_output_is_refused(job, tmp_path, ask):
    assert "is not a gradproj store" in ask.mistake(tmp_path, *ASKED)
    shutil.copytree(job.output / "projections.zarr", tmp_path / "projections.zarr")
    assert "is not a job's --output_dir: it holds no run_config.json" in ask.mistake(
        tmp_path, *ASKED
    )
    (tmp_path / "run_config.json").write_text("{torn")
    assert "run_config.json cannot be read" in ask.mistake(tmp_path, *ASKED)


def test_a_training_run_s_store_takes_rows_and_no_text(tmp_path, ask, monkeypatch):
    monkeypatch.setattr("gradproj.cli.score_args.DEFAULT_SCORE", "kfac")
    from test_training_engines import by_hand, one_step

    model, optimizer, manager = by_hand(tmp_path)
    with manager:
        for step in (1, 2, 3):
            one_step(model, optimizer, manager, step)
    output = tmp_path / "projections"
    assert "was not written by the job and records no model" in ask.mistake(output, *ASKED)
    lines, said = ask(output, "--query_store", output, "--top_k", 2)
    assert "kfac needs token covariances, which the store does not have" in said
    assert "merge" not in said
    first = [line.split() for line in lines if line.startswith("    1 ")]
    assert first[0][1] == "+1.0000"
