"""Documents to sequences: which tokens are targets, with which factor, in every form."""

import numpy as np
import pytest
from helpers.chat import TEMPLATES, chat_tokenizer, conversation, parts_of, tokens_of
from helpers.corpora import words

from gradproj.corpus.content import Completion, Conversation, Preference, Text, TokenIds
from gradproj.model.chat import NO_TEMPLATE
from gradproj.model.document_tokens import DocumentRules, DocumentTokenizer

USER, ANSWER = words(5, 1), words(6, 2)
CHAT = Conversation(conversation(USER, ANSWER, USER, words(3, 3)))


def tokenized(contents, tokenizer, special="none", max_length=1000, long="truncate", **rules):
    made = DocumentTokenizer(tokenizer, special, DocumentRules(**rules), max_length, long, 400)
    weights = [1.0] * len(contents)
    return made.sequences(contents, weights)


def one(content, tokenizer, **settings):
    (document,) = tokenized([content], tokenizer, **settings)
    assert not document.problem
    (sequence,) = document.sequences
    return sequence.ids.tolist(), sequence.is_target.tolist()


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("family", TEMPLATES)
def test_chat_has_one_bos_and_the_assistants_turns_as_targets(family, adds_bos):
    tokenizer = chat_tokenizer(family, adds_bos=adds_bos)
    ids, mask = tokens_of(tokenizer, parts_of(family, CHAT.messages))
    if adds_bos and family != "llama3":
        ids, mask = [tokenizer.bos_token_id, *ids], [False, *mask]
    assert one(CHAT, tokenizer, special="tokenizer") == (ids, mask)
    assert ids.count(tokenizer.bos_token_id) == (adds_bos or family == "llama3")


def test_special_tokens_bos_gives_a_chat_one_and_no_eos():
    tokenizer = chat_tokenizer("qwen")
    plain, _ = one(CHAT, tokenizer)
    assert one(CHAT, tokenizer, special="bos_eos")[0] == [tokenizer.bos_token_id, *plain]


def test_loss_on_all_is_every_token_but_the_first():
    tokenizer = chat_tokenizer("qwen")
    for content in (CHAT, Completion(USER, " " + ANSWER)):
        ids, mask = one(content, tokenizer, loss_on="all")
        assert mask == [False] + [True] * (len(ids) - 1)


@pytest.mark.parametrize("cut", range(1, 12))
def test_completion_begins_with_the_token_that_has_its_first_character(cut):
    tokenizer = chat_tokenizer()
    prompt, completion = ANSWER[:cut], ANSWER[cut:]
    ids, mask = one(Completion(prompt, completion), tokenizer, special="bos_eos")
    whole = tokenizer(ANSWER).input_ids
    assert ids == [0, *whole, 1]
    ends = np.cumsum([len(tokenizer.decode([i])) for i in whole])
    assert mask == [False] + [bool(end > cut) for end in ends] + [True]


def test_spaces_of_a_completion_are_targets():
    tokenizer = chat_tokenizer()
    ids, mask = one(Completion("the", "  \n\n  of"), tokenizer)
    start = len(tokenizer("the").input_ids)
    assert mask == [i >= start for i in range(len(ids))]


@pytest.mark.parametrize(
    "content",
    [
        Completion(USER, ""),
        Conversation(conversation(USER)),
        Conversation(conversation(USER, ANSWER), None, 2),
        TokenIds([5, 6, 7], [-100] * 3),
        TokenIds([5, 6, 7], [5, -100, -100]),
        TokenIds([5]),
        Preference(Completion(USER, ""), Completion(USER, ANSWER)),
        Preference(Completion(USER, ANSWER), Completion(USER * 500, ANSWER)),
        Completion(USER * 500, ANSWER),
    ],
)
def test_document_without_a_target_has_no_sequence(content):
    (document,) = tokenized([content], chat_tokenizer("qwen"), special="bos_eos", max_length=64)
    assert (document.sequences, document.problem, document.n_targets) == ([], "", 0)


def test_labels_are_targets_at_their_own_places():
    tokenizer = chat_tokenizer()
    got = one(TokenIds([5, 6, 7, 8], [5, -100, 7, -100]), tokenizer, special="bos_eos")
    assert got == ([5, 6, 7, 8], [False, False, True, False])


