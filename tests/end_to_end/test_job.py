"""The job with real processes: rows, equal bits, other readers, unusual documents, resuming."""

import json
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
import zarr
from helpers.corpora import make_corpus, mixed_documents, words
from helpers.gate import Gate
from helpers.jobs import (
    ORPHAN_S,
    PATIENCE_S,
    SMALL_JOB,
    arrays_of,
    assert_same_bits,
    job_command,
    run_job,
    start_at_gate,
    wait_for_a_record,
)
from helpers.models import make_model
from helpers.references import projected_gradient_by_autograd, relative_error
from transformers import AutoModelForCausalLM, AutoTokenizer

from gradproj import GradProjLoraEngine, ProjectionStore
from gradproj.coordinator.process_id import process_start
from gradproj.store import STATUS


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory, corpus, model_dir):
    """The finished store of one rank."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    run_job(1, shards=corpus, model=model_dir, output_dir=output, **SMALL_JOB)
    return output


def counts(store):
    return {name: n for name, n in store.status_counts().items() if n}


def slow_rows(model_dir, texts, max_length, windows, mean):
    """Return every text's row by plain autograd, one sequence at a time."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    engine = GradProjLoraEngine(model, proj_rank_total=24, proj_rank_min=3)
    rows = []
    for text in texts:
        tokens = torch.tensor(tokenizer(text).input_ids)
        starts = range(0, len(tokens) - 1, max_length - 1) if windows else [0]
        parts = [tokens[s : s + max_length] for s in starts]
        row = sum(projected_gradient_by_autograd(model, engine, part) for part in parts)
        rows.append(row / sum(len(part) - 1 for part in parts) if mean else row)
    return torch.stack(rows)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("long_documents", ["truncate", "windows"])
def test_row_is_the_projected_gradient_of_its_document(
    tmp_path, model_dir, long_documents, reduction
):
    texts = [words(n, n) for n in (3, 200, 40, 9, 90)]
    corpus = make_corpus(tmp_path / "tars", [{"text": text} for text in texts], per_tar=2)
    options = {
        **SMALL_JOB,
        "max_length": 32,
        "long_documents": long_documents,
        "loss_reduction": reduction,
    }
    run_job(
        1,
        shards=corpus,
        model=model_dir,
        output_dir=tmp_path / "out",
        proj_dtype="float32",
        **options,
    )
    want = slow_rows(model_dir, texts, 32, long_documents == "windows", reduction == "mean")
    with ProjectionStore(tmp_path / "out") as store:
        for got, expected in zip(store.rows(range(5)), want, strict=True):
            assert relative_error(torch.from_numpy(got), expected) < 1e-5


@pytest.mark.parametrize("ranks", [2, 3])
def test_any_number_of_ranks_gives_the_same_bits(tmp_path, corpus, model_dir, undisturbed, ranks):
    settings = {"output_dir": tmp_path / "out", "fresh_process": ranks == 2, **SMALL_JOB}
    run_job(ranks, shards=corpus, model=model_dir, **settings)
    assert len(list((undisturbed / "units").iterdir())) >= 12
    assert_same_bits(tmp_path / "out", undisturbed)


