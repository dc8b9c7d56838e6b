"""Prompts: a conversation becomes the text that a model was trained on.

A template is a Jinja text, as in `chat_template.jinja`. A checkpoint's own is rendered as transformers renders it; the
ones in `BUILT_IN` are the conversation formats of the LLaVA repository (`llava/conversation.py`), for checkpoints that
bring none. A message is transformers' `{"role": ..., "content": text or [{"type": "image"}, {"type": "text", "text":
...}]}`; in the text that comes out `<image>` stands once for each image.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pivotjax.errors import InputError
from pivotjax.files import read_json

Message = Mapping[str, Any]

IMAGE = "<image>"

# The text of a message's content, images in their places; `system` is the first message's, if that is one.
_CONTENT = r"""
{%- macro text(content, after_image='\n') -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content -%}
{{ '<image>' + after_image if part['type'] == 'image' else part['text'] }}
{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system, messages = text(messages[0]['content']), messages[1:] -%}
{%- else -%}{%- set system = default_system -%}{%- endif -%}
"""

_VICUNA = r"""
{{- system + ' ' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' + text(message['content']) + ' ' }}
{%- else -%}{{ 'ASSISTANT: ' + text(message['content']) + eos_token }}{%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' if add_generation_prompt -}}
"""

_LLAMA_2 = r"""
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{ between if not loop.first }}
{{- '[INST] ' }}{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if system and loop.first }}
{{- text(message['content']) + ' [/INST]' -}}
{%- else -%}{{ ' ' + text(message['content']) + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}
"""

_CHATML = r"""
{{- '<|im_start|>system\n' + system + '<|im_end|>' -}}
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\n' + text(message['content']) + '<|im_end|>' }}
{%- endfor -%}
{{- '<|im_start|>assistant\n' if add_generation_prompt -}}
"""

_PLAIN = r"""
{%- for message in messages -%}
{{ text(message['content'], '') + ('\n' if message['role'] == 'assistant' else '') }}
{%- endfor -%}
"""


def _built_in(body: str, system: str = "", between: str = "''") -> str:
    head = f"{{%- set default_system = {json.dumps(system)} -%}}{{%- set between = {between} -%}}"
    return head + _CONTENT.strip() + body.strip()


BUILT_IN: dict[str, str] = {
    "plain": _built_in(_PLAIN),  # LLaVA's stage 1: the image, then the caption
    "vicuna_v1": _built_in(
        _VICUNA,
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    ),
    "llama_2": _built_in(
        _LLAMA_2,
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
        between="bos_token",
    ),
    "mistral_instruct": _built_in(_LLAMA_2),
    "chatml": _built_in(_CHATML, "Answer the questions."),
}


def of_folder(folder: Path) -> str | None:
    """The chat template that a checkpoint's folder brings, found where transformers looks; None if there is none."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text()
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        file = folder / name
        found = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(found, list):  # several, by name
            found = {one["name"]: one["template"] for one in found}.get("default")
        if found:
            return found
    return None


def conversation(request: str | Sequence[Message], images: int) -> list[Message]:
    """Messages from what a user gave: a text is one question about all `images`, which come first."""
    if not isinstance(request, str):
        return list(request)
    content = [{"type": "image"}] * images + ([{"type": "text", "text": request}] if request else [])
    return [{"role": "user", "content": content}]


def render(
    template: str, messages: Sequence[Message], special: Mapping[str, str], add_generation_prompt: bool = True
) -> str:
    """The prompt's text.

    Args:
        template: Jinja text.
        messages: the conversation, the first message first.
        special: the tokenizer's special tokens by name (`bos_token`, `eos_token`, ...), which templates use.
        add_generation_prompt: end where the assistant's answer begins.

    Raises:
        InputError: the template is broken, or refuses these messages.
    """
    if not any(one in template for one in ("'type'", '"type"', ".type")):  # of a model without images: content is text
        messages = [{**message, "content": _flat(message["content"])} for message in messages]
    try:
        return _compiled(template).render(
            messages=_plain_values(messages),
            tools=None, documents=None, add_generation_prompt=add_generation_prompt, **special,
        )  # fmt: skip
    except (jinja2.TemplateError, TypeError, KeyError) as error:
        raise InputError(f"the chat template does not take these messages ({error}); choose another") from error


def _plain_values(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """A copy of text, numbers, lists and dicts alone: nothing that a template could call."""
    return json.loads(json.dumps(list(messages), default=lambda value: f"<{type(value).__name__}>"))


def _flat(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(IMAGE + "\n" if part["type"] == "image" else part["text"] for part in content)


@lru_cache
def _compiled(template: str) -> jinja2.Template:
    """In the sandbox, and with the names, that chat templates are written for."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    try:
        return environment.from_string(template)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(f"the chat template is broken ({error}, line {error.lineno}); choose another") from error


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what the assistant wrote; the text inside stays as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True)).set_lineno(line)
