"""Chat templates: the text of transformers, and the characters of the assistant's turns."""

import re
from datetime import datetime

import pytest
from helpers.chat import QWEN_3, SMOLLM_3, TEMPLATES, chat_tokenizer, conversation

from gradproj.errors import ConfigError
from gradproj.model.chat import MAX_UNMARKED_TURNS, ChatTemplate, TurnError, chat_template

MESSAGES = conversation("Hello there", "Hi!", "And now?", " Bye, then. ", system="Be brief.")
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
WITH_TOOL = [
    {"role": "user", "content": "1 + 2?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "3."},
]
ASSISTANTS = [i for i, message in enumerate(MESSAGES) if message["role"] == "assistant"]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def template_of(source):
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, "the test")


def turns(source, messages=MESSAGES, loss_on="assistant", n_prompt=0, tools=None):
    text, spans = template_of(source).render(messages, tools, n_prompt, loss_on)
    return [text[start:stop] for start, stop in spans]


@pytest.mark.parametrize("family", TEMPLATES)
def test_text_is_that_of_transformers(family):
    tokenizer = chat_tokenizer(family)
    got, _ = template_of(tokenizer.chat_template).render(MESSAGES, None, 0, "assistant")
    assert got == tokenizer.apply_chat_template(MESSAGES, tokenize=False)


def test_text_with_tools_is_that_of_transformers():
    tokenizer = chat_tokenizer("qwen")
    got, spans = template_of(tokenizer.chat_template).render(WITH_TOOL, TOOLS, 0, "assistant")
    assert got == tokenizer.apply_chat_template(WITH_TOOL, tools=TOOLS, tokenize=False)
    call = '\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert [got[a:b] for a, b in spans] == [f"{call[1:]}<|im_end|>\n", "3.<|im_end|>\n"]


def test_marked_characters_are_those_of_transformers():
    tokenizer = chat_tokenizer("smollm3")
    text, spans = template_of(SMOLLM_3).render(MESSAGES, None, 0, "assistant")
    encoded = tokenizer.apply_chat_template(
        MESSAGES, return_dict=True, return_assistant_tokens_mask=True
    )
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    inside = [any(a <= start and end <= b for a, b in spans) for start, end in offsets]
    assert inside == [bool(x) for x in encoded["assistant_masks"]]


@pytest.mark.parametrize(
    ("family", "want"),
    [
        ("qwen", ["Hi!<|im_end|>\n", " Bye, then. <|im_end|>\n"]),
        ("llama3", ["Hi!<|eot_id|>", "Bye, then.<|eot_id|>"]),
        (
            "smollm3",
            [
                f"<|im_start|>assistant\n<think>\n\n</think>\n{text}<|im_end|>\n"
                for text in ("Hi!", " Bye, then. ")
            ],
        ),
    ],
)
def test_turns_are_the_marked_ones_or_found_by_rendering_beginnings(family, want):
    source = TEMPLATES[family]
    assert turns(source) == want
    assert turns(source, loss_on="last") == want[1:]
    assert turns(source, loss_on="completion") == want[1:]
    assert turns(source, n_prompt=3) == want[1:]
    assert turns(source, n_prompt=5) == []
    (everything,) = turns(source, loss_on="all")
    assert all(turn in everything for turn in want)
    assert "Hello there" in everything


def test_turn_of_weight_0_carries_no_loss():
    both = turns(TEMPLATES["qwen"])
    for number, other in (ASSISTANTS, ASSISTANTS[::-1]):
        messages = [m | {"weight": int(i != number)} for i, m in enumerate(MESSAGES)]
        (turn,) = turns(TEMPLATES["qwen"], messages)
        assert turn == both[ASSISTANTS.index(other)]
    assert turns(TEMPLATES["qwen"], messages, "last") == [turn]


def test_completion_is_every_turn_after_the_last_users():
    got = turns(TEMPLATES["qwen"], WITH_TOOL, "completion", tools=TOOLS)
    assert len(got) == 2
    more = [*WITH_TOOL, *conversation("x", "y")]
    assert turns(TEMPLATES["qwen"], more, "completion", tools=TOOLS) == ["y<|im_end|>\n"]


def test_turn_that_looks_otherwise_when_others_follow_is_found_by_its_words():
    assert turns(QWEN_3) == ["Hi!<|im_end|>\n", "<think>\n\n</think>\n\n Bye, then. <|im_end|>\n"]


@pytest.mark.parametrize(
    ("family", "want"), [("qwen", "Hi!<|im_end|>\n"), ("llama3", "Hi!<|eot_id|>")]
)
def test_turn_that_begins_a_conversation_is_its_words(family, want):
    # Qwen's template reads the first message's role, and Llama's puts its BOS before it.
    messages = [{"role": "assistant", "content": "Hi!"}, {"role": "user", "content": "Hello"}]
    assert turns(TEMPLATES[family], messages) == [want]


NUMBERED = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "messages", "tools", "words"),
    [
        ("Hello", MESSAGES, None, "leaves out the words of message 3"),
        (NUMBERED, MESSAGES, None, "no {% generation %} marks, and renders message 3 otherwise"),
        ("{{ raise_exception('roles must alternate') }}", MESSAGES, None, "roles must alternate"),
        ("{{ messages[0].nothing.at.all }}", MESSAGES, None, "the chat template fails"),
        ("{{ 1 / 0 }}", MESSAGES, None, "the chat template fails: ZeroDivisionError"),
        ("{{ messages[0].content.__class__.__mro__ }}", MESSAGES, None, "the chat template fails"),
        (TEMPLATES["llama3"], WITH_TOOL, TOOLS, "it has tools and tool_calls, which the chat"),
        (TEMPLATES["llama3"], WITH_TOOL, None, "it has tool_calls, which the chat template does"),
    ],
)
def test_conversation_that_a_template_cannot_render_says_why(source, messages, tools, words):
    with pytest.raises(TurnError, match=re.escape(words)):
        turns(source, messages, tools=tools)


def test_day_in_a_text_is_always_the_same():
    text, _ = template_of(SMOLLM_3).render(MESSAGES[1:], None, 0, "assistant")
    assert "Today Date: 26 July 2024" in text
    assert datetime.now().strftime("%d %B %Y") not in text


def test_template_is_the_files_or_the_tokenizers_own(tmp_path):
    tokenizer = chat_tokenizer("qwen")
    assert chat_template(chat_tokenizer(), "") is None
    assert chat_template(tokenizer, "") == TEMPLATES["qwen"]
    (tmp_path / "other.jinja").write_text("{{ messages }}")
    assert chat_template(tokenizer, str(tmp_path / "other.jinja")) == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"--chat_template .*none.jinja cannot be read: No such"):
        chat_template(tokenizer, str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigError, match="the test is not a chat template: line 2: "):
        template_of("\n{% for %}")
    with pytest.raises(ConfigError, match="the test is not a chat template: it is nested too deep"):
        template_of("{{" + "(" * 5000)


def test_more_turns_than_are_searched_for_are_refused():
    messages = conversation(*("a b" for _ in range(2 * MAX_UNMARKED_TURNS + 2)))
    with pytest.raises(TurnError, match=r"it has 257 turns.*at most 256; give a template with mar"):
        turns(TEMPLATES["qwen"], messages)
    assert len(turns(SMOLLM_3, messages)) == MAX_UNMARKED_TURNS + 1
    assert len(turns(TEMPLATES["qwen"], messages, "last")) == 1
