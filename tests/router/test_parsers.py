"""Answers become reasoning, content and calls: the same ones, however the text is cut."""

from __future__ import annotations

import asyncio
import json
import time
from itertools import pairwise
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.messages import Prefill
from splitserve.cluster.topology_sections import Model
from splitserve.models.grammar import GrammarCompiler
from splitserve.router.constraint import Constraint, GrammarChecker
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.openai_tools import calls_of, tools_of
from splitserve.router.parsers import deepseek, hermes
from splitserve.router.parsers.families import TOOLS, Family
from splitserve.router.parsers.message import MessageParser
from splitserve.router.parsers.pieces import ToolCall
from tests.router.routers import MODEL, model_folder, running_router, tokenizer

WEATHER = '{"name": "weather", "arguments": {"town": "Köln"}}'
PARAMETERS = WEATHER.replace("arguments", "parameters")
ARGUMENTS = '{"town": "Köln"}'
CALLED = (ToolCall("weather", ARGUMENTS),)
D_CALL = f"{deepseek.CALL}function{deepseek.SEPARATOR}weather\n```json\n{ARGUMENTS}\n```{deepseek.END}"
D_SHORT = f"{deepseek.CALL}weather{deepseek.SEPARATOR}{ARGUMENTS}{deepseek.END}"

Answer = tuple[str, str, tuple[ToolCall, ...]]


def parsed(family: str, parts: list[str], *, reasons: bool = False, inside: bool = False) -> Answer:
    parser = MessageParser(Family(family, reasons), reasons=reasons, inside=inside, most_calls=None)
    found = [parser.push(part, last=False) for part in parts] + [parser.push("", last=True)]
    reasoning, content, calls = zip(*found, strict=True)
    return "".join(reasoning), "".join(content), sum(calls, ())


@pytest.mark.parametrize(
    ("family", "text", "content", "calls"),
    [
        ("hermes", f"<tool_call>\n{WEATHER}\n</tool_call>", "", CALLED),
        (
            "hermes",
            f"I look.\n\n<tool_call>{WEATHER}</tool_call>\n<tool_call>{WEATHER}</tool_call>\n",
            "I look.",
            CALLED * 2,
        ),
        ("hermes", f"<tool_call>[{WEATHER}, {WEATHER}]</tool_call>", "", CALLED * 2),
        ("hermes", f"<tool_call>{WEATHER}", "", CALLED),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>', "", (ToolCall("now", "{}"),)),
        ("hermes", "a <tool_call>{broken</tool_call> b ", "a <tool_call>{broken</tool_call> b ", ()),
        ("hermes", '<tool_call>{"name": 5}</tool_call>', '<tool_call>{"name": 5}</tool_call>', ()),
        ("hermes", "<tool_call>" + "[" * 9999, "<tool_call>" + "[" * 9999, ()),
        ("hermes", " plain <tool \n", " plain <tool \n", ()),
        ("llama3", PARAMETERS, "", CALLED),
        ("llama3", f"\n{PARAMETERS}; {PARAMETERS}", "", CALLED * 2),
        ("llama3", '{"a": 1}', '{"a": 1}', ()),
        ("llama3", '{"name": "Bob", "age": 3}', '{"name": "Bob", "age": 3}', ()),
        ("llama3", f"{PARAMETERS}; 5", f"{PARAMETERS}; 5", ()),
        ("llama3", "{" * 5000, "{" * 5000, ()),
        ("llama3", f"Sure: {PARAMETERS}", f"Sure: {PARAMETERS}", ()),
        ("llama3", "  ", "  ", ()),
        ("deepseek", f"Well.{deepseek.OPENING}{D_CALL}\n{D_CALL}{deepseek.CLOSING}", "Well.", CALLED * 2),
        ("deepseek", f"{deepseek.OPENING}{D_SHORT}{deepseek.CLOSING}", "", CALLED),
        (
            "deepseek",
            f"{deepseek.OPENING}?{D_SHORT}{deepseek.CLOSING}",
            f"{deepseek.OPENING}?{D_SHORT}{deepseek.CLOSING}",
            (),
        ),
    ],
)
def test_each_family_is_read(family: str, text: str, content: str, calls: tuple[ToolCall, ...]) -> None:
    whole = parsed(family, [text])
    assert whole == ("", content, calls)
    assert parsed(family, list(text)) == whole


