"""Constrained answers: what comes matches, depends on nothing but its request, and hostile grammars harm nobody."""

from __future__ import annotations

import json
import random
import re
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import tokenizers
from llguidance import LLMatcher

from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.sampling import SamplingParams
from splitserve.models.grammar import GrammarCompiler
from tests.engines import Answer, InProcessCluster, Settings

EOS = 2
SAMPLED = SamplingParams(max_tokens=400, temperature=1.0, seed=3)
PHONE = r"[0-9]{3}-[0-9]{4}( x[0-9]{1,3})?"
SETTINGS = Settings()
COMPACT = {"whitespace_flexible": False}


def regex(pattern: str) -> str:
    return LLMatcher.grammar_from_regex(pattern)


def schema_grammar(schema: dict[str, Any]) -> str:
    return LLMatcher.grammar_from_json_schema(schema, overrides=COMPACT)  # type: ignore[arg-type]


def random_schema(dice: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema of which every text is short."""
    kinds = ["string", "pattern", "integer", "enum", "boolean", "null"] + ["object", "array", "anyOf"] * (depth > 0)
    match dice.choice(kinds):
        case "string":
            return {"type": "string", "minLength": dice.randint(0, 2), "maxLength": dice.randint(2, 8)}
        case "pattern":
            return {"type": "string", "pattern": dice.choice(["^[a-c]{2,5}$", "^(x|yy)[0-9]$", "^[A-Z][a-z]{1,6}$"])}
        case "integer":
            low = dice.randint(-1000, 1000)
            return {"type": "integer", "minimum": low, "maximum": low + dice.randint(0, 5000)}
        case "enum":
            return {"enum": dice.sample(["red", "é", "a b", 7, None, True, 'q"'], dice.randint(1, 4))}
        case "object":
            names = dice.sample(["name", "age", "x", "größe", "a b"], dice.randint(0, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(dice, depth - 1) for name in names},
                "required": [name for name in names if dice.random() < 0.7],
                "additionalProperties": False,
            }
        case "array":
            low = dice.randint(0, 2)
            items = random_schema(dice, depth - 1)
            return {"type": "array", "items": items, "minItems": low, "maxItems": low + dice.randint(0, 2)}
        case "anyOf":
            return {"anyOf": [random_schema(dice, depth - 1) for _ in range(2)]}
        case kind:
            return {"type": kind}


def text_of(folder: Path, token_ids: Sequence[int]) -> str:
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.decode(list(token_ids), skip_special_tokens=True)


def prompt(seed: int) -> list[int]:
    dice = random.Random(seed)
    return dice.choices(range(3, 300), k=dice.randint(5, 60))


def answer(folder: Path, params: SamplingParams, settings: Settings = SETTINGS, seed: int = 0) -> Answer:
    cluster = InProcessCluster(folder, settings)
    cluster.ask("a", prompt(seed), params)
    found = cluster.run()["a"]
    cluster.settle()
    assert cluster.free_pages() == [settings.pages] * len(cluster.blocks)
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_validate_against_120_random_schemas(tiny_model: Path, temperature: float) -> None:
    dice = random.Random(int(temperature))
    cluster = InProcessCluster(tiny_model, Settings(slots=16))
    schemas = {str(index): random_schema(dice) for index in range(120)}
    waiting = list(schemas)
    params = replace(SAMPLED, temperature=temperature, logprobs=1)
    while waiting:
        batch, waiting = waiting[:30], waiting[30:]
        for name in batch:
            grammar = schema_grammar(schemas[name])
            cluster.ask(name, prompt(int(name)), replace(params, grammar=grammar, seed=int(name)))
        cluster.run()
    for name, schema in schemas.items():
        found = cluster.answers[name]
        assert found.failed is None
        assert found.reasons == {0: "stop"}
        assert found.tokens[0][-1] == EOS
        assert len(found.logprobs[0]) == len(found.tokens[0])
        jsonschema.validate(json.loads(text_of(tiny_model, found.tokens[0])), schema)


@pytest.mark.parametrize("pattern", [PHONE, "(yes|no|vielleicht, 你好)", r"[a-f]{8}", "a?", r"([a-zöü]{1,9} ){2}[.]"])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 5.0])
def test_answers_match_a_regex_wholly(tiny_model: Path, pattern: str, temperature: float) -> None:
    params = replace(SAMPLED, temperature=temperature, top_p=0.9, top_k=40, n=4, grammar=regex(pattern))
    found = answer(tiny_model, params)
    for sample in range(4):
        assert found.reasons[sample] == "stop"
        assert re.fullmatch(pattern, text_of(tiny_model, found.tokens[sample]))


def test_the_mask_stands_above_bias_and_penalties(tiny_model: Path) -> None:
    fast = tokenizers.Tokenizer.from_file(str(tiny_model / "tokenizer.json"))
    (barred,), (wanted,) = fast.encode("a").ids, fast.encode("z").ids
    params = replace(SAMPLED, logit_bias={barred: -100.0, wanted: 100.0}, repetition_penalty=2.0, grammar=regex("a{3}"))
    assert text_of(tiny_model, answer(tiny_model, params).tokens[0]) == "aaa"


@pytest.fixture(scope="module")
def alone(tiny_model: Path) -> Answer:
    return answer(tiny_model, constrained(0), Settings(split=False))


def constrained(seed: int) -> SamplingParams:
    schema = {"type": "array", "items": {"type": "string", "maxLength": 12}, "minItems": 3, "maxItems": 9}
    return replace(SAMPLED, seed=seed, n=2, logprobs=3, grammar=schema_grammar(schema))


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
@pytest.mark.parametrize("pages", [256, 24], ids=["room", "preemption"])
def test_neighbours_change_no_bit(tiny_model: Path, alone: Answer, split: bool, pages: int) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split, pages=pages, slots=8))
    for index in range(1, 9):
        grammar = regex(PHONE) if index % 3 == 0 else schema_grammar({"type": "string", "maxLength": 40})
        plain = replace(SAMPLED, max_tokens=30, seed=index, ignore_eos=index % 2 == 1)
        cluster.ask(str(index), prompt(index), plain if index % 2 else replace(plain, grammar=grammar))
        cluster.step()
    cluster.ask("a", prompt(0), constrained(0))
    found = cluster.run()["a"]
    assert (found.tokens, found.reasons, found.logprobs) == (alone.tokens, alone.reasons, alone.logprobs)


@pytest.mark.parametrize("answered", [1, 2, 7, 20])
def test_goes_on_elsewhere_with_the_same_tokens(tiny_model: Path, alone: Answer, answered: int) -> None:
    known = alone.tokens[1][:answered]
    assert len(known) < len(alone.tokens[1]), "the answer is too short to be gone on with"
    cluster = InProcessCluster(tiny_model)
    cluster.ask("a", prompt(0) + known, replace(constrained(0), n=1), first_sample=1, output_tokens=answered)
    cluster._asked["a"] = (cluster._asked["a"][0], replace(constrained(0), n=1))
    assert known + cluster.run()["a"].tokens[1] == alone.tokens[1]


def test_what_the_grammar_forbids_cannot_have_been_answered(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model)
    params = replace(SAMPLED, grammar=regex("[0-9]+"))
    cluster.ask("a", [*prompt(0), 40, 41], params, output_tokens=2)
    failed = cluster.run()["a"].failed
    assert failed is not None
    assert failed.code == "INVALID_ARGUMENT"
    assert failed.message.startswith("answered: found")


@pytest.mark.parametrize("grammar", ["nonsense {", regex("(("), schema_grammar({"type": "strin"})])
def test_what_is_no_grammar_fails_its_request_alone(tiny_model: Path, grammar: str) -> None:
    cluster = InProcessCluster(tiny_model)
    cluster.ask("bad", prompt(0), replace(SAMPLED, grammar=grammar))
    cluster.ask("good", prompt(0), replace(SAMPLED, grammar=regex("a{3}")))
    found = cluster.run()
    assert found["bad"].failed is not None
    assert found["bad"].failed.code == "INVALID_ARGUMENT"
    assert found["bad"].failed.message.startswith("grammar: found")
    assert found["good"].reasons == {0: "stop"}
    cluster.settle()
    assert cluster.free_pages() == [256, 256]


def test_who_waits_for_a_mask_keeps_nobody_waiting(
    tiny_model: Path, alone: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks of one request come late, after the others are done; its answer is what it always is."""
    free = threading.Event()
    compile_now = GrammarCompiler.compile

    def compile_late(self: GrammarCompiler, grammar: str) -> LLMatcher:
        if grammar == constrained(0).grammar:
            assert free.wait(30)
        return compile_now(self, grammar)

    monkeypatch.setattr(GrammarCompiler, "compile", compile_late)
    cluster = InProcessCluster(tiny_model)
    cluster.ask("a", prompt(0), constrained(0))
    late = cluster.answers["a"]
    cluster.ask("plain", prompt(1), replace(SAMPLED, max_tokens=20, ignore_eos=True))
    while not cluster.answers["plain"].reasons:
        cluster.step()
    assert not late.tokens
    free.set()
    assert cluster.run()["a"].tokens == alone.tokens


@pytest.mark.parametrize(
    "changes", [{"min_tokens": 3}, {"ignore_eos": True}, {"grammar": ""}, {"grammar": "x" * 1_100_000}]
)
def test_parameters_that_contradict_a_grammar_are_refused(changes: dict[str, Any]) -> None:
    params = replace(SAMPLED, **{"grammar": "x", **changes})
    with pytest.raises(InvalidRequest, match=f"^{next(iter(changes))}: found"):
        params.validate(384)
