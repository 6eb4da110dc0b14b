"""The command ``lds`` on a small corpus: its files, its numbers, resuming, errors."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.buckets import copy_into
from helpers.corpora import make_corpus, mixed_documents, words
from helpers.jobs import ENVIRONMENT
from helpers.models import make_model, make_tokenizer

from gradproj.__main__ import main
from gradproj.cli.lds import table_lines
from gradproj.corpus.index_file import open_corpus
from gradproj.corpus.stream import read_documents
from gradproj.errors import ConfigError, CorpusError, ModelError, OtherSettingsError, StoreError
from gradproj.evaluation import gradproj_methods, retraining
from gradproj.evaluation.baselines import mean_hidden_states
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import make_experiment, unpadded
from gradproj.evaluation.gradproj_methods import SMALLEST, GradientStores
from gradproj.evaluation.lds import (
    available,
    check_settings,
    draw_subsets,
    evaluate,
    locked,
    with_store,
)
from gradproj.evaluation.losses import load, query_losses
from gradproj.evaluation.methods import names_of
from gradproj.evaluation.retraining import train_config
from gradproj.storage.object_path import path_of
from gradproj.store import ProjectionStore

SMALL = {
    "n_documents": 8, "n_queries": 3, "n_near_copies": 2, "max_length": 24,
    "windows_per_document": 2, "n_layer": 1, "n_embd": 16, "n_head": 2,
    "epochs": 2, "batch_size": 4, "subsets": 4,
    "seeds": 2, "leave_out": 1, "leave_out_k": 2, "leave_out_group": 1, "pretrain": 0,
    "leave_out_controls": 1, "leave_out_methods": "ngram", "bootstrap": 20, "permutations": 4,
    "device": "cpu", "methods": "random,ngram,hidden", "reference": "ngram",
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    make_corpus(folder / "tars", [{"text": words(60, i)} for i in range(12)] + mixed_documents(4))
    make_tokenizer(folder / "tok")
    return folder


def config_of(data: Path, output: Path, **changes) -> LdsConfig:
    where = {
        "shards": str(data / "tars"),
        "tokenizer": str(data / "tok"),
        "output_dir": str(output),
    }
    return LdsConfig(**where | SMALL | changes)


@pytest.fixture
def in_this_process(monkeypatch):
    """Run trainings in this process; the list gets the names of their files of losses, in order."""
    made = []

    class Pool:
        def submit(self, function, *arguments):
            made.append(arguments[-1].stem)
            future: Future = Future()
            future.set_result(function(*arguments))
            return future

    @contextmanager
    def workers(n, folder):
        yield Pool()

    monkeypatch.setattr(retraining, "workers", workers)
    return made


def test_command_measures_every_kind_of_method_end_to_end(data, tmp_path, capsys):
    settings = SMALL | {
        "methods": "random,loss,grad_norm,hidden,ngram,dot@16,relatif@16,kfac@16/signs/headonly,"
        "kfac@16/signs/head,kfac@16/signs/headequal,kfac@16/signs,kfac@16/signs+text,"
        "kfac@16/signs/rescored2",
        "reference": "dot@16",
        "n_embd": 64,  # head rows have 64 values
    }
    settings |= {
        "shards": data / "tars",
        "tokenizer": data / "tok",
        "output_dir": tmp_path / "out",
        "workers": 2,
    }
    settings |= {"subsets": 3, "seeds": 1}
    assert (
        main(["lds", *(str(x) for name, value in settings.items() for x in (f"--{name}", value))])
        == 0
    )
    shown = capsys.readouterr().out
    assert "8 documents, 3 queries; 3 random subsets of 4, 1 training of each" in shown
    results = json.loads((tmp_path / "out/lds.json").read_text())
    assert set(results["methods"]) == set(settings["methods"].split(","))
    assert results["training_seeds"] == [1]
    assert all(name in shown for name in results["methods"])
    hybrid = results["methods"]["kfac@16/signs+text"]
    assert -1 <= hybrid["lds"]["mean"] <= 1
    # One store has the rows of all methods of signs, the head's and the layers'.
    assert not (tmp_path / "out/stores/documents-16-signs-eigen-sum").exists()
    kinds = ("headonly", "head", "headequal")
    names = ["kfac@16/signs", *(f"kfac@16/signs/{kind}" for kind in kinds)]
    layers, head, both, equal = (
        np.load(tmp_path / f"out/scores/{name.replace('/', '_')}.npy") for name in names
    )
    np.testing.assert_allclose(both, layers + head, rtol=1e-4, atol=1e-4 * np.abs(layers).max())
    factors = layers.std(axis=1, keepdims=True) / head.std(axis=1, keepdims=True)
    np.testing.assert_allclose(equal, layers + factors * head, rtol=1e-3, atol=1e-4)
    sizes = [results["methods"][name]["row_bytes"] for name in names]
    with ProjectionStore(tmp_path / "out/stores/documents-16-signs-eigen-sum-head") as store:
        assert sizes[2] == sizes[3] == store.layout.row_bytes
    assert sizes[0] + sizes[1] == sizes[2]
    assert hybrid["row_bytes"] == sizes[0]
    assert results["methods"]["ngram"]["row_bytes"] is None
    assert -1 <= results["randomized"] <= 1
    assert "dot@16 with the same score under random weights" in shown
    assert (tmp_path / "out/lds.svg").read_text().count("kfac/signs+text") == 1
    losses, subsets = np.load(tmp_path / "out/losses.npy"), np.load(tmp_path / "out/subsets.npy")
    assert losses.shape == (3, 1, 5)
    assert (subsets.sum(axis=1) == 4).all()
    assert np.load(tmp_path / "out/scores/kfac@16_signs+text.npy").shape == (5, 8)
    assert not list((tmp_path / "out/losses").glob("*.training"))


def test_lds_matches_a_computation_by_hand(data, tmp_path, in_this_process):
    config = config_of(data, tmp_path, leave_out=0, n_near_copies=0)
    results = evaluate(config)
    losses, subsets = np.load(tmp_path / "losses.npy"), np.load(tmp_path / "subsets.npy")
    scores = np.load(tmp_path / "scores/hidden.npy")
    predicted = (scores[:, None, :] * subsets[None]).sum(-1)
    measured = -losses.mean(axis=1).T
    ranked = [
        np.corrcoef(retraining_ranks(a), retraining_ranks(b))[0, 1]
        for a, b in zip(predicted, measured, strict=True)
    ]
    assert results.methods["hidden"].lds.mean == pytest.approx(np.mean(ranked), abs=1e-9)
    assert len(in_this_process) == 8


def retraining_ranks(values: np.ndarray) -> list[float]:
    order = sorted(values.tolist())
    return [np.mean([i for i, v in enumerate(order) if v == x]) for x in values.tolist()]


def test_leave_out_trains_without_the_top_documents_and_without_random_ones(
    data, tmp_path, in_this_process
):
    results = evaluate(
        config_of(
            data, tmp_path, leave_out=2, leave_out_k=1, leave_out_group=2, leave_out_controls=3
        )
    )
    assert in_this_process[8:] == [
        *(f"without-2-random-{i}-seed-0" for i in range(3)), "without-2-ngram-for-0-to-1-seed-0"
    ]  # fmt: skip
    controls = np.stack(
        [np.load(tmp_path / f"losses/without-2-random-{i}-seed-0.npy") for i in range(3)]
    )
    losses = np.load(tmp_path / "losses/without-2-ngram-for-0-to-1-seed-0.npy")
    left = results.methods["ngram"].leave_out
    assert left is not None
    assert left.by_query == pytest.approx((losses[:2] - controls[:, :2].mean(axis=0)).tolist())
    assert any("left out: nats" in line for line in table_lines(results))


def test_interrupted_experiment_resumes(data, tmp_path, in_this_process, monkeypatch):
    whole = config_of(data, tmp_path / "whole", leave_out=0)
    evaluate(whole)
    retrain, count = retraining._retrain, []

    def stopped_in_the_third(config, experiment, task, path):
        count.append(path)
        if len(count) == 3:
            (path.parent / f"{path.stem}.training" / "tars").mkdir(parents=True)
            raise KeyboardInterrupt
        retrain(config, experiment, task, path)

    monkeypatch.setattr(retraining, "_retrain", stopped_in_the_third)
    other = config_of(data, tmp_path / "other", leave_out=0)
    with pytest.raises(KeyboardInterrupt):
        evaluate(other)
    monkeypatch.setattr(retraining, "_retrain", retrain)
    in_this_process.clear()
    evaluate(other)
    assert len(in_this_process) == 6  # two of eight were finished
    assert (np.load(tmp_path / "other/losses.npy") == np.load(tmp_path / "whole/losses.npy")).all()


def test_more_subsets_seeds_and_methods_reuse_earlier_trainings(data, tmp_path, in_this_process):
    few = config_of(data, tmp_path, leave_out=0, subsets=3, seeds=1, methods="ngram")
    evaluate(few)
    before = np.load(tmp_path / "losses.npy")
    assert (
        json.loads((tmp_path / "lds.json").read_text())["ceiling"] is None
    )  # one seed cannot tell
    in_this_process.clear()
    evaluate(config_of(data, tmp_path, leave_out=0))
    assert len(in_this_process) == 4 * 2 - 3
    assert (np.load(tmp_path / "losses.npy")[:3, :1] == before).all()


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from gradproj.evaluation.retraining import workers\n"
        "if __name__ == '__main__':\n"
        "    with workers(1, Path(sys.argv[1])) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    (tmp_path / "starts.py").write_text(script)
    started = subprocess.Popen(
        [sys.executable, tmp_path / "starts.py", tmp_path],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert started.stdout is not None
    worker = int(started.stdout.readline())
    started.send_signal(signal.SIGKILL)
    started.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{worker}").exists() and "Z" not in _state(worker):
        assert time.monotonic() < deadline, "the worker is still alive"
        time.sleep(0.05)
    started.stdout.close()


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


# --- documents


def test_documents_are_windows_of_one_length_with_near_copies_of_the_last_queries(data, tmp_path):
    config = config_of(data, tmp_path, corruption=0.25)
    experiment = make_experiment(config)
    assert experiment.documents.shape == (8, 24)
    assert experiment.queries.shape == (5, 24)
    assert experiment.n_held_out == 3
    originals = experiment.queries[experiment.n_held_out :]
    same = (experiment.documents[experiment.copies] == originals).mean(axis=1)
    assert (same >= 0.75).all()
    assert (same < 1).any()
    rest = np.delete(experiment.documents, experiment.copies, axis=0)
    assert not (rest[:, None] == experiment.queries[None]).all(axis=2).any()
    index = open_corpus(str(experiment.document_tars))
    in_tars = [document.content.ids for document in read_documents(index, 0, index.n_samples)]
    assert in_tars == experiment.documents.tolist()
    again = make_experiment(config)
    assert (again.documents == experiment.documents).all()


def test_documents_of_mixed_lengths_are_windows_within_the_bounds(data, tmp_path, in_this_process):
    config = config_of(
        data, tmp_path, min_length=6, pretrain=3, leave_out=0, subsets=3, seeds=1,
        methods="random,ngram,hidden,text",
    )  # fmt: skip
    evaluate(config)
    experiment = make_experiment(config)
    windows = unpadded(np.concatenate([experiment.documents, experiment.queries]))
    lengths = {len(ids) for ids in windows}
    assert min(lengths) >= 6
    assert max(lengths) <= 24
    assert len(lengths) > 3
    index = open_corpus(str(experiment.document_tars))
    in_tars = [document.content.ids for document in read_documents(index, 0, index.n_samples)]
    assert in_tars == [ids.tolist() for ids in unpadded(experiment.documents)]
    # Padding changes neither a loss, which is a mean over a query's own targets, nor a state.
    model = load(tmp_path / "model", "cpu")
    alone = [query_losses(model, ids[None]).item() for ids in unpadded(experiment.queries)]
    np.testing.assert_allclose(query_losses(model, experiment.queries), alone, rtol=1e-5)
    states = mean_hidden_states(tmp_path / "model", experiment.queries, "cpu")
    for got, ids in zip(states, unpadded(experiment.queries), strict=True):
        want = model.base_model(input_ids=torch.from_numpy(ids)[None])[0][0].mean(dim=0)
        torch.testing.assert_close(got, want)


def test_trainings_start_from_a_model_pretrained_on_other_documents(
    data, tmp_path, in_this_process
):
    config = config_of(data, tmp_path, pretrain=6, leave_out=0, subsets=3, seeds=1, methods="ngram")
    evaluate(config)
    experiment = make_experiment(config)
    index = open_corpus(str(tmp_path / "pretrain"))
    assert index.n_samples == 6
    pretrain, documents, queries = (
        sources_of(tmp_path / name) for name in ("pretrain", "documents", "queries")
    )
    assert not pretrain & (documents | queries)
    training = train_config(config, experiment, experiment.document_tars, tmp_path / "x", seed=5)
    assert (training.model, training.seed) == (str(tmp_path / "start"), 5)


def sources_of(folder: Path) -> set[str]:
    """Return the keys of the documents that the windows in a directory's tars come from."""
    keys = set()
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            keys |= {
                json.load(tar.extractfile(member))["meta"]["source"].split()[0] for member in tar
            }
    return keys


