"""User errors of the query command: one line with the way out, exit code 2, no traceback."""

import hashlib
import json
import shutil

import pytest
from helpers.corpora import words
from helpers.models import make_model
from helpers.outputs import N_SAMPLES, cut, shard_of, uncommit, unmerge
from helpers.query_command import TEXT, ask, write_queries
from helpers.training_runs import config_of, make_data

from gradproj import ProjectionStore
from gradproj.analysis.row_blocks import chosen_layers, scan_blocks
from gradproj.coordinator.merge import merge
from gradproj.errors import ConfigError, ModelError
from gradproj.formatting import human_bytes
from gradproj.job.recorded import config_from, recorded_config
from gradproj.job.recorded_args import RecordedRunArgs
from gradproj.query import QueryProjector, projector
from gradproj.store.metadata import read_attributes
from gradproj.store.writer import update_attributes, write_array
from gradproj.training import train

assert ask

ASKED = ("--text", TEXT)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), 'there is no query; give --text "...", --queries FILE.jsonl or --query_store DIR'),
        (("--text", ""), "there is no query; give --text"),
        (("--text", " \n"), "--text is empty; give --text"),
        ((*ASKED, "--queries", "q.jsonl"), "--text and --queries are given: give one of them"),
        (("--text", "a"), "--text: no target for a loss; give more text"),
        (
            ("--text", words(90, 1)),
            "tokens, and the store's rows cover the first 24 of a document; shorten it",
        ),
        ((*ASKED, "--score", "euclid"), "--score"),
        ((*ASKED, "--format", "xml"), "--format"),
        ((*ASKED, "--device", "tpu"), "--device"),
        ((*ASKED, "--top_k", "-1"), "--top_k must be at least 0, got -1"),
        ((*ASKED, "--head_sum", "equal"), "has no head rows"),
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
        ((*ASKED, "--curvature", "kfac"), "--curvature kfac requires --score relatif"),
        (
            (*ASKED, "--layers", "nothing"),
            "has no layer 'nothing'; it has model.layers.*.self_attn.q_proj",
        ),
        (
            (*ASKED, "--domains", "Github,Fiction"),
            "has no domain 'Fiction'; it has ArXiv, Github, Pile-CC",
        ),
        ((*ASKED, "--joint"), "--joint requires --score preconditioned"),
        ((*ASKED, "--layers", ""), "--layers is empty; give a list such as A,B, or leave it out"),
        ((*ASKED, "--layers", ","), "--layers is empty"),
        ((*ASKED, "--layers", " , "), "--layers is empty"),
        (
            (*ASKED, "--layers", "h.3", "mlp"),
            "unexpected argument 'mlp'; --layers takes one list with commas: --layers A,B",
        ),
        ((*ASKED, "--domains", ""), "--domains is empty; give a list such as A,B, or leave it out"),
        (
            ("--queries", "none.jsonl"),
            "the queries' file none.jsonl cannot be read: No such file or directory",
        ),
        (("--query_store", "nowhere"), "there is no store at nowhere: no such folder"),
        (("--txt", "a"), "did you mean --text"),
    ],
)
def test_invalid_flag_is_named(job, tmp_path, monkeypatch, ask, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in ask.mistake(job.output, *flags)
    assert not (job.output / "preconditioners").exists()


def test_fewer_documents_than_the_default_k_are_accepted(job, ask):
    few = ask.objects(job.output, *ASKED, "--domains", "ArXiv", "--top_k", N_SAMPLES)
    assert 0 < sum(x["end"] == "top" for x in few) < N_SAMPLES


def test_invalid_line_of_a_query_file_is_named(job, tmp_path, ask):
    path = write_queries(tmp_path / "q.jsonl", {"text": TEXT}, {"text": words(80, 2)}, {"txt": ""})
    assert f"{path}, line 3: no text: it has none of " in ask.mistake(job.output, "--queries", path)
    path = write_queries(path, {"text": TEXT}, {"text": words(80, 2)})
    assert f"{path}, line 2: " in ask.mistake(job.output, "--queries", path)
    path = write_queries(path, {"text": TEXT}, {"input_ids": [2, 300]})
    assert f"{path}, line 2: token id 300; the model has ids from 0" in ask.mistake(
        job.output, "--queries", path
    )


def test_other_model_or_tokenizer_is_rejected(job, tmp_path, ask):
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


def test_missing_model_directory_is_named_as_given(job, ask):
    message = ask.mistake(job.output, *ASKED, "--model", "nosuchdir")
    assert (
        f"--model nosuchdir is no directory here; give one that holds the job's model, {job.model}"
        in message
    )


@pytest.mark.parametrize("changes", [{"model": None}, {"model": "a"}, {"identity": 3}])
def test_store_without_a_recorded_model_is_rejected(output, ask, changes):
    update_attributes(output / "projections.zarr", changes)
    assert "does not record the model of its rows" in ask.mistake(output, *ASKED)


@pytest.mark.parametrize("name", ["trust_remote_code", "allow_pickle"])
def test_store_cannot_grant_trust_to_its_checkpoint(output, ask, name):
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


def test_incomparable_query_store_is_rejected_with_every_difference(job, output, tmp_path, ask):
    identity = read_attributes(output / "projections.zarr")["identity"]
    changes = {"--model (weights)": "f" * 32, "--loss_reduction": "sum"}
    update_attributes(output / "projections.zarr", {"identity": identity | changes})
    message = ask.mistake(job.output, "--query_store", output)
    assert "their rows are not comparable" in message
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


def test_query_store_with_other_matrices_is_rejected(job, output, ask):
    def short_hash():
        with ProjectionStore(output) as store:
            layers = [
                {name: x for name, x in vars(layer).items() if not name.startswith("stored_")}
                for layer in store.layers
            ]
            layers = json.dumps(layers).encode()
            matrices = store.array("projection_matrices").tobytes()
            if store.basis is not None:
                matrices += store.array("basis_matrices").tobytes()
        return hashlib.sha256(layers + matrices).hexdigest()[:8]

    before = short_hash()
    with ProjectionStore(output) as store:
        matrices = store.array("projection_matrices").copy()
        matrices[-1] = -matrices[-1]
        write_array(store.path, "projection_matrices", matrices)
    message = ask.mistake(job.output, "--query_store", output)
    assert message.splitlines()[1:-1] == [
        f"  layers, projection matrices or basis: queries {short_hash()}..., store {before}..."
    ]
    assert short_hash() != before
    identity = read_attributes(output / "projections.zarr")["identity"]
    update_attributes(output / "projections.zarr", {"identity": identity | {"--proj_seed": 7}})
    message = ask.mistake(job.output, "--query_store", output)
    assert message.splitlines()[1:-1] == ["  --proj_seed: queries 7, store 42"]


def test_control_characters_in_store_names_are_replaced(output, ask):
    path = output / "projections.zarr"
    attributes = read_attributes(path)
    domains = ["\x1b[2Jevil", *attributes["domains"][1:]]
    layers = [layer | {"name": f"\x1b]0;{layer['name']}\x07\n"} for layer in attributes["layers"]]
    update_attributes(path, {"domains": domains, "layers": layers})
    with ProjectionStore(output) as store:
        layer = store.layers[0].name
        for choose in (
            lambda: chosen_layers(store, ["none"]),
            lambda: chosen_layers(store, []),
            lambda: next(scan_blocks(store, domains=["none"])),
        ):
            with pytest.raises(ConfigError) as refused:
                choose()
            assert str(refused.value).isprintable()
    flags = ("--query_store", output, "--top_k", 2)
    for flag in ("--layers", "--domains"):
        message = ask.mistake(output, *flags, flag, "nothing")
        assert "�" in message
        assert message.removesuffix("\n").isprintable()
    lines, errors = ask(
        output, *flags, "--layers", layer, "--domains", domains[0], "--score", "cosine"
    )
    assert errors == ""
    assert all(line.isprintable() for line in lines)
    assert any("of �[2Jevil compared" in line for line in lines)
    assert any(line.startswith("layers   �]0;") for line in lines)


def test_too_many_queries_are_rejected_before_projection(job, output, tmp_path, ask, monkeypatch):
    path = write_queries(tmp_path / "q.jsonl", *({"text": TEXT} for _ in range(3)))
    with ProjectionStore(output) as store:
        monkeypatch.setattr(projector, "MAX_ROWS_BYTES", 4 * store.dim * 2)
        monkeypatch.setattr(ProjectionStore, "rows", None)
        monkeypatch.setattr("gradproj.cli.query.session.QueryProjector", None)
        size = (
            f"whose rows of {store.dim:,} values take {human_bytes(4 * store.dim * 3)} of memory; "
        )
    message = ask.mistake(output, "--queries", path)
    assert f"--queries {path} has 3 queries, {size}" in message
    assert "2 queries. Split the file into several" in message
    message = ask.mistake(output, "--query_store", job.output)
    assert f"has {N_SAMPLES - 2} queries, whose rows" in message
    assert "2 queries. Query some at a time in Python: gradproj.analysis.top_k(" in message


def test_joint_rejects_rows_that_are_too_wide(job, ask, monkeypatch):
    monkeypatch.setattr("gradproj.cli.query.config.MAX_JOINT_WIDTH", 10)
    flags = (*ASKED, "--score", "preconditioned", "--joint")
    with ProjectionStore(job.output) as store:
        width = store.dim
    message = ask.mistake(job.output, *flags)
    assert (
        f"has rows of {width:,} values, and one second moment covers at most 10: name fewer"
        in message
    )
    assert "--joint: these layers have " in ask.mistake(job.output, *flags, "--layers", "mlp")


def test_unfinished_store_answers_and_lists_missing_rows(output, ask, monkeypatch):
    monkeypatch.setattr("gradproj.cli.score_args.DEFAULT_SCORE", "kfac")
    uncommit(output, 0, 2)
    update_attributes(output / "projections.zarr", {"covariance_tokens": 0})
    lines, errors = ask(output, *ASKED, "--top_k", N_SAMPLES)
    text = " ".join(" ".join(lines).split())
    assert (
        "37 documents compared; without a row: 32 not computed yet, 1 with no target token" in text
    )
    assert "(ids 0 to 15, 32 to 47)" in text
    assert "score cosine: cosine of the two projected gradients" in text
    assert (
        "score cosine: kfac needs token covariances, which the store does not have yet: "
        "python -m gradproj merge" in errors
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
    lines, errors = ask(output, *ASKED)
    assert errors == ""
    assert any(line.startswith("score    kfac") for line in lines)


def test_store_without_rows_is_rejected(output, ask):
    unmerge(output)
    for record in (output / "units").glob("*"):
        record.unlink()
    assert (
        "has no row yet (70 of 70 documents are still to be computed); start the job again on it"
        in ask.mistake(output, *ASKED)
    )


def test_damaged_store_is_named_with_the_way_out(output, ask):
    cut(shard_of(output, 1))
    message = ask.mistake(output, *ASKED)
    assert "c.1.0" in message
    assert "verify" in message
    shutil.copy(shard_of(output, 2), shard_of(output, 1))
    cut(output / "projections.zarr" / "status" / "c.0")
    assert "status" in ask.mistake(output, *ASKED)
    (output / "projections.zarr" / "zarr.json").write_text("{torn")
    assert "is damaged or not a gradproj store" in ask.mistake(output, *ASKED)


def test_rows_of_a_missing_shard_are_counted_and_are_no_queries(job, output, ask):
    shard_of(output, 1).unlink()
    text = " ".join(" ".join(ask(output, *ASKED, "--score", "dot")[0]).split())
    assert (
        "53 documents compared; without a row: 1 empty, 1 with no target token; "
        "15 are recorded and their" in text
    )
    assert f"shard is gone: python -m gradproj verify {output}" in text
    message = ask.mistake(job.output, "--query_store", output)
    assert "rows of unit 1 are recorded as ok but their shard " in message


def test_directory_that_is_no_output_is_rejected(job, tmp_path, ask):
    assert "is not a gradproj store" in ask.mistake(tmp_path, *ASKED)
    shutil.copytree(job.output / "projections.zarr", tmp_path / "projections.zarr")
    assert "is not a job's --output_dir: it holds no run_config.json" in ask.mistake(
        tmp_path, *ASKED
    )
    (tmp_path / "run_config.json").write_text("{torn")
    assert "run_config.json cannot be read" in ask.mistake(tmp_path, *ASKED)


def test_training_store_accepts_rows_but_no_text(tmp_path, ask, monkeypatch):
    monkeypatch.setattr("gradproj.cli.score_args.DEFAULT_SCORE", "kfac")
    data = make_data(tmp_path)
    train(config_of(data, tmp_path / "trained", method="GradProjLora"))
    output = tmp_path / "trained" / "projections"
    assert "was not written by the job and records no model" in ask.mistake(output, *ASKED)
    lines, errors = ask(output, "--query_store", output, "--top_k", 2)
    assert "kfac needs token covariances, which the store does not have" in errors
    assert "merge" not in errors
    first = [line.split() for line in lines if line.startswith("    1 ")]
    assert first[0][1] == "+1.0000"


@pytest.mark.parametrize("score", ["text", "kfac+text"])
@pytest.mark.parametrize(
    ("fields", "has"),
    [
        ({"text": TEXT, "weight": -1}, "a negative weight"),
        ({"prompt": "the", "chosen": " of and", "rejected": " to in"}, "a rejected answer"),
    ],
)
def test_scores_of_likeness_refuse_queries_for_the_opposite(job, ask, tmp_path, score, fields, has):
    file = write_queries(tmp_path / "q.jsonl", fields)
    message = ask.mistake(job.output, "--queries", file, "--score", score)
    assert f"line 1: it has {has}, and --score {score} counts what is alike as wanted" in message
