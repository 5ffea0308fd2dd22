"""Constrained answers of a whole cluster: from a client's words to text that matches, and again after a loss."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from splitserve.client import Client
from tests.worker_threads import running, topology

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def ask(client: Client, seed: int) -> list[tuple[str, str]]:
    found = client.generate("Who?", n=2, temperature=1.0, seed=seed, json_schema=json.dumps(SCHEMA), max_tokens=300)
    return [(sample.text, sample.finish_reason) for sample in found.result().samples]


@pytest.mark.parametrize("tp", [1, 2])
def test_what_a_client_gets_is_what_it_asked_for(tiny_model: Path, tp: int) -> None:
    with running(topology(tiny_model, decode_tp=tp)) as client:
        answers = [ask(client, seed) for seed in range(3)]
        for text, reason in [sample for answer in answers for sample in answer]:
            assert reason == "stop"
            jsonschema.validate(json.loads(text), SCHEMA)
        assert [ask(client, seed) for seed in range(3)] == answers
        choice = client.generate("Who?", choice=["you", "me"], logprobs=1).result().samples[0]
        assert choice.text in ("you", "me")
        assert len(choice.logprobs) == len(choice.token_ids)