def test_subsets_have_the_size_that_is_asked_for(data, tmp_path):
    subsets = draw_subsets(config_of(data, tmp_path, subsets=5, subset_size=3), 9)
    assert (subsets.sum(axis=1) == 3).all()


def test_checkpoint_is_fine_tuned_and_scored_in_place_of_a_new_model(
    data, tmp_path, in_this_process, capsys
):
    make_model(tmp_path / "model", "llama", vocab_size=300)
    make_tokenizer(tmp_path / "model")
    changes = {"model": str(tmp_path / "model"), "tokenizer": "", "train_layers": 1}
    config = config_of(data, tmp_path / "out", leave_out=0, subsets=3, seeds=1, **changes)
    results = evaluate(config)
    assert in_this_process == [f"subset-000{i}-seed-1" for i in range(3)]
    assert 0 < results.loss_spread < results.mean_loss
    assert not (tmp_path / "out/model").exists()
    assert config.identity()["learning_rate"] == 1e-4


def test_query_rows_of_a_store_that_was_made_again_are_computed_again(data, tmp_path, monkeypatch):
    made: list[str] = []

    class Projector:
        def __init__(self, store, device):
            made.append(store.attributes["store_id"])

        def rows(self, queries):
            return SimpleNamespace(rows=np.full((len(queries), 2), len(made)), head=None)

    monkeypatch.setattr(gradproj_methods, "QueryProjector", Projector)
    config = config_of(data, tmp_path)
    experiment = SimpleNamespace(queries=np.array([[3, 4, 5]]), first=np.array([1]))
    (tmp_path / "stores").mkdir()
    stores = GradientStores(config, experiment, tmp_path)
    rows = [
        stores._query_rows(SimpleNamespace(attributes={"store_id": name}), SMALLEST)[0]
        for name in ("first", "first", "second")
    ]
    assert made == ["first", "second"]
    assert [float(x[0, 0]) for x in rows] == [1, 1, 2]


