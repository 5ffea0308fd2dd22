"""What an answer must be: how requests say it, and how grammars that are none, or too much, are refused."""

from __future__ import annotations

import asyncio
import json
import time
from asyncio.subprocess import Process
from collections.abc import Awaitable, Callable
from typing import Any

import httpx2
import openai
import pytest
from llguidance import LLMatcher

from splitserve.client import SplitserveClientError
from splitserve.client.types import Sampling
from splitserve.cluster.errors import InvalidRequest, Overloaded
from splitserve.cluster.messages import Prefill
from splitserve.models.grammar import GrammarCompiler
from splitserve.router.constraint import MAX_CHARACTERS, MOST_WAITING, REMEMBERED, Constraint, GrammarChecker
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.fake_engine import Behaviour
from splitserve.router.openai_constraints import constraint_of
from tests.router.routers import MODEL, eventually, model_folder, running_router, tokenizer

Checked = Callable[[GrammarChecker], Awaitable[None]]
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def run(scenario: Checked) -> None:
    async def main() -> None:
        checker = GrammarChecker(model_folder(), tokenizer().vocab_size)
        try:
            await scenario(checker)
        finally:
            await checker.close()

    asyncio.run(main())


def nested(depth: int) -> str:
    return '{"type":"object","properties":{"a":' * depth + "{}" + "}}" * depth