def test_hostile_calls_take_no_longer_than_others_of_their_length() -> None:
    """A client can have a model write what it likes: these were tried in all cubic ways once."""
    began = time.process_time()
    for unit in (
        deepseek.CALL,
        f"{deepseek.CALL}function{deepseek.SEPARATOR}a\n```json\n",
        "\n```",
        deepseek.SEPARATOR,
    ):
        body = unit * (60_000 // len(unit))
        for text in (f"{deepseek.OPENING}{body}{deepseek.CLOSING}", f"{deepseek.OPENING}{D_CALL}{body}"):
            assert parsed("deepseek", [text]) == ("", text, ())
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("text", "inside", "reasoning", "content"),
    [
        ("<think>\nHm. \n</think>\n\nYes. ", False, "Hm.", "Yes. "),
        ("\nHm.\n\nHm?</think>Yes.", True, "Hm.\n\nHm?", "Yes."),
        ("Yes <think>no</think>", False, "", "Yes <think>no</think>"),
        ("  Yes", False, "", "  Yes"),
        ("<thi", False, "", "<thi"),
        ("<think>never done </th", False, "never done </th", ""),
        ("<think></think>Yes", False, "", "Yes"),
    ],
)
def test_reasoning_stands_before_the_answer(text: str, inside: bool, reasoning: str, content: str) -> None:
    for parts in ([text], list(text)):
        assert parsed("hermes", parts, reasons=True, inside=inside) == (reasoning, content, ())


FRAGMENTS = [
    *("<think>", "</think>", "<tool_call>", "</tool_call>", WEATHER, PARAMETERS, deepseek.OPENING, deepseek.CLOSING),
    *(
        D_CALL,
        D_SHORT,
        deepseek.CALL,
        "{",
        "}",
        ";",
        " ",
        "\n",
        "<",
        "</",
        "text",
        "é",
        "tool_call>",
        "<tool_",
        "think>",
    ),
]


@given(
    family=st.sampled_from(sorted(TOOLS)),
    text=st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join),
    cuts=st.lists(st.integers(0, 400), max_size=12),
    reasons=st.booleans(),
    inside=st.booleans(),
)
def test_cuts_change_nothing(family: str, text: str, cuts: list[int], reasons: bool, inside: bool) -> None:
    whole = parsed(family, [text], reasons=reasons, inside=reasons and inside)
    places = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parts = [text[start:stop] for start, stop in pairwise(places)]
    assert parsed(family, parts, reasons=reasons, inside=reasons and inside) == whole
    assert parsed(family, list(text), reasons=reasons, inside=reasons and inside) == whole


def test_a_call_is_shown_as_soon_as_it_is_whole() -> None:
    parser = MessageParser(Family("hermes"), reasons=False, inside=False, most_calls=None)
    assert parser.push("Look: <tool", last=False) == ("", "Look:", ())
    assert parser.push(f"_call>{WEATHER}</tool_call", last=False) == ("", "", ())
    assert parser.push(">", last=False) == ("", "", CALLED)


TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"town": {"type": "string", "maxLength": 9}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}
OTHER: dict[str, Any] = {"type": "function", "function": {"name": "now"}}


# As pydantic describes models within models.
REFERRING: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "$defs": {"Town": {"type": "string", "maxLength": 9}},
            "type": "object",
            "properties": {"town": {"$ref": "#/$defs/Town"}},
            "required": ["town"],
            "additionalProperties": False,
        },
    },
}


TEXTS = {
    "hermes": f"<tool_call>\n{WEATHER}\n</tool_call>",
    "llama3": PARAMETERS,
    "deepseek": f"{deepseek.OPENING}{D_CALL}{deepseek.CLOSING}",
}


def is_taken(grammar: str, text: str) -> bool:
    matcher = GrammarCompiler(model_folder(), tokenizer().vocab_size, ()).compile(grammar)
    ids = tokenizer().encode(text)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


@pytest.mark.parametrize("family", sorted(TOOLS))
def test_what_a_choice_forces_is_what_the_parser_reads(family: str) -> None:
    assert parsed(family, [TEXTS[family]]) == ("", "", CALLED)
    by_name = {"type": "function", "function": {"name": "now"}}
    for tools, choice, allowed in (
        ([TOOL, OTHER], "required", True),
        ([TOOL, OTHER], by_name, False),
        ([OTHER, REFERRING], "required", True),
    ):
        constraint = tools_of(tools, choice, Family(family)).constraint
        assert constraint is not None
        grammar = asyncio.run(made(constraint))
        assert is_taken(grammar, TEXTS[family]) == allowed
        for blanks, bounded in ((30, allowed), (40, False)):
            assert is_taken(grammar, TEXTS[family].replace('"town":', f'"town":{" " * blanks}')) == bounded