@pytest.mark.parametrize("place", ["disk", "bucket"])
def test_store_gives_the_tars_model_and_tokenizer_that_are_not_given(job, tmp_path, place, request):
    output, corpus = job.output, str(job.corpus)
    if place == "bucket":
        bucket = path_of(str(request.getfixturevalue("bucket")))
        corpus = str(copy_into(job.corpus, bucket / "tars"))
        output = copy_into(output, bucket / "out")
        recorded = output / "run_config.json"
        recorded.put([recorded.read_bytes().replace(str(job.corpus).encode(), corpus.encode())])
    settings = SMALL | {"max_length": 8, "n_documents": 2, "n_queries": 1, "leave_out": 0}
    settings |= {"n_near_copies": 0}
    config = LdsConfig(store=str(output), output_dir=str(tmp_path), **settings)
    found, given = with_store(config), with_store(replace(config, shards="others"))
    assert (found.shards, found.model) == (corpus, str(job.model))
    assert (given.shards, given.model) == ("others", str(job.model))
    assert found.identity() == replace(found, store="elsewhere").identity()
    assert len(make_experiment(found).documents) == 2


def test_first_halves_do_not_depend_on_their_number(data, tmp_path):
    few, many = (draw_subsets(config_of(data, tmp_path, subsets=n), 9) for n in (3, 7))
    assert (many[:3] == few).all()
    assert (many.sum(axis=1) == 4).all()
    assert len(np.unique(many, axis=0)) > 1


