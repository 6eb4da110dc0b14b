"""Documents tokenized ahead have the tokens and targets that the job would make of their texts."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.chat import TEMPLATES, chat_tokenizer, conversation
from helpers.corpora import run_prepare, words, write_jsonl
from helpers.models import make_model
from helpers.token_corpora import write_megatron

from gradproj.corpus.content import Preference, TokenIds
from gradproj.corpus.index_file import load_index, open_corpus, save_index
from gradproj.corpus.stream import read_documents
from gradproj.corpus.tokenization import write_tokenization
from gradproj.errors import ConfigError, CorpusError
from gradproj.model.ahead_config import AheadConfig
from gradproj.model.document_tokens import DocumentRules, DocumentTokenizer
from gradproj.model.fingerprint import check_corpus_tokenizer
from gradproj.model.tokenize_ahead import TokenizeAhead
from gradproj.training import TrainConfig, train

DOCUMENTS = [
    {"text": words(40, 1), "meta": {"pile_set_name": "d", "url": "u"}},
    {"text": ""},
    {"text": "x"},
    {"text": words(10, 2), "weight": -2.5},
    {"prompt": "What is it? ", "completion": "It is " + words(30, 3)},
    {"messages": conversation("Hi", "Ho " + words(9, 4), "And", "Bye")},
    {"prompt": "p", "chosen": "yes", "rejected": "no"},
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    chat_tokenizer("qwen", folder, adds_bos=True)
    return str(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Return a file of documents, and the documents in the tars that are made of their texts."""
    folder = tmp_path_factory.mktemp("texts")
    name = write_jsonl(folder / "in.jsonl", DOCUMENTS)
    run_prepare(name, folder / "tars")
    return name, documents_of(folder / "tars")


def documents_of(tars):
    index = open_corpus(str(tars), progress=False)
    return list(read_documents(index, 0, index.n_samples))


def ahead(folder, n_bytes=0, **settings):
    return TokenizeAhead(AheadConfig(tokenizer=folder, **settings), n_bytes)


def shown(documents, tokenizer, special_tokens, rules, *cut):
    """Return the sequences that a job makes of documents."""
    tokens = DocumentTokenizer(tokenizer, special_tokens, rules, *cut)
    made = tokens.sequences([d.content for d in documents], [d.weight for d in documents])
    return [
        [(s.ids.tolist(), s.is_target.tolist(), s.factor) for s in document.sequences]
        for document in made
    ]


@pytest.mark.parametrize("special_tokens", ["tokenizer", "none", "bos_eos"])
@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_job_reads_the_sequences_that_it_would_make_of_the_texts(
    special_tokens, loss_on, folder, texts, tmp_path
):
    name, of_texts = texts
    tokenizer = ahead(folder, special_tokens=special_tokens, loss_on=loss_on)
    run_prepare(name, tmp_path / "out", tokenizer=tokenizer)
    of_tokens = documents_of(tmp_path / "out")
    kinds = {type(d.content) for d in of_tokens}
    assert kinds == {TokenIds, Preference}
    assert [(d.domain, d.weight, d.problem) for d in of_tokens] == [
        (d.domain, d.weight, d.problem) for d in of_texts
    ]
    assert [d.content.is_empty() for d in of_tokens] == [d.content.is_empty() for d in of_texts]
    for cut in ((1000, "truncate"), (7, "truncate"), (7, "windows")):
        for side in ("left", "right"):
            rules = DocumentRules(loss_on=loss_on, truncate_side=side)
            settings = chat_tokenizer("qwen", adds_bos=True), special_tokens, rules, *cut
            want, got = shown(of_texts, *settings), shown(of_tokens, *settings)
            assert got[1] == []  # the empty text, which the job does not tokenize
            assert got[2:] == want[2:]
            assert got[0] == want[0]


def test_bytes_do_not_depend_on_the_number_of_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("gradproj.corpus.prepare.TOKENIZED_AT_ONCE", 3)
    name = write_jsonl(
        tmp_path / "in.jsonl", DOCUMENTS * 4 + [{"text": "no \ud800"}, {"text": "a"}]
    )
    for n in (1, 2):
        tokenizer = ahead(folder, processes=n)
        out = tmp_path / f"out{n}"
        report = run_prepare(name, out, tokenizer=tokenizer, on_bad_input="skip")
        assert (report.n_samples, report.n_bad) == (33, 1)
    for path in (tmp_path / "out1").iterdir():
        assert path.read_bytes() == (tmp_path / "out2" / path.name).read_bytes()


def test_worker_that_ends_is_an_error_that_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("gradproj.model.tokenize_ahead._WORKER", "import sys; sys.exit(3)")
    name = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    with pytest.raises(CorpusError, match=r"ended \(exit code 3\).*Give fewer --processes"):
        run_prepare(name, tmp_path / "out", tokenizer=ahead(folder, processes=2))
    assert not (tmp_path / "out").exists()


def test_one_process_tokenizes_what_is_small(folder):
    assert ahead(folder, n_bytes=1000).n_processes == 1
    assert ahead(folder, n_bytes=1000, processes=3).n_processes == 3


