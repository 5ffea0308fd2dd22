"""What a client sends and gets, as plain typed values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from splitserve.router.v1 import splitserve_pb2 as pb

FinishReason = Literal["stop", "length"]
FINISH_REASONS: dict[int, FinishReason | None] = {
    pb.FINISH_REASON_UNSPECIFIED: None,
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}
Conversation = Sequence[Mapping[str, str]]


class SplitserveClientError(Exception):
    """A call that failed. `code` is the gRPC status name; `retry_after_s` says when a refused call may come again."""

    def __init__(self, code: str, message: str, retry_after_s: float | None = None) -> None:
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        super().__init__(f"{code}: {message}")


class Sampling(TypedDict, total=False):
    """Sampling parameters; those not given take the cluster's defaults (greedy, seed 0, up to the context's end)."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    json_schema: str  # of these four, one at most: what the whole answer must be
    regex: str
    grammar: str
    choice: Sequence[str]


@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of a token, and of the likeliest ones as (token id, log probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """What is new of one sample. `logprobs` has one entry per token id if they were asked for, else none."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Usage:
    """Token counts; `cached_tokens` of the prompt did not have to be computed."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the time went, in seconds. TPOT is the mean time between tokens after the first."""

    queue_s: float
    prefill_s: float
    kv_transfer_s: float
    decode_s: float
    ttft_s: float
    tpot_s: float
    total_s: float


@dataclass(frozen=True)
class Summary:
    """How a request went. `losses`: how often it had to go on elsewhere, because engines or its KV were lost."""

    usage: Usage
    timings: Timings
    prefill_engine: str
    decode_engine: str
    losses: int


@dataclass(frozen=True)
class Sample:
    """One finished sample."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason


@dataclass(frozen=True)
class Completion:
    """A finished request: its samples by index, and how it went."""

    request_id: str
    samples: tuple[Sample, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    summary: Summary

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.samples[0].text


@dataclass(frozen=True)
class Model:
    """A served model; `context` counts tokens of prompt and answer together."""

    name: str
    context: int
    vocab_size: int


@dataclass(frozen=True)
class Engine:
    """One engine as the router sees it; `last_seen_s` is the age of its last answer in seconds.

    Tokens and steps count since its incarnation started: prompt tokens looked up in its prefix cache, those found
    there, those computed, and tokens of answers.
    """

    name: str
    role: str
    incarnation: str
    state: Literal["starting", "ready", "draining", "silent"]
    running: int
    waiting: int
    free_kv_tokens: int
    total_kv_tokens: int
    preemptions: int
    last_seen_s: float
    slots: int
    queried_tokens: int
    cached_tokens: int
    prompt_tokens: int
    output_tokens: int
    decode_steps: int


@dataclass(frozen=True)
class Latency:
    """In seconds."""

    p50_s: float
    p99_s: float


@dataclass(frozen=True)
class ClusterStatus:
    """The cluster as one router sees it. Latencies are those of the requests that it answered within a minute."""

    cluster: str
    version: str
    model: str
    engines: tuple[Engine, ...]
    active_requests: int
    queued_requests: int
    uptime_s: float
    recent_requests: int
    ttft: Latency
    tpot: Latency