UNSUPPORTED = {"type": "function", "function": {"name": "x", "parameters": {"type": "array", "uniqueItems": True}}}
PERSON = json.dumps(
    {
        "$defs": {"n": {"type": "integer"}},
        "type": "object",
        "properties": {"age": {"$ref": "#/$defs/n"}},
        "required": ["age"],
    }
)


@pytest.mark.parametrize("family", sorted(TOOLS))
@pytest.mark.parametrize("schema", [PERSON, '{"type": "object"}'])
def test_beside_a_form_of_the_answer_a_tool_may_be_called(family: str, schema: str) -> None:
    form = asyncio.run(made(Constraint("json_schema", schema, "response_format")))
    for tools, choice in (([TOOL, OTHER], "auto"), ([TOOL], None)):
        constraint = tools_of(tools, choice, Family(family), form).constraint
        assert constraint is not None
        grammar = asyncio.run(made(constraint))
        assert is_taken(grammar, TEXTS[family])
        for text in ('{"age": 3}', '{\n  "age": 3, "name": "Bob"}'):
            assert is_taken(grammar, text)
            assert parsed(family, [text]) == ("", text, ())
        for text in ("Hello", f'{{{" " * 40}"age": 3}}', f'{{"age": 3}}{TEXTS[family]}'):
            assert not is_taken(grammar, text)
        assert is_taken(grammar, '{"age": "x"}') == (schema != PERSON)
    for tools, choice in (([TOOL], "none"), ([], None)):
        assert tools_of(tools, choice, Family(family), form).constraint is None, "the form alone holds"


@pytest.mark.parametrize(
    ("form", "text", "other"),
    [
        (Constraint("regex", 'a+/(b|é)?"{2}}', "f"), 'aa/b""}', "b"),
        (Constraint.choice(["yes", '"q"\\}'], "f"), '"q"\\}', "no"),
        (Constraint("grammar", 'start: "x{" foo\nfoo: /[0-9]/+', "f"), "x{12", "x"),
        (Constraint("grammar", 'root ::= "x" [0-9]+', "f"), "x12", "x"),
    ],
)
def test_any_form_of_the_answer_leaves_room_for_calls(form: Constraint, text: str, other: str) -> None:
    constraint = tools_of([TOOL], "auto", Family("hermes"), asyncio.run(made(form))).constraint
    assert constraint is not None
    grammar = asyncio.run(made(constraint))
    assert is_taken(grammar, text)
    assert is_taken(grammar, TEXTS["hermes"])
    assert not is_taken(grammar, other)


def nested_tool(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return {"type": "function", "function": {"name": "deep", "parameters": schema}}


async def made(constraint: Any) -> str:
    checker = GrammarChecker(model_folder(), tokenizer().vocab_size)
    try:
        return await checker.grammar(constraint)
    finally:
        await checker.close()


@pytest.mark.parametrize(
    ("tools", "choice", "family", "fault"),
    [
        ([TOOL], "auto", None, "tools: found .*knows no tools"),
        ("x", None, "hermes", "tools: found 'x'"),
        ([TOOL] * 200, None, "hermes", "tools: found"),
        ([TOOL, TOOL], None, "hermes", "tools: found .*another name"),
        ([{"type": "function"}], None, "hermes", r"tools\[0\]: found"),
        ([{"type": "function", "function": {"name": "a b"}}], None, "hermes", r"tools\[0\].function.name: found"),
        (
            [{"type": "function", "function": {"name": "a", "parameters": 5}}],
            None,
            "hermes",
            r"tools\[0\].function.par",
        ),
        ([TOOL], "sometimes", "hermes", "tool_choice: found"),
        ([TOOL], {"type": "function", "function": {"name": "x"}}, "hermes", "tool_choice: found"),
        ([], "required", "hermes", "tool_choice: found 'required'; give tools"),
        ([nested_tool(2000)], "required", "hermes", "tools: found .*nested too deep"),
    ],
)
def test_wrong_tools_are_refused(tools: Any, choice: Any, family: str | None, fault: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{fault}"):
        tools_of(tools, choice, Family(family))


@pytest.mark.parametrize(
    "calls", ["x", [5], [{"function": {"name": "a", "arguments": "{"}}], [{"function": {"name": "a"}}]]
)
def test_wrong_calls_of_earlier_turns_are_refused(calls: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages\[1\].tool_calls"):
        calls_of("messages[1].tool_calls", calls, Family("hermes"))


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        ("{{ messages }}", {}, Family()),
        ("... <tool_call> ... </think>", {}, Family("hermes", True)),
        ("... <tool_call> ... </think>", {"tool_parser": "none", "reasoning_parser": "none"}, Family()),
        (f"... {deepseek.OPENING} ...", {}, Family("deepseek")),
        ('{"name": function name, "parameters": dictionary}', {}, Family("llama3")),
        ("", {"tool_parser": "llama3", "reasoning_parser": "think"}, Family("llama3", True)),
    ],
)
def test_a_template_shows_its_family(template: str, settings: Any, expected: Family) -> None:
    assert Family.of(Model(path="x", **settings), template) == expected


def test_official_clients_get_calls_whole_and_streamed() -> None:
    """The fake engines answer with the prompt, in which the user has written a call."""
    messages: Any = [
        {"role": "system", "content": "."},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "noon"},
        {"role": "user", "content": f"<tool_call>{WEATHER}</tool_call>"},
    ]

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, model={"tool_parser": "hermes"}) as (service, _):
            base_url = f"http://{service.http_address}/v1"
            async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
                ask: Any = {"model": MODEL, "messages": messages, "tools": [TOOL], "max_tokens": 118}
                choice = (await client.chat.completions.create(**ask)).choices[0]
                assert choice.message.tool_calls is not None
                call: Any = choice.message.tool_calls[0]
                assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"town": "Köln"})
                assert choice.message.content is not None
                assert hermes.OPENING not in choice.message.content
                content, calls = "", list[Any]()
                async for event in await client.chat.completions.create(**ask, stream=True):
                    content += event.choices[0].delta.content or ""
                    calls += event.choices[0].delta.tool_calls or []
                assert content == choice.message.content
                assert [one.index for one in calls] == list(range(len(choice.message.tool_calls)))
                assert [one.function.arguments for one in calls] == [
                    one.function.arguments for one in choice.message.tool_calls if one.type == "function"
                ]
                unasked = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=118)
                assert hermes.OPENING in (unasked.choices[0].message.content or "")

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))