def test_documents_that_cannot_be_tokenized_are_bad_records(folder, tmp_path):
    plain = tmp_path / "plain"
    chat_tokenizer(None, plain)
    name = write_jsonl(tmp_path / "in.jsonl", DOCUMENTS)
    with pytest.raises(CorpusError, match=r"in\.jsonl, line 6: .*no chat template"):
        run_prepare(name, tmp_path / "out", tokenizer=ahead(str(plain)))
    write_megatron(tmp_path / "x", [[1], [1000]], [0, 1, 2])
    with pytest.raises(CorpusError, match=r"x\.bin, document 2: token id 1000; the model has"):
        run_prepare(str(tmp_path / "x.bin"), tmp_path / "out", tokenizer=ahead(folder))


# ---- The tokenizer's fingerprint


def test_index_keeps_the_rules_and_a_run_with_others_is_refused(folder, tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [{"text": "a b"}])
    tokenizer = ahead(folder, special_tokens="bos")
    run_prepare(name, tmp_path / "out", tokenizer=tokenizer)
    index = open_corpus(str(tmp_path / "out"), progress=False)
    assert index.tokenization == tokenizer.tokenization
    # The index keeps them when the file is gone, and its fingerprint depends on them.
    save_index(index, tmp_path / "out/corpus.json")
    (tmp_path / "out/tokens.json").unlink()
    assert load_index(tmp_path / "out/corpus.json") == index
    (tmp_path / "out/corpus.json").unlink()
    bare = open_corpus(str(tmp_path / "out"), progress=False)
    assert bare.tokenization is None
    assert bare.fingerprint != index.fingerprint
    own, other = chat_tokenizer("qwen", adds_bos=True), chat_tokenizer("qwen")
    for corpus, tokenizer in ((index.tokenization, own), (None, other)):
        check_corpus_tokenizer(corpus, tokenizer, DocumentRules(), "bos")
        check_corpus_tokenizer(corpus, tokenizer, DocumentRules())  # train has no --special_tokens
        check_corpus_tokenizer(corpus, tokenizer)  # lds has no rules
    with pytest.raises(ConfigError, match="tokenized ahead"):
        check_corpus_tokenizer(index.tokenization, other)
    with pytest.raises(ConfigError) as caught:
        check_corpus_tokenizer(index.tokenization, other, DocumentRules(loss_on="all"), "tokenizer")
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"--shards: this corpus was tokenized ahead, by {folder}, and not")
    assert [line.split(":")[0] for line in lines[1:-1]] == [
        "  --tokenizer", "  --special_tokens", "  --loss_on",
    ]  # fmt: skip


def test_corpus_is_refused_to_a_tokenizer_whose_chat_template_is_another(folder, tmp_path):
    (tmp_path / "kept.jinja").write_text(TEMPLATES["qwen"])
    corpus, other = ahead(folder).tokenization, chat_tokenizer("llama3", adds_bos=True)
    kept = DocumentRules(chat_template=str(tmp_path / "kept.jinja"))
    check_corpus_tokenizer(corpus, other, kept)
    with pytest.raises(ConfigError, match="--chat_template: corpus '"):
        check_corpus_tokenizer(corpus, other, DocumentRules())
    # It had none, and so has no conversation.
    check_corpus_tokenizer(dataclasses.replace(corpus, chat_template=""), other, DocumentRules())


def test_training_by_other_rules_than_those_of_the_corpus_is_refused(folder, tmp_path):
    name = write_jsonl(tmp_path / "in.jsonl", [{"text": "a b"}])
    run_prepare(name, tmp_path / "out", tokenizer=ahead(folder))
    make_model(tmp_path / "model", vocab_size=400)
    chat_tokenizer("qwen", tmp_path / "model", adds_bos=True)
    config = TrainConfig(
        shards=str(tmp_path / "out"), model=str(tmp_path / "model"), loss_on="last", max_steps=1,
        max_length=32, result_dir=str(tmp_path / "result"),
    )  # fmt: skip
    with pytest.raises(ConfigError, match="--loss_on: corpus 'assistant', this run 'last'"):
        train(config)


def test_tars_of_different_tokenizers_are_no_corpus(folder, tmp_path):
    rules = ahead(folder).tokenization
    name = write_jsonl(tmp_path / "in.jsonl", [{"text": "a b"}])
    for part in ("a", "b"):
        run_prepare(name, tmp_path / part)
    write_tokenization(tmp_path / "a", rules)
    assert open_corpus(f"{tmp_path}/*/*.tar", progress=False).tokenization == rules
    write_tokenization(tmp_path / "b", dataclasses.replace(rules, special_tokens="none"))
    with pytest.raises(CorpusError, match="name different tokenizers or rules"):
        open_corpus(f"{tmp_path}/*/*.tar", progress=False)
    (tmp_path / "b/tokens.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(CorpusError, match=r"tokens\.json: not the file that prepare --tokenizer"):
        open_corpus(f"{tmp_path}/*/*.tar", progress=False)


def test_rules_without_a_tokenizer_are_refused():
    with pytest.raises(ConfigError, match="--loss_on is for documents tokenized ahead"):
        AheadConfig(loss_on="all")


def test_labels_are_written_only_where_they_say_something(folder, texts, tmp_path):
    run_prepare(texts[0], tmp_path / "out", tokenizer=ahead(folder))
    documents = documents_of(tmp_path / "out")
    assert [d.content.labels is None for d in documents[:6]] == [True] * 4 + [False] * 2
    labels = np.asarray(documents[4].content.labels)
    ids = np.asarray(documents[4].content.ids)
    assert ((labels == -100) | (labels == ids)).all()
    assert 0 < (labels == -100).sum() < len(ids)
