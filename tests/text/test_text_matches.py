"""Common passages against lists of tokens, and as ``query`` shows them."""

import numpy as np
import pytest
from helpers.query_command import ask
from helpers.text import job_tokens, ngrams
from transformers import AutoTokenizer

from gradproj.text.loops import distinct_hashes
from gradproj.text.matches import common_passages
from gradproj.text.ngrams import Documents
from gradproj.text.scores import QueryText

assert ask


class Counted:
    """Exact document frequencies of lists of tokens."""

    def __init__(self, documents):
        self.n_documents, self.counted = len(documents), {}
        for document in documents:
            joined = Documents.of([document])
            for value in distinct_hashes(joined.tokens, joined.ends).tolist():
                self.counted[value] = self.counted.get(value, 0) + 1

    def counts(self, hashes):
        return np.array([self.counted.get(value, 0) for value in hashes.tolist()], np.int64)


def has(tokens, run):
    return any(tokens[i : i + len(run)] == run for i in range(len(tokens) - len(run) + 1))


def frequency(ngram, documents):
    return sum(ngram in ngrams(document) for document in documents)


def test_passage_that_comes_several_times_is_shown_once():
    document = np.array([5, 6, 1, 5, 6, 2, 5, 6, 7])
    passages = common_passages(QueryText(np.array([5, 6, 9, 7])), document, Counted([document]))
    assert sorted(passage.tokens.tolist() for passage in passages) == [[5, 6], [7]]


@pytest.mark.parametrize("seed", range(8))
def test_passages_are_common_runs_rarest_first(seed):
    random = np.random.default_rng(seed)
    documents = [random.integers(0, 12, random.integers(3, 40)) for _ in range(12)]
    query = np.concatenate([documents[3][2:9], random.integers(0, 12, 6), documents[5][:4]])
    lists = [document.tolist() for document in documents]
    for document, tokens in zip(documents, lists, strict=True):
        passages = common_passages(QueryText(query), document, Counted(documents), most=4)
        shared = [ngram for ngram in ngrams(query.tolist()) if ngram in ngrams(tokens)]
        assert bool(passages) == bool(shared)
        if not shared:
            continue
        assert passages[0].n_documents == min(frequency(ngram, lists) for ngram in shared)
        counts = [passage.n_documents for passage in passages]
        assert counts == sorted(counts)
        assert sum(len(passage.tokens) for passage in passages) <= len(tokens)
        for passage in passages:
            run = passage.tokens.tolist()
            assert has(tokens, run)
            assert has(query.tolist(), run)
            assert passage.n_documents == min(frequency(ngram, lists) for ngram in ngrams(run))


def test_single_tokens_come_last_however_rare():
    query, document = np.array([5, 6, 9, 7]), np.array([7, 1, 5, 6])
    counted = Counted([document, np.array([5, 6])])
    assert counted.counts(np.unique(QueryText(np.array([7])).hashes())) == [1]
    passages = common_passages(QueryText(query), document, counted)
    assert [passage.tokens.tolist() for passage in passages] == [[5, 6], [7]]


def test_copied_passage_is_one_run_and_a_prompt_is_left_out():
    random = np.random.default_rng(0)
    document = random.permutation(1000)[:50]
    query = np.concatenate([random.integers(1000, 2000, 5), document[10:30]])
    (passage,) = common_passages(QueryText(query), document, Counted([document]))
    np.testing.assert_array_equal(passage.tokens, document[10:30])
    of_completion = QueryText(query, np.arange(len(query)) >= 15)
    (passage,) = common_passages(of_completion, document, Counted([document]), most=1)
    assert 10 <= len(passage.tokens) <= 13
    np.testing.assert_array_equal(passage.tokens[-10:], document[20:30])


def test_query_shows_what_each_document_shares(ask, job):
    tokens, tokenizer = job_tokens(job), AutoTokenizer.from_pretrained(job.model)
    asked = tokenizer.decode(tokens[30][:8])
    words = "--text", asked, "--text_matches", "--score", "cosine", "--top_k", 5, "--bottom_k", 0
    lines = ask.objects(job.output, *words)
    assert len(lines) == 5
    query = tokenizer(asked).input_ids
    for line in lines:
        held = ngrams(tokens[line["id"]])
        shared = [ngram for ngram in ngrams(query) if ngram in held]
        rarest = min(frequency(ngram, tokens.values()) for ngram in shared)
        assert line["text_matches"][0]["documents"] == rarest
        text = tokenizer.decode(tokens[line["id"]])
        assert all(match["text"] in text for match in line["text_matches"])
        assert all(1 <= match["tokens"] <= len(query) for match in line["text_matches"])
    shown = [line.strip() for line in ask(job.output, *words)[0] if "shares" in line]
    assert len(shown) == 5
    assert shown[0].startswith("shares")
    assert f"({lines[0]['text_matches'][0]['documents']})" in shown[0]
