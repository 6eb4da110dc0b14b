"""The messages of a conversation: chat messages, ShareGPT turns, tool calls and tools."""

import json
from typing import Any

_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool",
    "observation": "tool", "function_response": "tool", "function_call": "assistant",
}  # fmt: skip


class BadContentError(Exception):
    """Fields that are no document. The message says why, without the document's place."""


def json_type(value: Any) -> str:
    """Return JSON's name for a value's type, with its article; Python's name for other types."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "a boolean"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def messages_of(value: Any, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list | tuple):
        raise BadContentError(f'"{name}" is not a list of messages but {json_type(value)}')
    messages = [_message(item, f'message {i} of "{name}"') for i, item in enumerate(value, 1)]
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise BadContentError(f'"{name}" is not Unicode: it has half of a surrogate pair') from None
    except (TypeError, ValueError, RecursionError) as error:
        raise BadContentError(f'"{name}" cannot be written as JSON ({error})') from None
    return messages


def with_system(messages: list[dict[str, Any]], system: Any) -> list[dict[str, Any]]:
    """Return the messages after the system prompt that stands beside them, if one does."""
    if system is None or system == "":
        return messages
    if not isinstance(system, str):
        raise BadContentError(f'"system" is not a string but {json_type(system)}')
    if messages and messages[0]["role"] == "system":
        raise BadContentError('there is a "system" beside messages that begin with a system turn')
    return messages_of([{"role": "system", "content": system}], "system") + messages


def _message(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadContentError(f"{place} is not an object but {json_type(value)}")
    # Columns of a table hold null where a message has no such field.
    message = {key: item for key, item in value.items() if item is not None}
    if "from" in message and "role" not in message:
        message = _from_sharegpt(message, place)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise BadContentError(f'{place} has no "role"')
    if message.get("weight", 1) not in (0, 1):
        raise BadContentError(f'"weight" of {place} is not 0 or 1: a turn carries the loss or not')
    if "tool_calls" in message:
        message["tool_calls"] = _tool_calls(message["tool_calls"], place)
        if not message["tool_calls"]:
            del message["tool_calls"]
    if "content" not in message and "tool_calls" not in message:
        raise BadContentError(f'{place} has no "content"')
    message["content"] = _content_text(message.get("content", ""), place)
    return message


def _from_sharegpt(message: dict[str, Any], place: str) -> dict[str, Any]:
    name, value = message["from"], message.get("value")
    role = _SHAREGPT_ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        known = ", ".join(_SHAREGPT_ROLES)
        raise BadContentError(
            f'{place} is "from" {json.dumps(name, default=str)[:40]}; known are {known}'
        )
    if value is None:
        raise BadContentError(f'{place} has no "value"')
    rest = {key: item for key, item in message.items() if key not in ("from", "value")}
    calls = _function_call(value) if name == "function_call" else None
    return {"role": role, "content": value if calls is None else "", **rest} | (
        {} if calls is None else {"tool_calls": calls}
    )


def _function_call(value: Any) -> list[dict[str, Any]] | None:
    """Return the calls that a ShareGPT turn holds as JSON; None if it is another text."""
    try:
        calls = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        return None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": call} for call in calls]


def _tool_calls(value: Any, place: str) -> list[Any]:
    """Return tool calls with arguments as objects: templates write them as JSON themselves."""
    if not isinstance(value, list) or not all(isinstance(call, dict) for call in value):
        raise BadContentError(f'"tool_calls" of {place} is not a list of objects')
    calls = []
    for call in value:
        call = {key: item for key, item in call.items() if item is not None}
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadContentError(f'a tool call of {place} has no "name" of a function')
        function = dict(function)
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                decoded = json.loads(arguments)
            except (ValueError, RecursionError):
                decoded = None
            function["arguments"] = decoded if isinstance(decoded, dict) else arguments
        calls.append(call | {"function": function} if "function" in call else function)
    return calls


def _content_text(value: Any, place: str) -> str:
    """Return a message's text, also if it comes in parts (``[{"type": "text", "text": ...}]``)."""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type", "text") if isinstance(part, dict) else json_type(part)
            if kind != "text" or not isinstance(part.get("text"), str):
                raise BadContentError(f'{place} has a part that is not text but "{kind}"')
        return "".join(part["text"] for part in value)
    if not isinstance(value, str):
        raise BadContentError(f'"content" of {place} is not a string but {json_type(value)}')
    return value


def tools_of(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadContentError('"tools" is a string that is no JSON') from None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise BadContentError('"tools" is not a list of objects')
    return value
