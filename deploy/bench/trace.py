"""Recorded loads, in the open format of Mooncake's traces: a JSON object a line.

    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}

`timestamp` is in milliseconds and lengths are in tokens. Each of `hash_ids` stands for the next BLOCK_TOKENS of the
prompt: equal ids are equal tokens, so prompts share prefixes as they did when they were recorded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.load import LoadRequest

BLOCK_TOKENS = 512
MAX_LINE_BYTES = 2**20
Count = Annotated[int, Field(ge=1, le=10_000_000)]
BlockId = Annotated[int, Field(ge=0, lt=2**63)]


class Recorded(BaseModel):
    """One request of a trace. A prompt without `hash_ids` shares nothing with others."""

    timestamp: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    input_length: Count
    output_length: Count
    hash_ids: list[BlockId] | None = None


@dataclass(frozen=True)
class Trace:
    """Requests in order of their times. `left_out` were too long for the model."""

    requests: tuple[Recorded, ...]
    left_out: int

    def arrivals(self, speed: float) -> list[float]:
        """Seconds from the first request, as if time passed `speed` times as fast."""
        first = self.requests[0].timestamp
        return [(request.timestamp - first) / 1e3 / speed for request in self.requests]

    def prompts(self, vocab_size: int, seed: int) -> Iterator[LoadRequest]:
        """The requests with random tokens for their blocks; one at a time, since a trace is long."""
        for number, request in enumerate(self.requests):
            blocks = request.hash_ids
            if blocks is None:
                prompt = _tokens([seed, 1, number], vocab_size, request.input_length)
            else:
                prompt = [token for block in blocks for token in _tokens([seed, 0, block], vocab_size, BLOCK_TOKENS)]
            yield LoadRequest(tuple(prompt[: request.input_length]), request.output_length)


def read_trace(path: str, context: int, count: int | None) -> Trace:
    """The first `count` requests of a trace, or all, that fit into `context` tokens.

    Raises InvalidRequest with the line of what cannot be read.
    """
    found = sorted(read_requests(Path(path), count), key=lambda request: request.timestamp)
    fitting = tuple(request for request in found if request.input_length + request.output_length <= context)
    if not fitting:
        raise InvalidRequest("trace", path, f"it has no request that fits into the model's {context:,} tokens")
    return Trace(fitting, len(found) - len(fitting))


def read_requests(path: Path, count: int | None) -> list[Recorded]:
    """The first `count` requests of a trace, or all. Raises InvalidRequest with the line of what cannot be read."""
    requests: list[Recorded] = []
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE_BYTES), b""), start=1):
                if line.strip() and (count is None or len(requests) < count):
                    requests.append(_parse(path, number, line))
    except OSError as error:
        raise InvalidRequest("trace", str(path), f"{error.strerror}: name a readable file") from error
    if not requests:
        raise InvalidRequest("trace", str(path), "it has no requests: name a file with one a line")
    return requests


def _parse(path: Path, number: int, line: bytes) -> Recorded:
    try:
        request = Recorded.model_validate_json(line)
    except ValidationError as error:
        (first, *_) = error.errors(include_url=False)
        field = ".".join(str(part) for part in first["loc"])
        told = f"{field}: {first['msg']}" if field else first["msg"]
        raise InvalidRequest("trace", str(path), f"line {number}: {told}") from error
    if request.hash_ids is not None and len(request.hash_ids) * BLOCK_TOKENS < request.input_length:
        remedy = f"hash_ids: a prompt of {request.input_length} tokens needs one for every {BLOCK_TOKENS} tokens"
        raise InvalidRequest("trace", str(path), f"line {number}: {remedy}")
    return request


def _tokens(source: Sequence[int], vocab_size: int, count: int) -> list[int]:
    drawn: list[int] = np.random.default_rng(source).integers(vocab_size, size=count).tolist()
    return drawn