def test_official_clients_may_give_tools_and_a_form_of_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars: list[Any] = []
    schema = {"type": "object", "properties": {"age": {"type": "integer"}}}
    ask: Any = {
        "model": MODEL,
        "messages": [{"role": "user", "content": f"<tool_call>{WEATHER}</tool_call>"}],
        "tools": [TOOL],
        "max_tokens": 118,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    }

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, model={"tool_parser": "hermes"}) as (service, _):
            place = service.dispatcher.engines.place

            def note(name: str, message: Any, tokens: int) -> None:
                grammars.extend([message.params.grammar] if isinstance(message, Prefill) else [])
                place(name, message, tokens)

            monkeypatch.setattr(service.dispatcher.engines, "place", note)
            base_url = f"http://{service.http_address}/v1"
            async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
                answer = await client.chat.completions.create(**ask)
                assert answer.choices[0].message.tool_calls
                answer = await client.chat.completions.create(**ask, tool_choice="none")
                assert answer.choices[0].message.tool_calls is None
                for name, wrong, field in (
                    (
                        "response_format",
                        {"type": "json_schema", "json_schema": {"schema": "{"}},
                        "response_format.json_",
                    ),
                    ("tools", [TOOL, UNSUPPORTED], "tools"),
                    ("tool_choice", "required", "tool_choice"),
                ):
                    with pytest.raises(openai.BadRequestError, match=f"{field}.*: found") as caught:
                        await client.chat.completions.create(**{**ask, name: wrong})
                    assert str(caught.value.param).startswith(field)

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))
    assert [is_taken(grammar, TEXTS["hermes"]) for grammar in grammars] == [True, False]
    assert all(is_taken(grammar, '{"age": 3}') for grammar in grammars)


def test_without_parallel_calls_an_answer_has_one() -> None:
    text = '<tool_call>{"name":"now"}</tool_call>'

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, model={"tool_parser": "hermes"}) as (service, _):
            base_url = f"http://{service.http_address}/v1"
            async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
                ask: Any = {"model": MODEL, "messages": [{"role": "user", "content": text * 2}], "tools": [OTHER]}
                for parallel, count in ((True, 2), (False, 1)):
                    answer = await client.chat.completions.create(**ask, max_tokens=120, parallel_tool_calls=parallel)
                    assert len(answer.choices[0].message.tool_calls or []) == count
                    deltas = await client.chat.completions.create(
                        **ask, max_tokens=120, parallel_tool_calls=parallel, stream=True
                    )
                    calls = [call async for event in deltas for call in event.choices[0].delta.tool_calls or []]
                    assert len(calls) == count

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))