# --- user errors


def test_corpus_with_too_few_documents_is_rejected(data, tmp_path):
    with pytest.raises(
        CorpusError, match=r"has \d+ windows of 24 tokens .* need 503, and --pretrain"
    ):
        make_experiment(config_of(data, tmp_path, n_documents=500))


def test_documents_that_are_no_plain_text_are_left_out_and_counted(data, tmp_path):
    text = words(60, 1)
    others = [
        {"prompt": text, "completion": text}, {"prompt": text, "chosen": text, "rejected": "a"},
        {"messages": [{"role": "user", "content": text}]},
        {"input_ids": [5] * 60, "labels": [-100] * 59 + [5]},
    ]  # fmt: skip
    make_corpus(tmp_path / "tars", [*others, {"text": text}])
    config = config_of(data, tmp_path / "lds", shards=str(tmp_path / "tars"))
    with pytest.raises(CorpusError, match=r"4 documents with a prompt or labels are left out"):
        make_experiment(config)


def test_directory_is_reusable_after_too_few_documents(data, tmp_path, in_this_process):
    with pytest.raises(CorpusError, match="need 503"):
        evaluate(config_of(data, tmp_path, n_documents=500, leave_out=0))
    assert evaluate(config_of(data, tmp_path, leave_out=0)).n_documents == 8