def test_every_document_is_in_the_store_once(undisturbed):
    with ProjectionStore(undisturbed) as store:
        assert counts(store) == {"ok": 200}
        samples = store.samples(range(200))
        assert [s.key for s in samples] == [f"{i:012d}" for i in range(200)]
        assert [s.domain for s in samples] == ["Github", "ArXiv", "Pile-CC"] * 66 + [
            "Github",
            "ArXiv",
        ]
        assert [s.tar for s in samples] == [i // 40 for i in range(200)]
    stats = json.loads((undisturbed / "projection_stats.json").read_text())
    assert stats["complete"]
    assert sum(d["n_rows"] for d in stats["by_domain"].values()) == 200
    assert not list((undisturbed / "claims").iterdir())
    assert not list((undisturbed / "tmp").iterdir())


def test_reader_returns_the_texts_of_the_tars(undisturbed):
    documents = mixed_documents(200)
    with ProjectionStore(undisturbed / "projections.zarr") as store:
        assert [s.text for s in store.samples([199, 3], text=True)] == [
            documents[i]["text"] for i in (199, 3)
        ]
        assert "200 rows" in repr(store)


def test_losses_are_the_models_own(undisturbed, model_dir):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(model_dir),
        AutoTokenizer.from_pretrained(model_dir),
    )
    documents = mixed_documents(200)
    with ProjectionStore(undisturbed) as store:
        for sample in store.samples([0, 7, 199]):
            ids = torch.tensor([tokenizer(documents[sample.sample_id]["text"]).input_ids[:48]])
            with torch.no_grad():
                assert sample.loss == pytest.approx(
                    model(input_ids=ids, labels=ids).loss.item(), rel=1e-4
                )
            assert sample.n_tokens == ids.shape[1] - 1


def test_token_covariances_are_the_sum_over_units(undisturbed, corpus, model_dir, tmp_path):
    run_job(
        1,
        shards=corpus,
        model=model_dir,
        output_dir=tmp_path / "one",
        rows_per_shard=256,
        **SMALL_JOB,
    )
    many, one = (
        zarr.open_group(str(path / "projections.zarr"), mode="r")
        for path in (undisturbed, tmp_path / "one")
    )
    for name in ("token_covariance_a", "token_covariance_s"):
        np.testing.assert_allclose(many[name][...], one[name][...], rtol=1e-4, atol=1e-3)
    assert many.attrs["covariance_tokens"] == one.attrs["covariance_tokens"]
    assert many.attrs["covariance_tokens"] == int(many["n_tokens"][...].sum())


ODD_TEXTS = [
    ("line\u2028separator\u2029and\u0085next line", "ok"),
    ("emoji \U0001f600\U0001f469\u200d\U0001f680 and combining e\u0301 \ufeff", "ok"),
    ("nul \x00 and control \x1b[31m and \r\n", "ok"),
    ("right to left \u202e\u05d0\u05d1 \u0645\u0631\u062d\u0628\u0627", "ok"),
    ("</s><s> special tokens as text", "ok"),
    ("lone surrogate \ud800 here", "bad_input"),
    ("", "empty"),
    ("a", "no_target"),
    ("b", "no_target"),
    (words(48 * 100, 3), "ok"),
]


def test_every_unusual_document_has_one_row_with_its_status(tmp_path, model_dir):
    texts = [*ODD_TEXTS, *[(words(20, 5), "ok")] * 3]
    raw = [
        (b"{not json", "bad_input"),
        (b'{"meta": {}}', "bad_input"),
        (b'{"text": 5}', "bad_input"),
        (b'{"text": "\xff"}', "bad_input"),
        (b"[" * 5000, "bad_input"),
        (b'{"input_ids": [5, 6, 7]}', "ok"),
        (b'{"input_ids": [5]}', "no_target"),
        (b'{"input_ids": []}', "empty"),
        (b'{"text": "text beside no ids", "input_ids": []}', "empty"),
        (b'{"input_ids": [5, 100000]}', "bad_input"),
    ]
    expected = [status for _, status in texts] + [status for _, status in raw]
    documents = [{"text": t, "meta": {"pile_set_name": "odd"}} for t, _ in texts] + [
        data for data, _ in raw
    ]
    corpus = make_corpus(tmp_path / "tars", documents, per_tar=7)
    run_job(
        2,
        shards=corpus,
        model=model_dir,
        output_dir=tmp_path / "out",
        rows_per_shard=4,
        **SMALL_JOB,
    )
    group = zarr.open_group(str(tmp_path / "out" / "projections.zarr"), mode="r")
    assert [STATUS[s] for s in expected] == group["status"][...].tolist()
    with ProjectionStore(tmp_path / "out") as store:
        rows = store.rows(range(len(expected)), missing="nan")
    for row, status in zip(rows, expected, strict=True):
        if status == "ok":
            assert np.isfinite(row).all()
            assert np.abs(row).max() > 0
        elif status == "bad_input":
            assert np.isnan(row).all()
        else:
            assert not row.any()
    same = [i for i, (t, _) in enumerate(texts) if t == words(20, 5)]
    assert relative_error(torch.from_numpy(rows[same[0]]), torch.from_numpy(rows[same[2]])) < 1e-3


