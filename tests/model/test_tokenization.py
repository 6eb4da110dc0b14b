"""The first tokens of a long document equal those of the whole; special tokens are added."""

import numpy as np
import pytest
from helpers.corpora import words
from helpers.models import make_tokenizer
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from gradproj.model.long_words import longest_token, settled_ids
from gradproj.model.tokenization import Tokenizing


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


TEXTS = [
    words(5000, 1),
    words(3, 2),
    "x" * 9000,
    "x" * 1500 + " " + words(3000, 3),
    words(20, 4) + " " + "y" * 9000,
    " \n\t" * 3000,
    "\u4e2d\u6587" * 3000,
    words(30, 5) + "\u2028\u00e9\u0301" * 2000,
    "",
    "</s>" + words(4000, 6),
]


@pytest.mark.parametrize("special", ["tokenizer", "none", "bos", "bos_eos"])
@pytest.mark.parametrize("most", [4, 16, 100])
def test_first_tokens_are_those_of_the_whole_document(tokenizer, special, most):
    for text, got in zip(TEXTS, Tokenizing(tokenizer, special, most).ids(TEXTS), strict=True):
        whole = tokenizer(text, add_special_tokens=special == "tokenizer").input_ids
        want = [*([0] if "bos" in special else []), *whole, *([1] if "eos" in special else [])]
        assert got[:most].tolist() == want[:most]


def test_only_the_beginning_of_a_long_document_is_tokenized(tokenizer, monkeypatch):
    seen = []
    encode = Tokenizing._encode
    monkeypatch.setattr(
        Tokenizing, "_encode", lambda self, texts: seen.extend(texts) or encode(self, texts)
    )
    Tokenizing(tokenizer, "none", 16).ids([words(5000, 1)])
    assert [len(text) for text in seen] == [12 * 16]


ALPHABETS = ["x", "ab", "theof", "0123456789", "the of and to", "a\u00e9\u4e2d"]


@pytest.mark.parametrize("special", ["tokenizer", "bos"])
@pytest.mark.parametrize("seed", range(6))
def test_a_word_of_any_length_is_tokenized_by_its_beginning(tokenizer, monkeypatch, special, seed):
    random, most = np.random.default_rng(seed), 8
    alphabet = list(ALPHABETS[seed])
    texts = ["".join(random.choice(alphabet, n)).replace(" ", "") for n in (5000, 9000, 30000)]
    texts = ["a word " * random.integers(0, 3) + text for text in texts for _ in range(4)]
    whole = [tokenizer(text).input_ids for text in texts]
    seen, encode = [], Tokenizing._encode
    monkeypatch.setattr(
        Tokenizing, "_encode", lambda self, texts: seen.extend(texts) or encode(self, texts)
    )
    for want, got in zip(whole, Tokenizing(tokenizer, special, most).ids(texts), strict=True):
        assert got[:most].tolist() == [*([0] if special == "bos" else []), *want][:most]
    is_ascii = ALPHABETS[seed].isascii()  # else a token may end within a character
    assert (max(map(len, seen)) == 2 * 12 * most) == is_ascii


@pytest.mark.parametrize("change", [{"dropout": 0.1}, {"end_of_word_suffix": "</w>"}, {}])
def test_long_words_of_other_rules_are_tokenized_whole(change):
    vocabulary = {"a": 0, "b": 1, "ab": 2, "</w>": 3, "a</w>": 4}
    backend = Tokenizer(models.BPE(vocabulary, [("a", "b")], **change))
    backend.normalizer = None if change else normalizers.NFC()
    assert longest_token(PreTrainedTokenizerFast(tokenizer_object=backend)) == 0


def made_by_pieces(kind):
    pieces = {"<unk>": 0, "a": 1, "ab": 2, "##ab": 3}
    if kind == "WordPiece":
        return models.WordPiece(pieces, unk_token="<unk>", max_input_chars_per_word=10**6)
    if kind == "WordLevel":
        return models.WordLevel(pieces, unk_token="<unk>")
    return models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ab", -2.0)], unk_id=0)


@pytest.mark.parametrize("kind", ["Unigram", "WordPiece", "WordLevel"])
def test_long_words_of_models_without_merges_are_tokenized_whole(kind):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(made_by_pieces(kind)))
    text = "ab" * 1000
    (got,) = Tokenizing(tokenizer, "none", 4).ids([text])
    assert got.tolist() == tokenizer(text).input_ids


@pytest.mark.parametrize(("every", "is_settled"), [(1, True), (7, False)])
def test_tokens_that_depend_on_where_a_word_is_cut_are_not_taken(tokenizer, every, is_settled):
    def encode(texts):
        texts = [text.replace("x", "xy"[len(text) % every > 0]) for text in texts]
        return tokenizer(texts).encodings

    found = settled_ids(encode, "x" * 500, limit=96, n=8, longest=20)
    assert (found is not None) == is_settled


def test_without_a_limit_the_whole_document_is_tokenized(tokenizer):
    text = words(5000, 1)
    (got,) = Tokenizing(tokenizer, "none").ids([text])
    np.testing.assert_array_equal(got, tokenizer(text).input_ids)


def test_tokenizer_without_words_tokenizes_the_whole_document():
    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "aba": 3}, [("a", "b"), ("ab", "a")]))
    backend.normalizer = normalizers.Replace(" ", "")
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    text = "ab " * 500
    (got,) = Tokenizing(fast, "none", 5).ids([text])
    assert got.tolist() == fast(text).input_ids
