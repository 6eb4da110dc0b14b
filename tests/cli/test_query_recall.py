"""A verbatim excerpt of 64 tokens finds its document with a trained model."""

import numpy as np
import pytest
from helpers.corpora import make_corpus, words
from helpers.jobs import run_job
from helpers.models import make_tokenizer
from helpers.query_command import ask, write_queries

from gradproj.training import TrainConfig, train

assert ask

N_DOCUMENTS, N_EXCERPTS, MAX_LENGTH = 60, 40, 160
SHAPE = {"n_layer": 2, "n_embd": 48, "n_head": 2, "max_length": MAX_LENGTH, "batch_size": 6}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Train for two seconds, project the same documents, and cut excerpts from them."""
    folder = tmp_path_factory.mktemp("finds")
    texts = [words(100, 500 + i) for i in range(N_DOCUMENTS)]
    make_corpus(folder / "tars", [{"text": text} for text in texts])
    tokenizer = make_tokenizer(folder / "tok")
    paths = {
        "shards": str(folder / "tars"),
        "tokenizer": str(folder / "tok"),
        "result_dir": str(folder / "model"),
    }
    optimizer_flags = {
        "max_steps": 60,
        "learning_rate": 0.005,
        "device": "cpu",
        "checkpoint_interval": 0,
    }
    train(TrainConfig(**paths, **SHAPE, **optimizer_flags))
    run_job(shards=folder / "tars", model=folder / "model", output_dir=folder / "out")
    generator = np.random.default_rng(0)
    excerpts = []
    for number in range(N_EXCERPTS):
        owner = int(generator.integers(N_DOCUMENTS))
        covered = tokenizer(texts[owner]).input_ids[:MAX_LENGTH]
        start = int(generator.integers(len(covered) - 64 + 1))
        text = tokenizer.decode(covered[start : start + 64])
        excerpts.append({"id": f"{number}:{owner}", "text": text})
    return folder / "out", write_queries(folder / "q.jsonl", *excerpts)


@pytest.mark.parametrize("score", ["kfac", "preconditioned", "relatif"])
def test_excerpt_ranks_its_document_first(made, ask, score):
    output, queries = made
    answers = ask.objects(
        output, "--queries", queries, "--score", score, "--top_k", 10, "--bottom_k", 0
    )
    rank = {}
    for x in answers:
        if x["id"] == int(x["query"].split(":")[1]):
            rank[x["query"]] = x["rank"]
    assert len(rank) == N_EXCERPTS  # all among the first ten
    assert np.mean([r == 1 for r in rank.values()]) >= 0.9