HOSTILE = {
    "primes": Constraint("json_schema", json.dumps({"type": "integer", "multipleOf": 999983 * 1000003}), "f"),
    "primes within Lark": Constraint("grammar", 'start: %json {"type": "integer", "multipleOf": 999985999949}', "f"),
    "depth": Constraint("json_schema", nested(1500), "f"),
    "parentheses": Constraint("regex", "(" * 30000 + "a" + ")" * 30000, "f"),
    "Lark's parentheses": Constraint("grammar", "start: " + "(" * 30000 + '"a"' + ")" * 30000, "f"),
    "GBNF's parentheses": Constraint("grammar", "root ::= " + "(" * 30000 + '"a"' + ")" * 30000, "f"),
    "products": Constraint(
        "json_schema",
        json.dumps({"allOf": [{"anyOf": [{"pattern": f"a{i}{j}.*"} for j in range(4)]} for i in range(12)]}),
        "f",
    ),
    "itself": Constraint("json_schema", '{"$ref": "#"}', "f"),
    "elsewhere": Constraint("json_schema", '{"$ref": "http://127.0.0.1:1/schema.json"}', "f"),
    "size": Constraint("regex", "a" * (MAX_CHARACTERS + 1), "f"),
    "nothing": Constraint("regex", "", "f"),
    "no JSON": Constraint("json_schema", "{", "f"),
    "no schema": Constraint("json_schema", '{"type": "strin"}', "f"),
    "not supported": Constraint("json_schema", '{"type": "array", "uniqueItems": true}', "f"),
    "no regex": Constraint("regex", "((", "f"),
    "no grammar": Constraint("grammar", "start: nowhere", "f"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_are_refused_within_bounds_and_the_next_one_is_not(name: str) -> None:
    async def scenario(checker: GrammarChecker) -> None:
        loop = asyncio.create_task(longest_stall())
        with pytest.raises(InvalidRequest, match=r"^f: found "):
            await checker.grammar(HOSTILE[name])
        assert await checker.grammar(Constraint("regex", "[0-9]+", "f"))
        loop.cancel()

    async def longest_stall() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            assert time.monotonic() - before < 1.0, "the router stood still"

    began = time.process_time()
    run(scenario)
    assert time.process_time() - began < 1.0, "the router did the work itself"


@pytest.mark.parametrize(
    ("constraint", "texts", "others"),
    [
        (Constraint("json_schema", json.dumps(SCHEMA), "f"), ['{"a":1}', '{\n  "a": 12\n}'], ["{}", '{"a":"x"}', "[]"]),
        (Constraint("json_schema", '{"type":"object"}', "f"), ["{}", '{"b": [1, null]}'], ["[]", '"x"', "{"]),
        (Constraint("regex", "a+(b|é)?", "f"), ["a", "aaé"], ["b", "ac", "aaéé"]),
        (Constraint.choice(["yes", "a.b*", "🙂 é\n", '"q"\\'], "f"), ["yes", "a.b*", "🙂 é\n", '"q"\\'], ["no", "axb"]),
        (Constraint("grammar", 'start: "x" /[0-9]/+', "f"), ["x1", "x123"], ["x", "1"]),
        (Constraint("grammar", 'root ::= "x" [0-9]+', "f"), ["x1", "x123"], ["x", "1"]),
    ],
)
def test_grammars_take_what_the_constraint_says(constraint: Constraint, texts: list[str], others: list[str]) -> None:
    compiler = GrammarCompiler(model_folder(), tokenizer().vocab_size, {2})

    def is_taken(grammar: str, text: str) -> bool:
        matcher: LLMatcher = compiler.compile(grammar)
        ids = tokenizer().encode(text)
        return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()

    async def scenario(checker: GrammarChecker) -> None:
        grammar = await checker.grammar(constraint)
        assert [is_taken(grammar, text) for text in texts] == [True] * len(texts)
        assert [is_taken(grammar, text) for text in others] == [False] * len(others)

    run(scenario)


def test_verdicts_are_remembered_and_not_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    async def ask(self: GrammarChecker, constraint: Constraint) -> dict[str, str]:
        asked.append(constraint.text)
        return {"error": "bad"} if constraint.text == "bad" else {"grammar": constraint.text}

    monkeypatch.setattr(GrammarChecker, "_ask", ask)

    async def scenario(checker: GrammarChecker) -> None:
        for field in ("one", "another"):
            assert await checker.grammar(Constraint("regex", "good", field)) == "good"
            with pytest.raises(InvalidRequest, match=f"^{field}: found 'bad'; bad"):
                await checker.grammar(Constraint("regex", "bad", field))
        assert asked == ["good", "bad"]
        for index in range(REMEMBERED):
            await checker.grammar(Constraint("regex", str(index), "f"))
        await checker.grammar(Constraint("regex", "good", "f"))
        assert asked[-1] == "good"
        assert len(checker._known) == REMEMBERED

    run(scenario)


def test_a_checker_that_was_killed_says_nothing_of_a_constraint(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario(checker: GrammarChecker) -> None:
        await checker.grammar(Constraint("regex", "[a-z]", "f"))
        assert checker._process is not None
        checker._process.kill()
        assert await checker.grammar(Constraint("regex", "[0-9]", "f"))

        start = GrammarChecker._start

        async def start_dying(self: GrammarChecker) -> Process:
            process = await start(self)
            process.kill()
            return process

        await checker.close()
        monkeypatch.setattr(GrammarChecker, "_start", start_dying)
        with pytest.raises(Overloaded, match="whatever checks grammars is killed"):
            await checker.grammar(Constraint("regex", "[a-f]", "f"))
        monkeypatch.undo()
        assert await checker.grammar(Constraint("regex", "[a-f]", "f"))

    run(scenario)


def test_a_client_that_leaves_amid_a_check_spoils_no_other() -> None:
    async def scenario(checker: GrammarChecker) -> None:
        leaving = asyncio.ensure_future(checker.grammar(HOSTILE["primes"]))
        await asyncio.sleep(0.02)  # the process that is asked takes longer to start
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert "[0-9]" in await checker.grammar(Constraint("regex", "[0-9]+", "f"))

    run(scenario)


@pytest.mark.parametrize(
    ("response_format", "structured_outputs", "expected"),
    [
        (None, None, None),
        ({"type": "text"}, None, None),
        ({"type": "json_object"}, None, ("json_schema", '{"type": "object"}')),
        (
            {"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": {}}},
            None,
            ("json_schema", "{}"),
        ),
        (None, {"json": SCHEMA}, ("json_schema", json.dumps(SCHEMA))),
        (None, {"json": "{}", "regex": None}, ("json_schema", "{}")),
        (None, {"json_object": True}, ("json_schema", '{"type": "object"}')),
        (None, {"regex": "a"}, ("regex", "a")),
        (None, {"grammar": "start: /a/"}, ("grammar", "start: /a/")),
        ({"type": "text"}, {"choice": ["a", "b"]}, ("choice", '["a", "b"]')),
    ],
)
def test_how_bodies_say_it(response_format: Any, structured_outputs: Any, expected: tuple[str, str] | None) -> None:
    found = constraint_of(response_format, structured_outputs)
    assert (found and (found.kind, found.text)) == expected


@pytest.mark.parametrize(
    ("response_format", "structured_outputs", "fault"),
    [
        ("json", None, "response_format"),
        ({"type": "xml"}, None, "response_format"),
        ({"type": "json_schema"}, None, "response_format"),
        ({"type": "json_schema", "json_schema": {"schema": 5}}, None, "response_format.json_schema.schema"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "x": 1}}, None, "response_format.json_schema.x"),
        ({"type": "json_object"}, {"regex": "a"}, "structured_outputs"),
        (None, {}, "structured_outputs"),
        (None, ["a"], "structured_outputs"),
        (None, {"regex": "a", "choice": ["a"]}, "structured_outputs"),
        (None, {"regex": 5}, "structured_outputs.regex"),
        (None, {"regex": "\ud800"}, "structured_outputs.regex"),
        (None, {"choice": []}, "structured_outputs.choice"),
        (None, {"choice": ["a", ""]}, "structured_outputs.choice"),
        (None, {"choice": ["a", 5]}, "structured_outputs.choice.1."),
        (None, {"json": [1]}, "structured_outputs.json"),
    ],
)
def test_what_bodies_cannot_say(response_format: Any, structured_outputs: Any, fault: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^{fault}: found "):
        constraint_of(response_format, structured_outputs)


def test_both_surfaces_ask_engines_for_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars: list[str | None] = []

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster) as (service, client):
            place = service.dispatcher.engines.place

            def note(name: str, message: Any, tokens: int) -> None:
                grammars.extend([message.params.grammar] if isinstance(message, Prefill) else [])
                place(name, message, tokens)

            monkeypatch.setattr(service.dispatcher.engines, "place", note)
            good: list[Sampling] = [{"json_schema": '{"type": "object"}'}, {"choice": ["a", "b"]}, {"regex": "a"}]
            for sampling in good:
                await client.generate("x", **sampling).result()
            await client.chat([{"role": "user", "content": "x"}], max_tokens=3, grammar="start: /a/").result()
            bad: list[Sampling] = [{"regex": "(("}, {"choice": []}, {"regex": "a", "min_tokens": 2}]
            for sampling in bad:
                with pytest.raises(SplitserveClientError, match=f"INVALID_ARGUMENT: {list(sampling)[-1]}: found"):
                    await client.generate("x", **sampling).result()
            base_url = f"http://{service.http_address}/v1"
            async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as http:
                await by_http(http)

    async def by_http(client: openai.AsyncOpenAI) -> None:
        messages: Any = [{"role": "user", "content": "x"}]
        await client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=3, response_format={"type": "json_object"}
        )
        await client.completions.create(
            model=MODEL, prompt="x", max_tokens=3, extra_body={"structured_outputs": {"choice": ["a", "b"]}}
        )
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(
                model=MODEL, messages=messages, extra_body={"structured_outputs": {"regex": "(("}}
            )
        assert caught.value.param == "structured_outputs.regex"

    with FakeCluster() as cluster:
        asyncio.run(scenario(cluster))
    assert all(grammars)
    assert len(grammars) == 6
    assert grammars[0] == grammars[4]
    assert grammars[1] == grammars[5]


