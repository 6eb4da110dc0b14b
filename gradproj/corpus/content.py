"""The forms of a document or a query: parsed from the fields of a JSON object by ``content_of``."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradproj.corpus.messages import BadContentError, json_type, messages_of, tools_of, with_system

_LARGEST = float(np.finfo(np.float32).max)

IGNORE = -100
"""The label of a token that carries no loss."""

FORMS = '"text"; "prompt" and "completion"; "messages"; "chosen" and "rejected"; or "input_ids"'
"""The fields that make a document, for messages."""


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token but the first is a target."""

    text: str

    def plain_text(self) -> str:
        return self.text

    def is_empty(self) -> bool:
        return not self.text


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids as they are, with labels or all of them targets."""

    ids: Sequence[int] | np.ndarray
    labels: Sequence[int] | np.ndarray | None = None
    """``IGNORE`` or the token at its own place: not shifted."""
    text: str = ""
    """The text beside the ids, to be shown."""

    def plain_text(self) -> str:
        return self.text

    def is_empty(self) -> bool:
        return not len(self.ids)


@dataclass(frozen=True, slots=True)
class Completion:
    """A completion after a prompt, which carries no loss."""

    prompt: str
    completion: str

    def plain_text(self) -> str:
        return self.prompt + self.completion

    def is_empty(self) -> bool:
        return not self.prompt and not self.completion


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages for a chat template."""

    messages: list[dict[str, Any]]
    """Each has ``role`` and ``content``, strings, and perhaps ``tool_calls`` and others."""
    tools: list[Any] | None = None
    n_prompt: int = 0
    """The first messages that are a prompt; none of these carries a loss."""

    def plain_text(self) -> str:
        return "\n".join(_line_of(message) for message in self.messages)

    def is_empty(self) -> bool:
        return not self.messages


@dataclass(frozen=True, slots=True)
class Preference:
    """A chosen and a rejected answer."""

    chosen: Completion | Conversation
    rejected: Completion | Conversation

    def plain_text(self) -> str:
        return f"chosen: {self.chosen.plain_text()}\nrejected: {self.rejected.plain_text()}"

    def is_empty(self) -> bool:
        return self.chosen.is_empty() and self.rejected.is_empty()


Content = Text | TokenIds | Completion | Conversation | Preference


FIELDS = (
    "input_ids", "labels", "messages", "conversations", "system", "tools", "chosen", "rejected",
    "prompt", "completion", "text", "weight",
)  # fmt: skip
"""All fields that documents are made of."""


