"""Command lines: output, messages and exit codes."""

import importlib
import json
import os
import re
from types import SimpleNamespace

import pytest
import zarr
from helpers.corpora import input_record, make_corpus, mixed_documents, read_back, write_jsonl
from helpers.jobs import assert_same_bits, flags
from helpers.outputs import (
    N_SAMPLES,
    SETTINGS,
    flip_byte,
    owner_of,
    sleeping_process,
    tree_of,
    uncommit,
    unmerge,
    write_claim,
)

from gradproj.__main__ import COMMANDS, WITHOUT_STORE, main
from gradproj.corpus.index_file import load_index
from gradproj.maintenance.job_output import read_output
from gradproj.store.unit_record import record_name


@pytest.fixture
def run(capsys):
    """Run a command line; gives (exit code, standard output, standard error)."""

    def command(*arguments):
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return command


@pytest.fixture
def refused(run):
    """Run a command line that must be refused; gives the one line that says why."""

    def refuse(*arguments):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("gradproj: ")
        assert err.count("\n") == 1
        return err.removeprefix("gradproj: ").strip()

    return refuse


# --- all commands ---


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_that_use_a_store_have_few_zarr_threads(name, run, monkeypatch):
    def command(_):
        print(zarr.config.get("threading.max_workers"))

    module = SimpleNamespace(**{f"{name}_command": command})
    monkeypatch.setattr(importlib, "import_module", lambda _: module)
    before = zarr.config.get("threading.max_workers")
    expected = before if name in WITHOUT_STORE else 2
    assert run(name) == (0, f"{expected}\n", "")
    assert zarr.config.get("threading.max_workers") == before


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_function(name):
    assert callable(getattr(importlib.import_module(f"gradproj.cli.{name}"), f"{name}_command"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("index t --output x.json", "--output is now called --index_file"),
        ("report out --output x.html", "--output is now called --page"),
        ("status out --watch 3", "--watch is now called --watch_s"),
        ("train --precision bfloat16", "--precision is now called --model_dtype"),
        ("lds --precision bfloat16", "--precision is now called --model_dtype"),
        ("lds --documents 3", "--documents is now called --n_documents"),
        ("lds --queries 3", "--queries is now called --n_queries"),
        ("lds --windows 3", "--windows is now called --windows_per_document"),
        ("lds --duplicates 3", "--duplicates is now called --n_near_copies"),
        ("lds --changed 0.1", "--changed is now called --corruption"),
        ("lds --jobs 3", "--jobs is now called --workers"),
    ],
)
def test_old_name_of_a_flag_is_an_error_that_names_the_new_one(line, message, refused):
    assert refused(*line.split()) == message


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_the_flags_of_every_command(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: gradproj {name} ")
    assert "--config" in text
    assert not re.search(r"\bSTR\b", text), "a flag has no metavar"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["prepare"], "the following arguments are required: INPUT"),
        (["prepare", "x.jsonl"], "--output_dir must be given"),
        (
            ["prepare", "x.jsonl", "--output_dir", "o", "--samples_per_shard", "0"],
            "--samples_per_shard must be",
        ),
        (["prepare", "x.jsonl", "--output_dir", "o", "--text_field", ""], "--text_field is empty"),
        (
            ["prepare", "x.jsonl", "--output_dir", "o", "--on_bad_input", "no"],
            "--on_bad_input is 'no'",
        ),
        (["prepare", "/nowhere/x.jsonl", "--output_dir", "o"], "/nowhere/x.jsonl"),
        (["prepare", "x.docx", "--output_dir", "o"], "x.docx"),
        (["index"], "the following arguments are required: SHARDS"),
        (["index", ""], "SHARDS is empty"),
        (["index", "a.tar", "b.tar"], "SHARDS: 2 were given; quote the pattern"),
        (["index", "/nowhere/*.tar"], "nothing matches"),
        (["index", "a.tar", "--processes", "-1"], "--processes must be at least 0"),
        (["index", "a.tar", "--processes", "two"], "--processes"),
        (["index", "a.tar", "--domain_field", ""], "--domain_field is empty"),
        (["index", "a.tar", "--replce"], "unknown flag '--replce'; did you mean --replace?"),
        (["plan", "--shards", "x"], "--output_dir must be given"),
        (["status"], "the following arguments are required: OUTPUT"),
        (["status", "/nowhere"], "there is no store at /nowhere"),
        (["verify", "/nowhere"], "there is no store at /nowhere"),
        (["merge", "/nowhere"], "there is no store at /nowhere"),
        (["export", "/nowhere"], "--to must be given"),
        (["export", "/nowhere", "--to", "x"], "there is no store at /nowhere"),
        (["export", "/nowhere", "--to", "x", "--format", "npz"], "--format is 'npz'; choose pt"),
        (
            ["export", "/nowhere", "--to", "x", "--rows_per_file", "0"],
            "--rows_per_file must be at least 1",
        ),
        (["export", "/nowhere", "--to", "x", "--ids", "7"], "--ids is '7'; give START:STOP"),
    ],
)
def test_wrong_command_line_is_one_line_that_names_the_error(line, message, refused):
    assert message in refused(*line)