def test_missing_tokenizer_is_named(data, tmp_path):
    with pytest.raises(ModelError, match="--tokenizer /nowhere: no such directory"):
        evaluate(config_of(data, tmp_path, tokenizer="/nowhere"))


def test_directory_of_another_experiment_is_rejected_with_every_difference(
    data, tmp_path, in_this_process
):
    evaluate(config_of(data, tmp_path, leave_out=0))
    with pytest.raises(
        OtherSettingsError, match=r"--n_documents: there 8, here 10\n.*--epochs: there 2, here 3"
    ):
        evaluate(config_of(data, tmp_path, n_documents=10, epochs=3))


def test_settings_recorded_under_old_names_of_flags_are_the_same_experiment(data, tmp_path):
    config = config_of(data, tmp_path)
    old_names = {
        "n_documents": "documents", "n_queries": "queries", "n_near_copies": "duplicates",
        "windows_per_document": "windows", "corruption": "changed", "model_dtype": "precision",
    }  # fmt: skip
    recorded = {old_names.get(k, k): v for k, v in config.identity().items()}
    for later in ("min_length", "model", "train_layers", "subset_size"):
        del recorded[later]  # an earlier version had no such setting
    assert set(old_names.values()) <= set(recorded)
    (tmp_path / "settings.json").write_text(json.dumps(recorded))
    (tmp_path / "tokens.npz").touch()
    check_settings(tmp_path, config)
    recorded["documents"] += 1
    (tmp_path / "settings.json").write_text(json.dumps(recorded))
    with pytest.raises(OtherSettingsError, match="--n_documents: there 9, here 8"):
        check_settings(tmp_path, config)


def test_damaged_file_is_named_with_the_way_out(data, tmp_path, in_this_process):
    config = config_of(data, tmp_path, leave_out=0)
    evaluate(config)
    (tmp_path / "losses/subset-0001-seed-2.npy").write_bytes(b"")
    with pytest.raises(
        StoreError, match=r"subset-0001-seed-2.npy cannot be read .*Delete it, and the same command"
    ):
        evaluate(config)
    (tmp_path / "settings.json").write_bytes(b"{")
    with pytest.raises(StoreError, match=r"settings.json is damaged"):
        evaluate(config)


