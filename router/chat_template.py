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
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment

from splitserve.cluster.errors import InvalidRequest, ModelLoadError

MAX_RENDERED_CHARACTERS = 64 * 1024 * 1024
MAX_RENDER_S = 10.0
MAX_EXPONENT = 1024
DEADLINE = "_deadline"  # a variable of the template's, in which what is called finds it
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Conversation = Sequence[Mapping[str, Any]]  # role and content are texts


class ChatTemplate:
    """A compiled template. `tokens` are the special tokens that it may name, such as bos_token."""

    def __init__(self, source: str, tokens: Mapping[str, str]) -> None:
        try:
            self._template = _Environment().from_string(source)
        except Exception as error:  # what compiling an odd program may raise has no common base
            raise ModelLoadError(f"chat template: not a jinja2 template: {error}") from error
        self.source = source
        self._tokens = dict(tokens)

    @classmethod
    def load(cls, folder: Path, settings: Mapping[str, Any]) -> ChatTemplate | None:
        """From chat_template.jinja, else from `settings` (tokenizer_config.json), else None."""
        path = folder / "chat_template.jinja"
        source = _read_text(path) if path.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several named templates
            named = [entry for entry in source if isinstance(entry, dict) and entry.get("name") == "default"]
            source = named[0].get("template") if named else None
        if source is None:
            return None
        if not isinstance(source, str):
            raise ModelLoadError(f"{folder}: chat_template: found {type(source).__name__}; expected a string")
        tokens: dict[str, str] = {}
        for name in SPECIAL_TOKENS:
            match settings.get(name):
                case str(token) | {"content": str(token)}:
                    tokens[name] = token
                case None:
                    pass
                case other:
                    raise ModelLoadError(f"{folder}: {name}: found {other!r:.80}; expected a string, or its content")
        return cls(source, tokens)

    def render(self, messages: Conversation, tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """The conversation as the model expects it, the assistant's turn opened.

        Raises InvalidRequest if the template refuses it (as many do when roles do not alternate), or if it outgrows
        MAX_RENDERED_CHARACTERS or MAX_RENDER_S.
        """
        pieces, size, started = [], 0, time.monotonic()
        try:
            for piece in self._template.generate(
                messages=[dict(message) for message in messages],
                tools=list(tools) or None,
                documents=None,
                add_generation_prompt=True,
                **{DEADLINE: started + MAX_RENDER_S},
                **self._tokens,
            ):
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS or time.monotonic() - started > MAX_RENDER_S:
                    raise InvalidRequest("messages", f"{size} rendered characters", "shorten the conversation")
                pieces.append(piece)
            text = "".join(pieces)
            text.encode()  # lone surrogates, which a tokenizer takes for no text
        except InvalidRequest:
            raise
        except Exception as error:  # the template is a program of the model's: it may raise anything
            raise InvalidRequest("messages", str(error), "the model's chat template must accept them") from error
        return text


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; serving only renders them."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it as a plain set)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """A sandbox in which loops and calls look at the clock, and products have a size."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"])
        self.filters["tojson"] = _to_json  # jinja2's own escapes HTML
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def tick(self) -> None:
        """Called in every turn of a loop, for `call` to look at the clock."""

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        if time.monotonic() > context[DEADLINE]:
            raise InvalidRequest("messages", f"{MAX_RENDER_S:g} s of rendering", "shorten the conversation")
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and isinstance(right, int) and right > MAX_EXPONENT:
            raise OverflowError(f"an exponent of {right}")
        for value, times in ((left, right), (right, left)):
            is_sequence = operator == "*" and isinstance(value, str | list | tuple) and isinstance(times, int)
            if is_sequence and len(value) * times > MAX_RENDERED_CHARACTERS:
                raise OverflowError(f"a product of {len(value) * times} elements")
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in list(source.find_all(nodes.For)):
            tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(tick).set_lineno(loop.lineno))
        return super()._generate(source, *args, **kwargs)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except ValueError as error:
        raise ModelLoadError(f"{path}: not UTF-8 text ({error}); fetch it again") from error


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