def slow_checks(monkeypatch: pytest.MonkeyPatch, seconds: float = 30.0) -> list[str]:
    """Makes a check take its time; returns those that were begun and, with a - before them, ended early."""
    asked: list[str] = []

    async def ask(self: GrammarChecker, constraint: Constraint) -> dict[str, str]:
        asked.append(constraint.text)
        try:
            await asyncio.sleep(seconds)
        finally:
            asked.append(f"-{constraint.text}")
        return {"grammar": constraint.text}

    monkeypatch.setattr(GrammarChecker, "_ask", ask)
    return asked


def test_a_check_ends_with_its_requests_deadline_or_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = slow_checks(monkeypatch)

    async def scenario() -> None:
        with FakeCluster() as cluster:
            async with running_router(cluster, default_deadline_s=0.3) as (service, client):
                for timeout_s in (0.3, None):
                    with pytest.raises(SplitserveClientError, match="DEADLINE_EXCEEDED"):
                        await client.generate("a", regex="a", timeout_s=timeout_s).result()
                base = f"http://{service.http_address}/v1/completions"
                body = {"prompt": "a", "structured_outputs": {"regex": "b"}}
                async with httpx2.AsyncClient() as http:
                    late = await http.post(base, json=body)
                    assert (late.status_code, late.json()["error"]["message"]) == (504, TOO_LATE)
                    patient = {"x-request-timeout": "30"}
                    with pytest.raises(httpx2.ReadTimeout):
                        await http.post(base, json=body, headers=patient, timeout=0.3)
                await eventually(lambda: asked.count("-b") == 2)

    TOO_LATE = "0.3 s passed while the request was checked"
    asyncio.run(scenario())
    assert asked == ["a", "-a"] * 2 + ["b", "-b"] * 2


def test_a_deadline_counts_the_check_and_is_told_as_it_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_checks(monkeypatch, seconds=0.8)

    async def scenario(cluster: FakeCluster) -> None:
        async with running_router(cluster, default_deadline_s=1.2) as (service, client):
            began = time.monotonic()
            with pytest.raises(SplitserveClientError, match=r"1\.2 s passed while between"):
                await client.generate("a", regex="a").result()
            assert time.monotonic() - began < 0.8 + 1.2
            async with httpx2.AsyncClient() as http:
                body = {"prompt": "a", "structured_outputs": {"regex": "b"}}
                late = await http.post(f"http://{service.http_address}/v1/completions", json=body)
            assert late.json()["error"]["message"].startswith("1.2 s passed while between")

    with FakeCluster(behaviour=Behaviour(prefill_s=9.0)) as cluster:
        asyncio.run(scenario(cluster))


def test_the_line_of_those_to_be_checked_has_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    slow_checks(monkeypatch)

    async def scenario(checker: GrammarChecker) -> None:
        texts = [str(number) for number in range(MOST_WAITING)] + ["0"] * 40
        waiting = [asyncio.ensure_future(checker.grammar(Constraint("regex", text, "f"))) for text in texts]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="32 constraints wait to be checked"):
            await checker.grammar(Constraint("regex", "more", "f"))
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        assert not checker._waiting

    run(scenario)
