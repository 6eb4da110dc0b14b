"""Fields of a JSON object to the content of a document: every form, and every bad field's line."""

import json

import numpy as np
import pytest

from gradproj.corpus.content import (
    Completion,
    Conversation,
    Preference,
    Text,
    TokenIds,
    content_of,
)
from gradproj.corpus.messages import BadContentError

USER, ASSISTANT = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
OTHER = {"role": "assistant", "content": "b"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}

FORMS = {
    "text": ({"text": "t"}, Text("t")),
    "ids before all": (
        {"text": "t", "input_ids": [1, 2], "messages": [USER]},
        TokenIds([1, 2], text="t"),
    ),
    "labels": ({"input_ids": [1, 2], "labels": [-100, 2]}, TokenIds([1, 2], [-100, 2])),
    "messages": ({"messages": [USER, ASSISTANT], "text": "t"}, Conversation([USER, ASSISTANT])),
    "tools": (
        {"messages": [USER], "tools": [{"name": "f"}]},
        Conversation([USER], [{"name": "f"}]),
    ),
    "tools in a string": (
        {"messages": [USER], "tools": '[{"name": "f"}]'},
        Conversation([USER], [{"name": "f"}]),
    ),
    "no tools": ({"messages": [USER], "tools": []}, Conversation([USER])),
    "null is absent": ({"messages": None, "prompt": None, "text": "t"}, Text("t")),
    "a prompt is no form": ({"prompt": "p", "text": "t"}, Text("t")),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        Conversation([USER, ASSISTANT]),
    ),
    "system beside turns": (
        {"conversations": [{"from": "human", "value": "q"}], "system": "s"},
        Conversation([{"role": "system", "content": "s"}, USER]),
    ),
    "an empty system": ({"messages": [USER], "system": ""}, Conversation([USER])),
    "ShareGPT with calls": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "1"},
            ]
        },
        Conversation(
            [
                {"role": "system", "content": "s"},
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "1"},
            ]
        ),
    ),
    "a call's arguments in a string, and no content": (
        {
            "messages": [
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                    ],
                }
            ]
        },
        Conversation([{"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    ),
    "parts of text": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]},
        Conversation([USER]),
    ),
    "columns of a table": (
        {"messages": [USER | {"tool_calls": None, "name": None}]},
        Conversation([USER]),
    ),
    "completion": ({"prompt": "p", "completion": "c", "text": "t"}, Completion("p", "c")),
    "completion of messages": (
        {"prompt": [USER], "completion": [ASSISTANT]},
        Conversation([USER, ASSISTANT], None, 1),
    ),
    "completion of a string after messages": (
        {"prompt": [USER], "completion": "a"},
        Conversation([USER, ASSISTANT], None, 1),
    ),
    "preference": (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        Preference(Completion("p", "c"), Completion("p", "r")),
    ),
    "preference without a prompt": (
        {"chosen": "c", "rejected": "r"},
        Preference(Completion("", "c"), Completion("", "r")),
    ),
    "preference of conversations": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        Preference(Conversation([USER, ASSISTANT], None, 1), Conversation([USER, OTHER], None, 1)),
    ),
    "preference of conversations that hold their prompt": (
        {"prompt": "q", "chosen": [USER, ASSISTANT], "rejected": [USER, OTHER]},
        Preference(Conversation([USER, ASSISTANT], None, 1), Conversation([USER, OTHER], None, 1)),
    ),
    "preference of turns after a string": (
        {"prompt": "q", "chosen": [ASSISTANT], "rejected": [OTHER]},
        Preference(Conversation([USER, ASSISTANT], None, 1), Conversation([USER, OTHER], None, 1)),
    ),
    "preference of turns after messages": (
        {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [OTHER]},
        Preference(Conversation([USER, ASSISTANT], None, 1), Conversation([USER, OTHER], None, 1)),
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_form_is_the_first_that_an_object_has(name):
    fields, want = FORMS[name]
    assert content_of(fields) == (want, 1.0)
    assert content_of(fields | {"weight": -2, "meta": {"x": 1}}) == (want, -2.0)


def test_arrays_are_token_ids_too():
    ids = np.array([3, 4, 5], np.uint16)
    content, _ = content_of({"input_ids": ids, "labels": np.array([-100, 4, 5], np.int32)})
    assert content.ids is ids
    for bad in (np.array([1.0]), np.array([[1]]), np.array([-1]), np.array([2**31])):
        with pytest.raises(BadContentError, match='"input_ids"'):
            content_of({"input_ids": bad})


HALF = "\ud83d"
BAD = {
    '{"meta": {}}': 'no text: it has none of "text"; "prompt" and "completion"; "messages"',
    '{"prompt": "p"}': 'it has "prompt" and no "completion": they come together',
    '{"completion": "c"}': 'it has "completion" and no "prompt": they come together',
    '{"chosen": "c", "prompt": "p"}': 'it has "chosen" and no "rejected"',
    '{"chosen": "c"}': 'it has "chosen" and no "rejected"',
    '{"text": "t", "weight": "1"}': '"weight" is not a number but a string',
    '{"text": "t", "weight": true}': '"weight" is not a number but a boolean',
    '{"text": "t", "weight": NaN}': '"weight" is nan; give a finite float32',
    '{"text": "t", "weight": -Infinity}': '"weight" is -inf; give a finite',
    '{"text": "t", "weight": 1e39}': '"weight" is 1e+39; give a finite',
    '{"text": "t", "weight": 1' + "0" * 400 + "}": '"weight" is 1000000000',
    '{"input_ids": [1, 2], "labels": [2]}': '"labels" has 1 numbers and "input_ids" 2',
    '{"input_ids": [1, 2], "labels": "x"}': '"labels" is not a list but a string',
    '{"input_ids": [1, 2], "labels": [1, -101]}': '"labels" holds -101, which is not a token id',
    '{"input_ids": [1, 2], "labels": [1, 2.0]}': '"labels" holds 2.0, which',
    '{"input_ids": [1, 2, 3], "labels": [2, 3, -100]}': (
        '"labels" holds 2 at position 0, where "input_ids" holds 1: a label is its own token (not '
        "the next one) or -100"
    ),
    '{"input_ids": [1], "text": 5}': '"text" is not a string but a number',
    '{"messages": "x"}': '"messages" is not a list of messages but a string',
    '{"messages": [], "system": 5}': '"system" is not a string but a number',
    '{"messages": [{"role": "system", "content": "x"}], "system": "s"}': (
        'there is a "system" beside messages that begin with a system turn'
    ),
    '{"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]}': (
        '"weight" of message 1 of "messages" is not 0 or 1'
    ),
    '{"messages": ["x"]}': 'message 1 of "messages" is not an object but a string',
    '{"messages": [{"content": "x"}]}': 'message 1 of "messages" has no "role"',
    '{"messages": [{"role": 5, "content": "x"}]}': 'message 1 of "messages" has no "role"',
    '{"messages": [{"role": "user"}]}': 'message 1 of "messages" has no "content"',
    '{"messages": [{"role": "user", "content": 5}]}': (
        '"content" of message 1 of "messages" is not a string but a number'
    ),
    '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}': (
        'message 1 of "messages" has a part that is not text but "image"'
    ),
    '{"messages": [{"role": "user", "content": ["x"]}]}': "has a part that is not text",
    '{"messages": [{"role": "user", "content": "\\ud83d"}]}': (
        '"messages" is not Unicode: it has half of a surrogate pair'
    ),
    '{"messages": [{"role": "assistant", "tool_calls": "f()"}]}': (
        '"tool_calls" of message 1 of "messages" is not a list of objects'
    ),
    '{"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]}': (
        'a tool call of message 1 of "messages" has no "name" of a function'
    ),
    '{"messages": [], "tools": "not json"}': '"tools" is a string that is no JSON',
    '{"messages": [], "tools": [1]}': '"tools" is not a list of objects',
    '{"conversations": [{"from": "martian", "value": "x"}]}': (
        'message 1 of "conversations" is "from" "martian"; known are human'
    ),
    '{"conversations": [{"from": "gpt"}]}': 'message 1 of "conversations" has no "value"',
    '{"prompt": 5, "completion": "c"}': '"prompt" is not a list of messages but a number',
    '{"prompt": "p", "completion": ["c"]}': 'message 1 of "completion" is not an object',
    '{"prompt": "p", "completion": "\\udc00"}': '"completion" is not Unicode',
    '{"chosen": "c", "rejected": 5, "prompt": "p"}': '"rejected" is not a list of messages',
    '{"chosen": 5, "rejected": 6}': '"chosen" is not a list of messages but a number',
}


@pytest.mark.parametrize("fields", BAD)
def test_bad_field_is_one_line_that_names_it(fields):
    with pytest.raises(BadContentError) as caught:
        content_of(json.loads(fields))
    assert str(caught.value).startswith(BAD[fields]) or BAD[fields] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_plain_text_shows_every_form():
    shown = {name: content_of(fields)[0].plain_text() for name, (fields, _) in FORMS.items()}
    assert shown["text"] == shown["ids before all"] == "t"
    assert shown["completion"] == "pc"
    assert shown["messages"] == "user: q\nassistant: a"
    assert shown["preference of conversations"] == (
        "chosen: user: q\nassistant: a\nrejected: user: q\nassistant: b"
    )
    assert '"name": "f"' in shown["ShareGPT with calls"]
