"""Conversations to text by a chat template, and which characters of it are an assistant's turns."""

import json
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gradproj.errors import ConfigError

LOSS_ON = ("assistant", "completion", "last", "all")

MAX_UNMARKED_TURNS = 256
"""Each is found by rendering all that precedes it, so the time is quadratic: here about 2 s."""

NO_TEMPLATE = (
    "a conversation, and the tokenizer has no chat template: give one with --chat_template FILE"
)

Spans = list[tuple[int, int]]
"""Characters ``[start, stop)`` of a text that carry the loss, in order."""

# Messages hold no lone surrogate, so it stands for nothing else.
_MARK = "\ud800"
_MARKS = re.compile(_MARK)
_REASONING = ("reasoning_content", "thinking", "reasoning")


class TurnError(Exception):
    """A conversation that the template cannot render, or whose turns cannot be found."""


class ChatTemplate:
    """A chat template, rendered in a sandbox as ``transformers`` does.

    A template that asks for today's date gets a fixed one: rows may not depend on the day.

    Args:
        source: Jinja.
        special_tokens: names of special tokens to their texts, as variables of the template.
        where: names the template in messages.

    Raises:
        ConfigError: the source is no Jinja template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, Any], where: str) -> None:
        self.source, self._variables = source, dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"{where} is not a chat template: line {error.lineno}: {error.message}"
            ) from error
        except RecursionError as error:
            raise ConfigError(f"{where} is not a chat template: it is nested too deep") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None,
        n_prompt: int,
        loss_on: str,
    ) -> tuple[str, Spans]:
        """Return the text of a conversation and the characters of the turns that carry the loss.

        A turn is what the template marks (``{% generation %}``). In a template without marks it
        begins where the text of the messages before it ends, generation prompt included, and ends
        where the text of the messages up to it ends.

        Args:
            messages: with ``role`` and ``content``.
            tools: descriptions of functions, or None.
            n_prompt: the first messages, whose turns carry no loss.
            loss_on: one of ``LOSS_ON``.

        Raises:
            TurnError: the template refuses the messages, knows no tools, or has no marks and
                renders the beginning of the conversation otherwise than the whole.
        """
        self._check_known(messages, tools)
        text, marked = self._render(messages, tools)
        if loss_on == "all":
            return text, [(0, len(text))]
        assistants = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
        chosen = _chosen(messages, assistants, n_prompt, loss_on)
        if marked and len(marked) == len(assistants):
            return text, [marked[assistants.index(i)] for i in chosen]
        if len(chosen) > MAX_UNMARKED_TURNS:
            raise TurnError(
                f"it has {len(chosen):,} turns, which are searched for one by one since the chat "
                f"template has no {{% generation %}} marks, at most {MAX_UNMARKED_TURNS}; give a "
                "template with marks (--chat_template)"
            )
        return text, [self._turn(messages, tools, i, text) for i in chosen]

    def _check_known(self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None) -> None:
        given = {"tools": bool(tools), "tool_calls": any("tool_calls" in m for m in messages)}
        unknown = [name for name, is_given in given.items() if is_given and name not in self.source]
        if unknown:
            raise TurnError(f"it has {' and '.join(unknown)}, which the chat template does not use")

    def _turn(
        self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None, i: int, text: str
    ) -> tuple[int, int]:
        """Return the characters of an assistant's turn by rendering what precedes its end."""
        upto, _ = self._render(messages[: i + 1], tools)
        content = messages[i]["content"].strip()
        if not i and content and upto.count(content) == 1:
            # Few templates can render a prompt without messages: the turn is its words.
            before = upto[: upto.index(content)]
        else:
            before, _ = self._render(messages[:i], tools, generation_prompt=True)
        if text.startswith(upto) and upto.startswith(before):
            if content and upto == before:
                raise TurnError(f"the chat template leaves out the words of message {i + 1}")
            return len(before), len(upto)
        # Some templates show a turn's reasoning only if it is the last one: then the same words
        # and what the template puts after them.
        words = upto[upto.rfind(content) :] if content and content in upto else ""
        if words and text.startswith(before + words):
            return len(before), len(before) + len(words)
        raise TurnError(
            f"the chat template has no {{% generation %}} marks, and renders message {i + 1} "
            "otherwise if others follow, so that its tokens are not known; give a template with "
            "marks (--chat_template), or --loss_on all"
        )

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: list[Any] | None,
        generation_prompt: bool = False,
    ) -> tuple[str, Spans]:
        """Return the text and the characters within generation marks."""
        values = {
            "messages": [_with_reasoning(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": generation_prompt,
            **self._variables,
        }
        try:
            marked = self._template.render(values)
        except Exception as error:  # a template is a program: it raises anything
            reason = str(error) if isinstance(error, TemplateError) else repr(error)
            raise TurnError(f"the chat template fails: {reason:.200}") from error
        ends = [mark.start() - n for n, mark in enumerate(_MARKS.finditer(marked))]
        spans = list(zip(ends[::2], ends[1::2], strict=True))
        return _MARKS.sub("", marked), spans


def chat_template(tokenizer: Any, file: str) -> str | None:
    """Return the source of the template: of a file, else the tokenizer's own; None without any.

    Raises:
        ConfigError: the file cannot be read.
    """
    if file:
        try:
            return Path(file).read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8"
            raise ConfigError(f"--chat_template {file} cannot be read: {reason}") from error
    own = getattr(tokenizer, "chat_template", None)
    if isinstance(own, dict):  # several, by name
        own = own.get("default") or next(iter(own.values()), None)
    return own or None


def _chosen(
    messages: Sequence[Mapping[str, Any]], assistants: list[int], n_prompt: int, loss_on: str
) -> list[int]:
    """Return the assistant's turns that carry the loss: none whose own ``weight`` is 0."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    first = max([n_prompt, *(users[-1:] if loss_on == "completion" else [])])
    chosen = [i for i in assistants if i >= first and messages[i].get("weight", 1)]
    return chosen[-1:] if loss_on == "last" else chosen


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under the names that templates read."""
    reasoning = next((message[name] for name in _REASONING if name in message), None)
    if reasoning is None:
        return dict(message)
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


class _Generation(Extension):
    """``{% generation %} ... {% endgeneration %}``: marks what a model generates."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    @staticmethod
    def _mark(caller: Macro) -> str:
        return f"{_MARK}{caller()}{_MARK}"


def _environment() -> ImmutableSandboxedEnvironment:
    """Return the environment that chat templates are written for."""

    def fail(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = _a_day
    return environment


def _a_day(form: str) -> str:
    """Return the day that Llama 3's templates have by themselves."""
    return datetime(2024, 7, 26).strftime(form)