def test_left_side_cut_keeps_the_end():
    tokenizer = chat_tokenizer("qwen")
    ids, mask = one(CHAT, tokenizer)
    got = one(CHAT, tokenizer, max_length=20, truncate_side="left")
    assert got == (ids[-20:], [False, *mask[-19:]])
    text = Text(words(200, 1))
    assert (
        one(text, tokenizer, max_length=20, truncate_side="left")[0]
        == (tokenizer(text.text).input_ids[-20:])
    )


def test_windows_have_every_target_once_and_those_without_one_are_left_out():
    tokenizer = chat_tokenizer()
    (document,) = tokenized(
        [Completion(words(40, 1), " " + words(30, 2))], tokenizer, max_length=16, long="windows"
    )
    ids, mask = one(Completion(words(40, 1), " " + words(30, 2)), tokenizer)
    windows = [
        (ids[i : i + 16], [False, *mask[i + 1 : i + 16]]) for i in range(0, len(ids) - 1, 15)
    ]
    want = [window for window in windows if any(window[1])]
    got = [(s.ids.tolist(), s.is_target.tolist()) for s in document.sequences]
    assert got == want
    assert len(want) < len(windows)
    assert document.n_targets == sum(mask)


def test_preference_is_two_sequences_with_opposite_factors_of_half_beta():
    tokenizer = chat_tokenizer()
    content = Preference(Completion(USER, " " + ANSWER), Completion(USER, " no"))
    made = DocumentTokenizer(tokenizer, "none", DocumentRules(preference_beta=0.4), 100)
    (document,) = made.sequences([content], [-3.0])
    apart = [one(side, tokenizer) for side in (content.chosen, content.rejected)]
    assert [(s.ids.tolist(), s.is_target.tolist()) for s in document.sequences] == apart
    assert [s.factor for s in document.sequences] == pytest.approx([-0.6, 0.6])
    (nothing,) = made.sequences([Preference(content.chosen, content.chosen)], [1.0])
    assert [s.factor for s in nothing.sequences] == [0.0, 0.0]


@pytest.mark.parametrize("long", ["truncate", "windows"])
def test_answers_that_differ_in_what_is_cut_off_alone_have_a_zero_row(long):
    """Their gradients cancel but for rounding, which a score by the cosine would rank."""
    content = Preference(Completion("", f"{USER * 3} yes"), Completion("", f"{USER * 3} no"))
    (document,) = tokenized([content], chat_tokenizer(), max_length=16, long=long)
    are_zero = [sequence.factor == 0 for sequence in document.sequences]
    assert are_zero == [long == "truncate"] * len(are_zero)
    assert document.n_targets


@pytest.mark.parametrize("side", ["right", "left"])
def test_cut_document_does_not_keep_its_other_tokens_in_memory(side):
    (document,) = tokenized(
        [TokenIds(np.arange(100_000) % 400)], chat_tokenizer(), max_length=16, truncate_side=side
    )
    (sequence,) = document.sequences
    assert sequence.ids.base is None or sequence.ids.base.nbytes < 1000


def test_documents_together_are_as_documents_alone():
    tokenizer = chat_tokenizer("llama3", adds_bos=True)
    contents = [
        Text(USER), CHAT, Completion(USER, ANSWER), TokenIds([1, 2]), Text(""),
        Preference(Completion("", USER), Completion("", ANSWER)), Conversation([]),
    ]  # fmt: skip
    together = tokenized(contents, tokenizer, special="tokenizer")
    for content, got in zip(contents, together, strict=True):
        (alone,) = tokenized([content], tokenizer, special="tokenizer")
        assert got.problem == alone.problem
        for a, b in zip(got.sequences, alone.sequences, strict=True):
            np.testing.assert_array_equal(a.ids, b.ids)
            np.testing.assert_array_equal(a.is_target, b.is_target)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (CHAT, NO_TEMPLATE),
        (TokenIds([5, 400]), "token id 400; the model has ids from 0 to 399"),
        (Preference(CHAT, CHAT), NO_TEMPLATE),
    ],
)
def test_document_that_has_no_tokens_says_why(content, words):
    (document, fine) = tokenized([content, Text(USER)], chat_tokenizer())
    assert (document.problem, document.sequences) == (words, [])
    assert fine.sequences
