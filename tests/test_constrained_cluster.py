"""Constrained answers of a whole cluster: from a client's words to text that matches, and again after a loss."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
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


GPU = pytest.param("cuda", marks=pytest.mark.gpu)


def cluster(model: Path, device: str, tp: int = 1) -> AbstractContextManager[Client]:
    return running(topology(model, decode_tp=tp, device=device, dtype="float32" if device == "cpu" else "bfloat16"))


# Not two GPUs by two threads: before torch captures a graph it empties the caches of all devices of its process, which
# fails while another thread captures. tests/deploy/test_gpu_cluster.py has ranks in processes, as clusters do.
@pytest.mark.parametrize(("device", "tp"), [("cpu", 1), ("cpu", 2), pytest.param("cuda", 1, marks=pytest.mark.gpu)])
def test_what_a_client_gets_is_what_it_asked_for(tiny_model: Path, device: str, tp: int) -> None:
    with cluster(tiny_model, device, tp) as client:
        answers = [ask(client, seed) for seed in range(3)]
        for text, reason in [sample for answer in answers for sample in answer]:
            assert reason == "stop"
            jsonschema.validate(json.loads(text), SCHEMA)
        assert [ask(client, seed) for seed in range(3)] == answers
        choice = client.generate("Who?", choice=["you", "me"], logprobs=1).result().samples[0]
        assert choice.text in ("you", "me")
        assert len(choice.logprobs) == len(choice.token_ids)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_stop_string_ends_a_constrained_answer_before_its_grammar_does(tiny_model: Path, device: str) -> None:
    with cluster(tiny_model, device) as client:
        whole = client.generate("Who?", regex="(ab){40}", max_tokens=200).result().samples[0]
        assert (whole.text, whole.finish_reason) == ("ab" * 40, "stop")
        for stop, text in (("aba", ""), ("bab", "a"), ("ababab", "")):
            found = client.generate("Who?", regex="(ab){40}", stop=[stop], max_tokens=200).result().samples[0]
            assert (found.text, found.finish_reason) == (text, "stop")
        late = client.generate("Who?", regex="(ab){20}cd(ab){20}", stop=["cd"], n=3, max_tokens=200).result()
        assert [(sample.text, sample.finish_reason) for sample in late.samples] == [("ab" * 20, "stop")] * 3
        again = client.generate("Who?", regex="(ab){40}", max_tokens=200).result().samples[0]
        assert again.token_ids == whole.token_ids, "what was stopped left nothing behind"
