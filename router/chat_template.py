"""Chat templates: the model's own jinja2 program, in a sandbox, with the helpers that Hugging Face gives it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from splitserve.cluster.errors import InvalidRequest, ModelLoadError

MAX_RENDERED_CHARACTERS = 64 * 1024 * 1024
MAX_RENDER_S = 10.0
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Conversation = Sequence[Mapping[str, str]]


class ChatTemplate:
    """A compiled template. `tokens` are the special tokens that it may name, such as bos_token."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"chat template: not a jinja2 template: {error}") from error
        self._tokens = dict(tokens)

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """From chat_template.jinja, else from `settings` (tokenizer_config.json), else None."""
        path = folder / "chat_template.jinja"
        source = path.read_text("utf-8") if path.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several named templates
            source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelLoadError(f"{folder}: chat_template: found {type(source).__name__}; expected a string")
        values = {name: settings.get(name) for name in SPECIAL_TOKENS}
        contents = {name: value["content"] if isinstance(value, dict) else value for name, value in values.items()}
        return cls(source, {name: value for name, value in contents.items() if value is not None})

    def render(self, messages: Conversation) -> str:
        """The conversation as the model expects it, the assistant's turn opened.

        Raises InvalidRequest if the template refuses it (as many do when roles do not alternate), or if it outgrows
        MAX_RENDERED_CHARACTERS or MAX_RENDER_S.
        """
        pieces, size, started = [], 0, time.monotonic()
        try:
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
            ):
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS or time.monotonic() - started > MAX_RENDER_S:
                    raise InvalidRequest("messages", f"{size} rendered characters", "shorten the conversation")
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequest("messages", str(error), "the model's chat template must accept them") from error
        return "".join(pieces)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; serving only renders them."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json  # jinja2's own escapes HTML
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