def test_killed_training_process_is_reported(tmp_path):
    message = r"a training process was killed .* --workers 1 .* see .*training\.log"
    with pytest.raises(StoreError, match=message), retraining.workers(1, tmp_path):
        raise BrokenProcessPool("gone")


def test_second_command_in_a_directory_is_rejected(data, tmp_path):
    with locked(tmp_path), pytest.raises(StoreError, match="another lds runs in"):
        evaluate(config_of(data, tmp_path))


def test_method_without_its_library_is_left_out_with_a_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert available(["ngram", "bm25"]) == ["ngram"]
    assert (
        "left out: bm25, which needs bm25s (pip install 'gradproj[evaluation]')"
        in capsys.readouterr().err
    )


def test_interrupt_exits_with_130_and_a_line(data, tmp_path, in_this_process, monkeypatch, capsys):
    monkeypatch.setattr(retraining, "train", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    config = config_of(data, tmp_path)
    flags = [
        str(x)
        for n in ("shards", "tokenizer", "output_dir", *SMALL)
        for x in (f"--{n}", getattr(config, n))
    ]
    assert main(["lds", *flags]) == 130
    assert "stopped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subsets": 2}, r"--subsets must be at least 3, got 2 \(a rank correlation"),
        ({"n_documents": 0}, "--n_documents must be at least 1, got 0"),
        ({"n_documents": 10, "n_near_copies": 6}, "--n_documents must be at least 12, got 10"),
        ({"corruption": 1.0}, "--corruption must be at least 0 and less than 1"),
        ({"leave_out": 72}, "--leave_out 72 is more than --n_queries 64"),
        ({"leave_out_k": 65}, "are 520 documents, over half of the 1,024"),
        ({"leave_out": 12}, "--leave_out 12 is not a multiple of --leave_out_group 8"),
        ({"leave_out_controls": 0}, "--leave_out_controls must be at least 1, got 0"),
        ({"output_dir": ""}, "--output_dir is empty; give a folder"),
        ({"shards": " "}, "--shards is empty; give a folder, a glob"),
        ({"learning_rate": float("nan")}, "--learning_rate must be more than 0 and finite"),
        ({"min_length": 129}, "--min_length 129 is more than --max_length 128"),
        ({"subset_size": 1024}, "--subset_size 1024 must be less than --n_documents 1024"),
        ({"train_layers": 2}, "--train_layers is for the fine-tuning of a --model"),
        ({"n_head": 3}, "--n_embd 128 is not a multiple of --n_head 3"),
        ({"vocab_size": 256}, "--vocab_size must be at least 257, got 256"),
        ({"seed": -1}, "--seed must be at least 0"),
    ],
)
def test_invalid_settings_are_rejected(given, message):
    with pytest.raises(ConfigError, match=message):
        LdsConfig(**{"shards": "x", "output_dir": "y"} | given)


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("", "--methods is empty"),
        ("bm25,trak", "unknown method 'trak'; choose from random, .*SCORE@K"),
        ("bm25,bm25", "--methods names bm25 twice"),
        ("euclid@16", "there is no score 'euclid'; choose one of kfac"),
        ("dot@16:0.1/signs", "dot has no damping; write dot@16/signs"),
        ("kfac@16/sign", r"kfac@16/sign: write SCORE@K.*ENCODING is one of signs, int2"),
        ("kfac@16/signs/eigen/total", "write SCORE@K"),
        ("dot@16/signs/head", "dot@16/signs/head: head rows are for kfac of packed rows"),
        ("kfac@16/dense/headonly", "head rows are for kfac of packed rows"),
        ("kfac@16+trak", "unknown method 'trak'"),
        ("dot@16+ngram+text", "adds more than two methods"),
        ("kfac@0", "K must be at least 1"),
        ("kfac@16:1.2.3", "'1.2.3' is not a number"),
    ],
)
def test_invalid_methods_are_rejected(listed, message):
    with pytest.raises(ConfigError, match=message):
        names_of(listed, "--methods")
