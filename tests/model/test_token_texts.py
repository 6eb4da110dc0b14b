"""Tokens' pieces of the text, for tokenizers of several kinds."""

import numpy as np
import pytest
from helpers.corpora import words
from helpers.models import make_tokenizer
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from gradproj.corpus.content import Completion, Preference, Text, TokenIds
from gradproj.model.document_tokens import DocumentRules, DocumentTokenizer

TEXTS = [
    "  the of  and\n\tto in ",
    "naïve café 日本語 \U0001f469\u200d\U0001f469\u200d\U0001f467 the",
    "THE\u202eof\x00and\r\n</script> &amp; ½",
    words(30, 3),
]


def byte_level(folder):
    return make_tokenizer(folder)


def trimming(folder):
    """A byte-level BPE whose offsets leave blanks out, and that puts ``<s>`` and ``</s>``."""
    fast = make_tokenizer(folder)
    inner = fast.backend_tokenizer
    inner.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


def sentence_pieces(folder):
    """Like that of Llama: a blank before the text, bytes where no piece fits."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    inner.train_from_iterator([words(500, 1)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def word_pieces(folder):
    """Like that of BERT: lower case, blanks in no token, unknown words in one."""
    inner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]", "<s>", "</s>"], show_progress=False
    )
    inner.train_from_iterator([words(500, 1)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="[UNK]"
    )


KINDS = [byte_level, trimming, sentence_pieces, word_pieces]


def tokenizer_of(tokenizer, special="tokenizer", max_length=0, long_documents="truncate", **rules):
    rules = DocumentRules(**rules)
    return DocumentTokenizer(tokenizer, special, rules, max_length, long_documents)


@pytest.mark.parametrize("special", ["tokenizer", "bos_eos"])
@pytest.mark.parametrize("kind", KINDS)
def test_pieces_one_after_the_other_are_the_text(kind, special, tmp_path):
    tokenizer = kind(tmp_path)
    documents = tokenizer_of(tokenizer, special)
    for text in TEXTS:
        made, texts = documents.with_texts(Text(text), 1.0)
        (plain,) = documents.sequences([Text(text)], [1.0])
        (sequence,) = made.sequences
        assert (sequence.ids == plain.sequences[0].ids).all()
        assert (sequence.places == np.arange(len(sequence))).all()
        assert len(texts) == len(sequence)
        end = 0
        for token, token_id in zip(texts, sequence.ids.tolist(), strict=True):
            assert token.start == end
            assert token.piece == text[token.start : token.end]
            assert token.name == tokenizer.convert_ids_to_tokens(token_id)
            end = token.end
        assert not text[end:].strip(" \n\t\r\x00\u200d\u202e")
        if special == "bos_eos":
            assert [texts[n].piece for n in (0, -1)] == ["", ""]


@pytest.mark.parametrize("kind", KINDS)
def test_words_that_are_one_token_have_their_own_characters(kind, tmp_path):
    tokenizer = kind(tmp_path)
    text = words(12, 4)
    _, texts = tokenizer_of(tokenizer).with_texts(Text(text), 1.0)
    for token in texts:
        name = token.name.strip("Ġ▁").removeprefix("##")
        assert token.piece.strip() in (name, "")


def test_windows_and_cuts_keep_the_places_of_their_tokens(tmp_path):
    tokenizer, text = make_tokenizer(tmp_path), words(30, 5)
    ids = tokenizer(text).input_ids
    for settings, places in (
        ({"long_documents": "windows"}, [range(k, min(k + 8, len(ids))) for k in (0, 7, 14)]),
        ({}, [range(8)]),
        ({"truncate_side": "left"}, [range(len(ids) - 8, len(ids))]),
        ({"truncate_side": "left", "special": "bos"}, [[0, *range(len(ids) - 6, len(ids) + 1)]]),
    ):
        documents = tokenizer_of(tokenizer, max_length=8, **settings)
        made, texts = documents.with_texts(Text(text), 1.0)
        for sequence, want in zip(made.sequences, places, strict=False):
            assert sequence.places.tolist() == list(want)
            names = tokenizer.convert_ids_to_tokens(sequence.ids.tolist())
            assert [texts[place].name for place in sequence.places] == names


def test_long_text_is_tokenized_no_further_than_its_row_goes(tmp_path):
    text = words(30, 5) + " the of" * 10_000
    made, texts = tokenizer_of(make_tokenizer(tmp_path), max_length=8).with_texts(Text(text), 1.0)
    assert len(texts) == 8
    assert "".join(token.piece for token in texts) == text[: texts[-1].end]
    assert len(made.sequences[0]) == 8


def test_answers_of_a_preference_are_texts_of_their_own(tmp_path):
    pair = Preference(Completion("the of ", "and"), Completion("the of ", "to in"))
    made, texts = tokenizer_of(make_tokenizer(tmp_path)).with_texts(pair, 1.0)
    for name, text in (("chosen", "the of and"), ("rejected", "the of to in")):
        pieces = [token for token in texts if token.answer == name]
        assert "".join(token.piece for token in pieces) == text
        assert pieces[0].start == 0
    places = np.concatenate([sequence.places for sequence in made.sequences])
    assert places.tolist() == list(range(len(texts)))


def test_token_ids_without_a_text_and_slow_tokenizers_have_decoded_pieces(tmp_path, monkeypatch):
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer(" the of and").input_ids
    _, texts = tokenizer_of(tokenizer).with_texts(TokenIds(ids), 1.0)
    assert "".join(token.piece for token in texts) == " the of and"
    assert {(token.start, token.end) for token in texts} == {(None, None)}
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    _, texts = tokenizer_of(tokenizer).with_texts(Text(" the of and"), 1.0)
    assert "".join(token.piece for token in texts) == " the of and"
    assert {token.start for token in texts} == {None}
