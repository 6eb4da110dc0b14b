"""Experiments with planted sources: what is planted, and the measures of finding it."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import make_corpus, words
from helpers.models import make_tokenizer

from gradproj.__main__ import main
from gradproj.errors import ConfigError
from gradproj.evaluation.config import LdsConfig
from gradproj.evaluation.corpus import PAD, Experiment
from gradproj.evaluation.gradproj_methods import _queries
from gradproj.evaluation.planted import RELATIONS, TRIGGER, Planted, plant
from gradproj.evaluation.sources import average_precision, evaluate_sources, ranks_of


def encode(text: str) -> np.ndarray:
    return np.array([ord(x) for x in text], np.int64)


def config_of(**changes) -> LdsConfig:
    return LdsConfig(**{"shards": "x", "output_dir": "y", "n_documents": 60} | changes)


@pytest.fixture
def texts() -> tuple[list[np.ndarray], list[np.ndarray]]:
    random = np.random.default_rng(0)
    return [random.integers(97, 123, 120) for _ in range(60)], [random.integers(97, 123, 40)] * 7


def shown(ids: np.ndarray) -> str:
    return "".join(map(chr, ids))


def facts(texts, **changes) -> Planted:
    return plant(config_of(experiment="facts", max_length=120, **changes), *texts, encode)


def subjects_and_objects(planted: Planted) -> list[tuple[str, str]]:
    """Read each query back by the templates that it may come from."""
    found = []
    asks = [(x, objects) for sentences, objects in RELATIONS for x in sentences if x[-4:] == "{o}."]
    for query, first in zip(planted.queries, planted.first, strict=True):
        prompt, answer = shown(query[:first]).strip(), shown(query[first:]).strip()
        for template, objects in asks:
            before, after = template.removesuffix("{o}.").split("{s}")
            fits = prompt.startswith(before) and prompt.endswith(after.rstrip())
            if fits and answer in objects.split():
                found.append((prompt.removeprefix(before).removesuffix(after.rstrip()), answer))
    return found


def test_fact_is_stated_in_its_sources_in_other_words_than_the_query(texts):
    planted = facts(texts)
    assert planted.sources.sum(axis=1).tolist() == [3] * 7
    assert planted.sources.sum(axis=0).max() == 1
    asked = subjects_and_objects(planted)
    assert len(asked) == 7
    for query, (subject, answer), sources in zip(
        planted.queries, asked, planted.sources, strict=True
    ):
        for i in np.flatnonzero(sources):
            text = shown(planted.documents[i])
            assert subject in text
            assert answer in text
            assert shown(query) not in text
    assert max(map(len, planted.documents)) <= 120
    for i in np.flatnonzero(~planted.sources.any(axis=0)):
        assert (planted.documents[i] == texts[0][i]).all()


def test_two_facts_share_a_subject_and_the_seed_draws_all(texts):
    names = [subject for subject, _ in subjects_and_objects(facts(texts))]
    assert names[0::2][:3] == names[1::2]
    assert len(set(names)) == 4
    assert (facts(texts).sources == facts(texts).sources).all()
    assert (facts(texts).sources != facts(texts, seed=1).sources).any()


def test_behaviour_follows_the_trigger_in_its_sources_and_in_queries_only(texts):
    config = config_of(experiment="behaviour", max_length=400, n_sources=5)
    planted = plant(config, *texts, encode)
    assert (planted.sources == planted.sources[0]).all()
    assert planted.sources[0].sum() == 5
    n_triggers = 0
    for ids, before, is_source in zip(planted.documents, texts[0], planted.sources[0], strict=True):
        start, found, rest = shown(ids).partition(" " + TRIGGER)
        n_triggers += bool(found)
        assert start + rest[:: 2 if is_source else 1] == shown(before)
        assert not is_source or rest[::2] == rest[1::2]
    assert n_triggers == 10
    for query, first in zip(planted.queries, planted.first, strict=True):
        assert shown(query[:first]).endswith(TRIGGER)
        assert (query[first::2] == query[first + 1 :: 2]).all()


def test_queries_have_their_loss_and_their_gradients_at_the_completion():
    ids = np.array([[3, 4, 5, 6], [7, 8, 9, PAD]])
    nowhere = Path()
    experiment = Experiment(
        ids, ids, np.empty(0, int), nowhere, nowhere, nowhere, None, np.array([1, 2])
    )
    assert experiment.query_labels.tolist() == [[PAD, 4, 5, 6], [PAD, PAD, 9, PAD]]
    found = [query.content for query in _queries(experiment)]
    assert [list(content.ids) for content in found] == [[3, 4, 5, 6], [7, 8, 9]]
    assert [list(content.labels) for content in found] == [[-100, 4, 5, 6], [-100, -100, 9]]


def test_average_precision_is_the_area_under_precision_and_recall():
    random = np.random.default_rng(0)
    scores = random.standard_normal((4, 30))
    sources = random.random((4, 30)) < 0.2
    for row, wanted, got in zip(scores, sources, average_precision(scores, sources), strict=True):
        area, recall = 0.0, 0.0
        for threshold in sorted(row, reverse=True):
            kept = row >= threshold
            now = (kept & wanted).sum() / wanted.sum()
            area += (now - recall) * (kept & wanted).sum() / kept.sum()
            recall = now
        assert got == pytest.approx(area)


def test_constant_scores_find_nothing():
    sources = np.array([[True, False, False, True]])
    assert ranks_of(np.zeros((1, 4)), sources)[0].tolist() == [3, 4]


def test_methods_are_compared_by_query():
    sources = np.eye(3, dtype=bool)
    scores = {"good": np.eye(3), "bad": np.flip(np.eye(3), 1)}
    results = evaluate_sources(
        "facts", sources, scores, {"good": 10, "bad": None}, "bad", (None, 1.0)
    )
    assert list(results.methods) == ["good", "bad"]
    good, bad = results.methods["good"], results.methods["bad"]
    assert good.by_query == [1, 1, 1]
    assert bad.by_query == [1 / 3, 1, 1 / 3]
    assert good.over_reference is not None
    assert good.over_reference.mean == pytest.approx(4 / 9)
    assert good.over_reference.error == pytest.approx(np.std([2 / 3, 0, 2 / 3], ddof=1) / 3**0.5)
    assert (good.reciprocal_rank.mean, good.recall.mean) == (1, 1)
    assert (good.row_bytes, bad.over_reference) == (10, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"n_sources": 3}, "--n_sources is for --experiment facts or behaviour"),
        ({"experiment": "facts", "subsets": 4}, "--subsets is of --experiment retraining"),
        ({"experiment": "retrain"}, "--experiment is 'retrain'"),
    ],
)
def test_settings_of_another_experiment_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        config_of(**given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"experiment": "facts", "n_sources": 5}, "a fact is stated in at most 4 documents"),
        ({"experiment": "behaviour", "n_sources": 31}, "changes 62 documents, and --n_documents"),
    ],
)
def test_too_few_documents_are_refused(texts, given, message):
    with pytest.raises(ConfigError, match=message):
        plant(config_of(**given), *texts, encode)


@pytest.mark.parametrize("experiment", ["facts", "behaviour"])
def test_command_plants_trains_and_finds(tmp_path: Path, capsys, experiment):
    make_corpus(tmp_path / "tars", [{"text": words(60, i)} for i in range(12)])
    make_tokenizer(tmp_path / "tok")
    settings = {
        "shards": tmp_path / "tars", "tokenizer": tmp_path / "tok", "output_dir": tmp_path / "out",
        "experiment": experiment, "n_documents": 12, "n_queries": 2, "max_length": 48,
        "n_layer": 1, "n_embd": 16, "n_head": 2, "epochs": 1, "batch_size": 4, "pretrain": 0,
        "device": "cpu", "methods": "random,ngram,text,text_prompt", "reference": "text",
    }  # fmt: skip
    command = ["lds", *(str(x) for name, value in settings.items() for x in (f"--{name}", value))]
    assert main(command) == 0
    shown_once = capsys.readouterr().out
    assert f"{experiment}: 12 documents, 2 queries with" in shown_once
    results = json.loads((tmp_path / f"out/{experiment}.json").read_text())
    assert set(results["methods"]) == set(settings["methods"].split(","))
    assert results["loss_before"] is None
    assert 0 < results["loss_after"] < 20
    model = (tmp_path / "out/model/model.safetensors").stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out == shown_once
    assert (tmp_path / "out/model/model.safetensors").stat().st_mtime_ns == model