def fields_of_form(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that make this object's document, the first form that it has; else none.

    A field that is null is absent. ``text`` beside ``input_ids`` is only shown.
    """
    given = {name for name, value in fields.items() if value is not None}
    for needed, optional in (
        (("input_ids",), ("labels", "text")),
        (("messages",), ("system", "tools")),
        (("conversations",), ("system", "tools")),
        (("chosen", "rejected"), ("prompt", "tools")),
        (("prompt", "completion"), ("tools",)),
        (("text",), ()),
    ):
        if given.issuperset(needed):
            return (*needed, *(name for name in optional if name in given))
    return ()


def content_of(fields: Mapping[str, Any]) -> tuple[Content, float]:
    """Return the document that an object's fields make, and its weight.

    Raises:
        BadContentError: no form, or a field of a wrong type or value; names the field.
    """
    used = fields_of_form(fields)
    if not used:
        raise BadContentError(_no_form(fields))
    weight = _weight(fields.get("weight"))
    given = {name: fields[name] for name in used}
    tools = tools_of(given.get("tools"))
    if "input_ids" in given:
        return _token_ids(given), weight
    for name in ("messages", "conversations"):
        if name in given:
            messages = with_system(messages_of(given[name], name), given.get("system"))
            return Conversation(messages, tools), weight
    if "chosen" in given:
        return _preference(given, tools), weight
    if "prompt" in given:
        return _completion(given["prompt"], given["completion"], "completion", tools), weight
    return Text(_string(given["text"], "text")), weight


def problem_of_token_ids(value: Any, name: str = "input_ids", least: int = 0) -> str:
    """Return the reason why a field is not a list of token ids; empty if it is one.

    ``least`` is the smallest number allowed.
    """
    if isinstance(value, np.ndarray):
        if value.ndim != 1 or value.dtype.kind not in "iu":
            return (
                f'"{name}" is an array {value.shape} of {value.dtype}, not a list of whole numbers'
            )
        smallest, largest = (int(value.min()), int(value.max())) if len(value) else (0, 0)
        wrong: Any = smallest if smallest < least else largest
        is_good = least <= smallest and largest < 2**31
    elif not isinstance(value, list | tuple):
        return f'"{name}" is not a list but {json_type(value)}'
    else:
        # All types at once, several times faster than item by item; isinstance accepts a bool.
        is_good = not value or (
            set(map(type, value)) == {int} and least <= min(value) and max(value) < 2**31
        )
        bad = (x for x in value if type(x) is not int or not least <= x < 2**31)
        wrong = None if is_good else next(bad)
    if is_good:
        return ""
    shown = json.dumps(wrong, default=str)[:40]
    return f'"{name}" holds {shown}, which is not a token id (0 to 2^31 - 1)'


def is_unicode(value: str) -> bool:
    """Return whether a string has no half of a surrogate pair."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _no_form(fields: Mapping[str, Any]) -> str:
    pairs = ("chosen", "rejected"), ("prompt", "completion")
    for one, other in (order for pair in pairs for order in (pair, pair[::-1])):
        if fields.get(one) is not None:
            return f'it has "{one}" and no "{other}": they come together'
    return f"no text: it has none of {FORMS}"


def _weight(value: Any) -> float:
    if value is None:
        return 1.0
    if type(value) not in (int, float):
        raise BadContentError(f'"weight" is not a number but {json_type(value)}')
    try:
        weight = float(value)
    except OverflowError:
        weight = math.inf
    if not abs(weight) <= _LARGEST:  # also of NaN
        raise BadContentError(f'"weight" is {str(value)[:40]}; give a finite float32')
    return weight


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadContentError(f'"{name}" is not a string but {json_type(value)}')
    if not is_unicode(value):
        raise BadContentError(f'"{name}" is not Unicode: it has half of a surrogate pair')
    return value


def _token_ids(fields: Mapping[str, Any]) -> TokenIds:
    ids, labels = fields["input_ids"], fields.get("labels")
    text = "" if fields.get("text") is None else _string(fields["text"], "text")
    problem = problem_of_token_ids(ids)
    if not problem and labels is not None:
        problem = problem_of_token_ids(labels, "labels", IGNORE) or _problem_of_labels(ids, labels)
    if problem:
        raise BadContentError(problem)
    return TokenIds(ids, labels, text)


def _problem_of_labels(ids: Any, labels: Any) -> str:
    if len(ids) != len(labels):
        return f'"labels" has {len(labels):,} numbers and "input_ids" {len(ids):,}'
    ours, theirs = np.asarray(ids, np.int64), np.asarray(labels, np.int64)
    wrong = np.flatnonzero((theirs != IGNORE) & (theirs != ours))
    if not len(wrong):
        return ""
    at = int(wrong[0])
    return (
        f'"labels" holds {theirs[at]} at position {at:,}, where "input_ids" holds {ours[at]}: a '
        f"label is its own token (not the next one) or {IGNORE}"
    )


def _completion(
    prompt: Any, answer: Any, name: str, tools: list[Any] | None
) -> Completion | Conversation:
    """Return an answer after a prompt; a string among lists of messages is one turn."""
    if isinstance(prompt, str) and isinstance(answer, str) and tools is None:
        return Completion(_string(prompt, "prompt"), _string(answer, name))
    before = _turns(prompt, "prompt", "user")
    return Conversation(before + _turns(answer, name, "assistant"), tools, len(before))


def _turns(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    if isinstance(value, str):
        return [{"role": role, "content": _string(value, name)}]
    return messages_of(value, name)


def _preference(fields: Mapping[str, Any], tools: list[Any] | None) -> Preference:
    chosen, rejected, prompt = fields["chosen"], fields["rejected"], fields.get("prompt")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        # What both begin with cancels in the difference of their gradients.
        prompt = ""
    if prompt is None or (isinstance(prompt, str) and _holds_turn(chosen, prompt)):
        # Whole conversations: the turns that both begin with are the prompt.
        ours, theirs = (
            _turns(chosen, "chosen", "assistant"),
            _turns(rejected, "rejected", "assistant"),
        )
        pairs = zip(ours, theirs, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
        return Preference(Conversation(ours, tools, shared), Conversation(theirs, tools, shared))
    return Preference(
        _completion(prompt, chosen, "chosen", tools),
        _completion(prompt, rejected, "rejected", tools),
    )


def _holds_turn(messages: Any, prompt: str) -> bool:
    """Return whether a conversation has the prompt as one of its own turns before the last."""
    if not isinstance(messages, list):
        return False
    turns = messages[:-1]
    return any(isinstance(turn, dict) and turn.get("content") == prompt for turn in turns)


def _line_of(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    called = f" {json.dumps(calls, ensure_ascii=False)}" if calls else ""
    return f"{message['role']}: {message['content']}{called}"