# --- prepare and index ---


def test_prepare_reads_inputs_in_order_and_prints_a_summary(run, tmp_path):
    first = write_jsonl(
        tmp_path / "a.jsonl", [input_record("one", "web"), input_record("two", "code")]
    )
    second = write_jsonl(tmp_path / "b.jsonl", [input_record("three", "web")])
    code, out, _ = run(
        "prepare", first, second, "--output_dir", tmp_path / "tars", "--samples_per_shard", 2
    )
    assert code == 0
    assert "3 documents of 2 domains in 2 tars" in out
    assert re.search(r"2  web\n +1  code\nin \d+\.\d s, to ", out)
    assert [document["text"] for _, document in read_back(tmp_path / "tars")] == [
        "one",
        "two",
        "three",
    ]


def test_prepare_groups_documents_by_domain_with_the_flag(run, tmp_path):
    lines = [input_record(str(i), "web" if i % 2 else "code") for i in range(6)]
    source = write_jsonl(tmp_path / "a.jsonl", lines)
    assert run("prepare", source, "--output_dir", tmp_path / "tars", "--group_by_domain")[0] == 0
    domains = [document["meta"]["pile_set_name"] for _, document in read_back(tmp_path / "tars")]
    assert domains == ["code"] * 3 + ["web"] * 3


@pytest.fixture
def corpus(tmp_path):
    return make_corpus(tmp_path / "tars", mixed_documents(50), per_tar=20)


def test_index_prints_counts_and_fingerprint(run, corpus):
    code, out, _ = run("index", corpus)
    index = load_index(corpus / "corpus.json")
    assert code == 0
    assert f"{corpus / 'corpus.json'} written" in out
    assert re.search(r"tars +3, \d", out)
    assert re.search(r"documents +50 in \d", out)
    assert re.search(
        r"domains +3 by meta.pile_set_name\n +17  ArXiv\n +17  Github\n +16  Pile-CC\n", out
    )
    assert index.fingerprint in out


def test_second_index_run_keeps_the_file_and_reports_it_up_to_date(run, corpus):
    run("index", corpus)
    before = tree_of(corpus)
    code, out, _ = run("index", f"{corpus}/*.tar")
    assert code == 0
    assert "is up to date: no tar has changed since" in out
    assert tree_of(corpus) == before


def test_index_of_a_touched_corpus_is_renewed(run, corpus):
    run("index", corpus)
    before = load_index(corpus / "corpus.json")
    os.utime(corpus / "shard-000001.tar", (1, 1))
    code, out, _ = run("index", corpus)
    assert code == 0
    assert "renewed: same corpus, touched or moved" in out
    after = load_index(corpus / "corpus.json")
    assert after.fingerprint == before.fingerprint
    assert after.tars[1].mtime_ns == 10**9


def test_index_of_a_changed_corpus_requires_replace(run, refused, corpus):
    run("index", corpus)
    before = load_index(corpus / "corpus.json")
    assert "is the index of another corpus" in refused(
        "index", corpus, "--domain_field", "meta.other"
    )
    (corpus / "shard-000002.tar").unlink()
    message = refused("index", corpus)
    assert (
        f"{corpus / 'corpus.json'} is the index of another corpus: 3 tars, 50 documents" in message
    )
    assert "Give --replace" in message
    assert load_index(corpus / "corpus.json") == before
    assert run("index", corpus, "--replace")[0] == 0
    assert load_index(corpus / "corpus.json").n_samples == 40


def test_damaged_index_is_named_with_the_flag_that_replaces_it(run, refused, corpus):
    run("index", corpus)
    path = corpus / "corpus.json"
    path.write_bytes(path.read_bytes()[:-9])
    assert "--replace (or name another file with --index_file)" in refused("index", corpus)
    assert run("index", corpus, "--replace")[0] == 0
    assert load_index(path).n_samples == 50


def test_index_of_tars_in_several_folders_requires_index_file(run, refused, corpus, tmp_path):
    other = make_corpus(tmp_path / "more", mixed_documents(5, seed=1))
    (tmp_path / "all.list").write_text(f"{corpus}/shard-000000.tar\n{other}/shard-000000.tar\n")
    assert "--index_file must be given" in refused("index", tmp_path / "all.list")
    index_file = tmp_path / "all.json"
    line = ("index", tmp_path / "all.list", "--index_file", index_file, "--processes", 1)
    assert run(*line)[0] == 0
    assert load_index(index_file).n_samples == 25


def test_index_of_a_damaged_tar_names_it(refused, corpus):
    path = corpus / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:1000])
    assert "shard-000001.tar" in refused("index", corpus)
    assert not (corpus / "corpus.json").exists()


# --- plan ---


def job_flags(job, output_dir, **changes):
    return flags(
        shards=job.corpus, model=job.model, output_dir=output_dir, **{**SETTINGS, **changes}
    )


