"""Chat templates as data, and conversations through them: text, or a refusal, in bounded time."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.cluster.errors import InvalidRequest, ModelLoadError
from splitserve.router import chat_template
from splitserve.router.chat_template import ChatTemplate, Conversation
from tests.fuzz.mutate import TEXTS, bounded, corpus, fuzz, mutated

VALID = [path.read_bytes() for path in corpus("chat_template") if path.suffix == ".jinja"]
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
TALK = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "x"}]
PIECES = st.sampled_from(
    [
        "{{",
        "}}",
        "{%",
        "%}",
        "{%for+m+in+messages%}",
        "{%endfor%}",
        "{%if",
        "{%set+x=",
        "m.content",
        "*9",
        "~",
        "range(9)",
        "[0]",
        "|join",
        ".__class__",
        "raise_exception('x')",
        "{%macro+f()%}",
        "{%endmacro%}",
        "{{f()}}",
        "'a'",
        "strftime_now('%Y')",
        "namespace(a=1)",
        "|tojson",
        "{%break%}",
        "{%generation%}",
        "**",
        "+is+string",
    ]
).map(lambda piece: piece.replace("+", " "))
TURNS = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | TEXTS, "content": TEXTS})


def check(source: str, messages: Conversation = TALK) -> str | None:
    """The text, None for a refusal."""
    try:
        with bounded(), patch.object(chat_template, "MAX_RENDER_S", 0.5):
            text = ChatTemplate(source, TOKENS).render(messages)
    except (ModelLoadError, InvalidRequest) as error:
        str(error).encode("utf-8", "surrogatepass")
        return None
    text.encode()
    return text


@pytest.mark.parametrize("path", corpus("chat_template"), ids=lambda path: path.name)
def test_corpus(path: Path) -> None:
    assert (check(path.read_text()) is not None) == (path.suffix == ".jinja")


@fuzz
@given(mutated(VALID).map(lambda data: data.decode("utf-8", "replace")) | st.lists(PIECES, max_size=12).map("".join))
def test_templates(source: str) -> None:
    check(source)


@fuzz
@given(st.sampled_from(VALID), st.lists(TURNS))
def test_conversations(template: bytes, messages: Conversation) -> None:
    check(template.decode(), messages)
