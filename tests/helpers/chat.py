"""Published chat templates of three families of models, a tokenizer for them, and conversations."""

from pathlib import Path

from helpers.corpora import words
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

QWEN = r"""{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0]['role'] == 'system' %}
        {{- messages[0]['content'] }}
    {%- else %}
        {{- 'You are Qwen, created by Alibaba Cloud. You are a helpful assistant.' }}
    {%- endif %}
    {{- "\n\n# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\n\nFor each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args-json-object>}\n</tool_call><|im_end|>\n" }}
{%- else %}
    {%- if messages[0]['role'] == 'system' %}
        {{- '<|im_start|>system\n' + messages[0]['content'] + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}
    {%- endif %}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) or (message.role == "assistant" and not message.tool_calls) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == "assistant" %}
        {{- '<|im_start|>' + message.role }}
        {%- if message.content %}
            {{- '\n' + message.content }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' }}
            {{- tool_call.name }}
            {{- '", "arguments": ' }}
            {{- tool_call.arguments | tojson }}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == "tool" %}
        {%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' }}
        {{- message.content }}
        {{- '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""  # noqa: E501
"""Qwen 2.5: ChatML with tools, no BOS, no marks."""

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""Llama 3: a BOS of its own, no tools, no marks."""

SMOLLM_3 = r"""{%- if messages[0].role == "system" -%}
    {{- "<|im_start|>system\n" + messages[0].content.strip() + "\n<|im_end|>\n" -}}
{%- else -%}
    {{- "<|im_start|>system\nToday Date: " + strftime_now("%d %B %Y") + "\n<|im_end|>\n" -}}
{%- endif -%}
{%- for message in messages -%}
    {%- set content = message.content -%}
    {%- if message.role == "user" -%}
        {{ "<|im_start|>" + message.role + "\n" + content + "<|im_end|>\n" }}
    {%- elif message.role == "assistant" -%}
        {%- generation -%}
            {{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n" + content.lstrip("\n") + "<|im_end|>\n" }}
        {%- endgeneration -%}
    {%- elif message.role == "tool" -%}
        {{ "<|im_start|>" + "user\n" + content + "<|im_end|>\n" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ "<|im_start|>assistant\n" + "<think>\n\n</think>\n" }}
{%- endif -%}
"""  # noqa: E501
"""SmolLM3 without its modes: generation marks, and today's date."""

QWEN_3 = r"""{%- set ns = namespace(last_query_index=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{%- set ns.last_query_index = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "assistant" and loop.index0 > ns.last_query_index %}
        {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' + message.content.strip('\n') + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""  # noqa: E501
"""The turns of Qwen 3: only the last of the assistant's shows its (here empty) reasoning."""

TEMPLATES = {"qwen": QWEN, "llama3": LLAMA_3, "smollm3": SMOLLM_3}

_SPECIAL = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>",
]  # fmt: skip


def chat_tokenizer(
    family: str | None = None, folder: Path | None = None, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with a family's template and special tokens; saved in ``folder``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [words(2000, 1)],
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=_SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    if family is not None:
        fast.chat_template = TEMPLATES[family]
    if folder is not None:
        fast.save_pretrained(folder)
    return fast


def conversation(*turns: str, system: str | None = None) -> list[dict[str, str]]:
    """Return messages of a user and an assistant in turn."""
    first = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return first + [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


def parts_of(family: str, messages: list[dict[str, str]]) -> list[str | list[str]]:
    """Return the text that a family's template makes, written by hand: the targets in lists."""
    if family == "llama3":
        parts: list[str | list[str]] = ["<s>"]
        for message in messages:
            text = f"{message['content'].strip()}<|eot_id|>"
            is_target = message["role"] == "assistant"
            header = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
            parts += [header, [text] if is_target else text]
        return parts
    first = {
        "qwen": "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
        "smollm3": "Today Date: 26 July 2024\n",
    }[family]
    parts = [] if messages[0]["role"] == "system" else [f"<|im_start|>system\n{first}<|im_end|>\n"]
    for message in messages:
        header, text = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>\n"
        if message["role"] != "assistant":
            parts.append(header + text)
        elif family == "qwen":
            parts += [header, [text]]
        else:
            parts.append([f"{header}<think>\n\n</think>\n{text}"])
    return parts


def tokens_of(
    tokenizer: PreTrainedTokenizerFast, parts: list[str | list[str]]
) -> tuple[list[int], list[bool]]:
    """Tokenize parts one after another; those in a list are targets. Returns ids and mask."""
    ids, mask = [], []
    for part in parts:
        is_target = isinstance(part, list)
        new = tokenizer("".join(part), add_special_tokens=False).input_ids
        ids, mask = ids + new, mask + [is_target] * len(new)
    return ids, [False, *mask[1:]]