def test_corpus_of_token_ids_gives_the_rows_of_its_text(tmp_path, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [words(20, i) for i in range(6)]
    as_text = make_corpus(tmp_path / "text", [{"text": t} for t in texts])
    as_ids = make_corpus(tmp_path / "ids", [{"input_ids": tokenizer(t).input_ids} for t in texts])
    for source in (as_text, as_ids):
        run_job(
            1,
            shards=source,
            model=model_dir,
            output_dir=tmp_path / f"out-{source.name}",
            **SMALL_JOB,
        )
    assert_same_bits(tmp_path / "out-text", tmp_path / "out-ids")


@pytest.mark.parametrize(
    ("special", "extra"), [("none", []), ("bos", ["bos"]), ("bos_eos", ["bos", "eos"])]
)
def test_special_tokens_follow_the_flag(tmp_path, model_dir, special, extra):
    corpus = make_corpus(tmp_path / "tars", [{"text": words(9, 1)}])
    run_job(
        1,
        shards=corpus,
        model=model_dir,
        output_dir=tmp_path / "out",
        special_tokens=special,
        **SMALL_JOB,
    )
    with ProjectionStore(tmp_path / "out") as store:
        plain = len(AutoTokenizer.from_pretrained(model_dir)(words(9, 1)).input_ids)
        assert store.samples([0])[0].n_tokens == plain - 1 + len(extra)


def test_selected_domains_write_only_their_units(tmp_path, model_dir):
    documents = sorted(mixed_documents(96), key=lambda d: d["meta"]["pile_set_name"])
    corpus = make_corpus(tmp_path / "tars", documents, per_tar=32)
    settings = {**SMALL_JOB, "rows_per_shard": 16, "domains": "Github"}
    run_job(2, shards=corpus, model=model_dir, output_dir=tmp_path / "out", **settings)
    shards = {p.name for p in (tmp_path / "out" / "projections.zarr" / "projections").glob("c.*")}
    assert shards == {"c.2.0", "c.3.0"}
    with ProjectionStore(tmp_path / "out") as store:
        assert counts(store) == {"ok": 32, "not_selected": 64}
        assert {s.domain for s in store.samples(range(32, 64))} == {"Github"}
        assert np.isnan(store.rows([0, 95], missing="nan")).all()


def test_finished_store_is_unchanged_by_another_start(corpus, model_dir, undisturbed):
    before = arrays_of(undisturbed)
    done = run_job(2, shards=corpus, model=model_dir, output_dir=undisturbed, **SMALL_JOB)
    assert "The store is complete" in done.stdout
    assert arrays_of(undisturbed) == before


def test_copied_corpus_and_touched_tars_continue_in_the_same_output(
    tmp_path, corpus, model_dir, undisturbed
):
    output, tars = tmp_path / "out", shutil.copytree(corpus, tmp_path / "tars")
    settings = {"model": model_dir, "output_dir": output, **SMALL_JOB}
    run_job(1, shards=corpus, **settings)
    for unit in (0, 5):
        (output / "units" / f"{unit:08d}.safetensors").unlink()
    os.utime(tars / "shard-000001.tar", (1, 1))
    run_job(2, shards=tars, **settings)
    assert_same_bits(output, undisturbed)
    with ProjectionStore(output) as store:
        assert store.samples([50], text=True)[0].text == mixed_documents(200)[50]["text"]


def test_other_settings_are_refused_with_every_difference(corpus, model_dir, undisturbed):
    before = arrays_of(undisturbed)
    changed = {**SMALL_JOB, "proj_seed": 7, "max_length": 32, "loss_reduction": "sum"}
    done = run_job(1, expect=2, shards=corpus, model=model_dir, output_dir=undisturbed, **changed)
    for line in (
        "--max_length: store 48, this run 32",
        "--proj_seed: store 42, this run 7",
        "--loss_reduction: store 'mean', this run 'sum'",
    ):
        assert line in done.stderr
    assert "Traceback" not in done.stderr
    assert arrays_of(undisturbed) == before


def descendants(pid):
    """Return the running descendants of ``pid``, from /proc."""
    found, parents = [], {pid}
    for entry in sorted(int(p) for p in os.listdir("/proc") if p.isdigit()):
        try:
            with open(f"/proc/{entry}/stat") as file:
                parent = int(file.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        if parent in parents:
            parents.add(entry)
            found.append(entry)
    return found


@pytest.mark.parametrize(
    ("stop", "ranks_after"), [(signal.SIGKILL, 3), (signal.SIGTERM, 1), (signal.SIGINT, 1)]
)
def test_stopped_job_resumes_with_any_number_of_ranks(
    tmp_path, corpus, model_dir, undisturbed, stop, ranks_after
):
    output, gate = tmp_path / "out", Gate(tmp_path / "gate", batches=8)
    settings = {"shards": corpus, "model": model_dir, "output_dir": output, **SMALL_JOB}
    first = subprocess.Popen(
        job_command(2, **settings),
        env=gate.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    gate.wait_for(2, lambda: first.poll() is None, lambda: first.communicate()[0])
    wait_for_a_record(output)
    workers = {pid: process_start(pid) for pid in descendants(first.pid)}
    if stop == signal.SIGKILL:
        for pid in workers:
            os.kill(pid, stop)
    first.send_signal(stop)
    first.communicate(timeout=PATIENCE_S)
    deadline = time.monotonic() + ORPHAN_S
    while any(start is not None and process_start(pid) == start for pid, start in workers.items()):
        assert time.monotonic() < deadline, "a worker outlived its launcher"
        time.sleep(0.1)
    committed = {p.name: p.read_bytes() for p in (output / "units").glob("*.safetensors")}
    assert 1 <= len(committed) < 13
    run_job(ranks_after, **settings)
    assert all((output / "units" / name).read_bytes() == data for name, data in committed.items())
    assert_same_bits(output, undisturbed)


def test_saved_partial_rows_are_used_and_give_the_same_bits(
    tmp_path, corpus, model_dir, undisturbed
):
    output, gate = tmp_path / "out", Gate(tmp_path / "gate", batches=2)
    settings = {"shards": corpus, "model": model_dir, "output_dir": output, **SMALL_JOB}
    job = start_at_gate(gate, proj_save_interval=1, **settings)
    job.kill()
    job.wait()
    assert len(list(output.glob("partial/*/*.safetensors"))) == 1  # the second batch has not ended
    run_job(1, verbose=True, **settings)
    assert_same_bits(output, undisturbed)
    assert not list(output.glob("partial/*/*.safetensors"))


def test_random_architecture_needs_no_checkpoint(tmp_path, model_dir):
    corpus = make_corpus(tmp_path / "tars", [{"text": words(5, i)} for i in range(2)])
    (tmp_path / "config").mkdir()
    make_model(tmp_path / "config", family="gpt2")
    (tmp_path / "config" / "model.safetensors").unlink()
    settings = {"shards": corpus, "init": "random", "model": tmp_path / "config", **SMALL_JOB}
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run_job(1, output_dir=tmp_path / out, seed=seed, **settings)
    assert_same_bits(tmp_path / "a", tmp_path / "b")
    assert arrays_of(tmp_path / "a")["projections"] != arrays_of(tmp_path / "c")["projections"]