def test_plan_prints_estimates_and_writes_nothing(run, job, tmp_path):
    code, out, err = run("plan", *job_flags(job, tmp_path / "new", device="cpu"))
    assert (code, err) == (0, "")
    assert re.search(r"documents +70 in 2 tars", out)
    assert re.search(r"units +5 of 16 rows\n", out)
    assert re.search(r"device +cpu", out)
    assert not (tmp_path / "new").exists()


def test_plan_of_an_unfinished_output_counts_finished_units_and_writes_nothing(run, job, output):
    uncommit(output, 1, 2)
    before = tree_of(output)
    code, out, _ = run("plan", *job_flags(job, output))
    assert code == 0
    assert re.search(r"units +5 of 16 rows, 3 of them done", out)
    assert tree_of(output) == before


def test_plan_refuses_settings_that_the_job_refuses(refused, job, output, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "--device cuda: torch sees no GPU" in refused(
        "plan", *job_flags(job, output, device="cuda")
    )
    assert "--proj_kind" in refused("plan", *job_flags(job, output, proj_kind="none"))
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'file'} is a file" in refused(
        "plan", *job_flags(job, tmp_path / "file" / "out")
    )


def test_plan_lists_settings_that_differ_from_the_output(run, job, output):
    code, out, err = run("plan", *job_flags(job, output, proj_seed=7))
    assert (code, out) == (2, "")
    assert "--proj_seed: store 42, this run 7" in err


def test_plan_refuses_a_folder_that_cannot_be_written(refused, job, tmp_path, monkeypatch):
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path and access(path, mode))
    message = refused("plan", *job_flags(job, tmp_path / "new" / "out"))
    assert f"--output_dir {tmp_path / 'new' / 'out'}: {tmp_path} is not writable for you" in message


# --- status and verify ---


def test_exit_codes_of_status_and_verify_tell_complete_incomplete_and_damaged(run, output):
    assert run("status", output)[0] == 0
    assert run("verify", output)[0] == 0
    uncommit(output, 1)
    assert run("status", output)[0] == 3
    assert run("verify", output)[0] == 3
    flip_byte(output / record_name(2))
    assert run("verify", output)[0] == 1


def test_status_and_verify_print_only_json_with_the_flag(run, output):
    assert json.loads(run("status", output, "--json")[1])["complete"] is True
    assert json.loads(run("verify", output, "--json")[1])["damage"] == []
    assert json.loads(run("status", output, "--json", "--no-rows")[1])["by_status"] is None


# --- merge ---


def test_merge_completes_a_store_with_all_units_committed(run, output, job):
    unmerge(output)
    code, out, _ = run("merge", output)
    assert code == 0
    assert re.search(r"merged +5 of 5 units\nrows +70: 68 ok, 1 empty, 1 no_target\n", out)
    assert run("verify", output)[0] == 0
    assert_same_bits(output, job.output)
    assert [list((output / name).iterdir()) for name in ("claims", "tmp")] == [[], []]


def test_merge_of_an_unfinished_store_lists_missing_units(run, output):
    uncommit(output, 1, 4)
    code, out, _ = run("merge", output)
    assert code == 0
    assert re.search(r"merged +3 of 5 units", out)
    assert (
        "missing       2 units, 22 documents: ids 16-31, 64-69; run the job's command again" in out
    )
    assert not read_output(output).is_merged
    assert run("status", output)[0] == 3
    assert run("verify", output)[0] == 3


def test_merge_is_refused_while_another_process_merges(run, refused, output):
    process = sleeping_process()
    try:
        owner = owner_of(process, rank=3)
        write_claim(output, "merge.0", owner)
        message = refused("merge", output)
        assert (
            f"is being merged by rank 3 on {owner.host} (pid {owner.pid}, job job); wait for it"
            in message
        )
        assert str(output / "claims" / "merge.0") in message
        assert (output / "claims" / "merge.0").exists()
        assert list((output / "tmp").iterdir()) == []
    finally:
        process.kill()
        process.wait()
    assert run("merge", output)[0] == 0  # now that it has ended


def test_merge_is_refused_when_records_are_gone(refused, output):
    before = tree_of(output / "projections.zarr")
    (output / record_name(2)).unlink()
    message = refused("merge", output)
    assert "holds 4 records, but the last merge used 5" in message
    assert tree_of(output / "projections.zarr") == before


def test_merge_names_a_damaged_record(refused, output):
    flip_byte(output / record_name(2))
    assert f"{output / record_name(2)} is damaged" in refused("merge", output)
    assert list((output / "claims").iterdir()) == []


# --- export ---


def test_export_prints_the_number_of_files_first(run, output, tmp_path):
    code, out, _ = run(
        "export", output, "--format", "pt", "--to", tmp_path / "to", "--rows_per_file", 20
    )
    assert code == 0
    assert out.startswith("4 files of at most 20 rows: 68 ok rows of samples 0 to 69, ")
    assert "left out: 1 empty, 1 no_target" in out
    assert len(list((tmp_path / "to").glob("*.pt"))) == 4


def test_export_to_a_folder_with_files_is_refused(refused, output):
    assert "--to" in refused("export", output, "--to", output)
    assert f"the store has {N_SAMPLES} samples" in refused(
        "export", output, "--to", "x", "--ids", "0:99"
    )
