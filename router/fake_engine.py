"""Fake engines for tests and benchmarks: real messages over real sockets, no model, and faults on demand.

They answer every prompt with its own tokens, over and over. KV "moves" by a call from one fake to the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from splitserve.cluster.channel import CurveKeys, WorkerChannel
from splitserve.cluster.counts import BytesUsed, EngineCounts, TransferCounts
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import (
    Busy,
    Cancel,
    EngineSpeed,
    EngineStats,
    Failed,
    FetchPrefix,
    FinishReason,
    FirstToken,
    Granted,
    Heartbeat,
    Joined,
    Member,
    Prefill,
    RankEndpoint,
    Reserve,
    SampleToken,
    SendPrefix,
    SendTo,
    StepTokens,
    Ticket,
    TokenLogprobs,
)

LAYOUT = KvLayout(tp=1, num_layers=1, planes=2, num_kv_heads=1, head_dim=1, page_size=16, dtype="float32")
TOKENS_PER_REQUEST = 16  # where the request sets no max_tokens
IDLE_S = 0.02
NO_LOGPROBS = TokenLogprobs(-0.5, ())

Role = Literal["prefill", "decode", "colocated"]


@dataclass(frozen=True)
class Behaviour:
    """How fake engines behave; durations in seconds."""

    grant_s: float = 0.0  # that decode takes to grant
    prefill_s: float = 0.0
    transfer_s: float = 0.0
    step_s: float = 0.002
    slots: int = 1024  # requests that a decode engine takes before it answers Busy
    retry_after_s: float = 0.02
    first_token_delay_s: float = 0.0  # sends first tokens late, after decode's
    fail_prefill: tuple[str, str] | None = None  # (code, message) of Failed instead of a first token
    speed: EngineSpeed = field(default_factory=EngineSpeed)  # as they tell it
    fetches: bool = False  # prefixes that other prefill engines have


PROMPT = Behaviour()


@dataclass
class _Job:
    """One attempt on one engine. `position` is that of the next token; `target` the decode engine that gets its KV."""

    router: bytes
    message: Reserve | Prefill
    position: int = field(init=False)
    live: set[int] = field(init=False)
    target: str = ""
    transferred: bool = False

    def __post_init__(self) -> None:
        self.position = len(self.message.token_ids)
        self.live = set(range(self.message.first_sample, self.message.first_sample + self.message.params.n))

    @property
    def key(self) -> tuple[str, int]:
        return self.message.request_id, self.message.attempt

    @property
    def end(self) -> int:
        prompt = len(self.message.token_ids) - self.message.output_tokens
        return prompt + (self.message.params.max_tokens or TOKENS_PER_REQUEST)

    def token(self, sample: int) -> SampleToken:
        """The token at the current position."""
        message = self.message
        prompt = message.token_ids[: len(message.token_ids) - message.output_tokens]
        token_id = prompt[(self.position + sample) % len(prompt)]
        reason: FinishReason | None = "length" if self.position + 1 == self.end else None
        logprobs = None if message.params.logprobs is None else NO_LOGPROBS
        return SampleToken(*self.key, sample, self.position, token_id, reason, logprobs)


class Surroundings(Protocol):
    """What a fake engine needs besides its socket."""

    behaviour: Behaviour

    def on_step(self, tokens: Sequence[SampleToken]) -> None:
        """See `tokens` just before they are sent."""

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` in the engines' thread."""

    def join(self, decode: str, key: tuple[str, int]) -> None:
        """Move a request's KV to engine `decode`."""


class FakeEngine:
    """One engine; `cluster` carries its timers and its KV."""

    def __init__(self, name: str, role: Role, incarnation: str, cluster: Surroundings, keys: CurveKeys | None) -> None:
        self.channel = WorkerChannel("127.0.0.1", keys)
        self.member = Member(name, incarnation, role, self.channel.address, LAYOUT)
        self.cancels: list[Cancel] = []
        self.lent: list[SendPrefix] = []
        self.jobs: dict[tuple[str, int], _Job] = {}
        self.decoding: dict[tuple[str, int], _Job] = {}
        self._cluster = cluster
        self._behaviour = cluster.behaviour
        self._counts: Counter[str] = Counter()
        self._handed_over = 0
        self._next_step = 0.0
        self._closed = False

    def receive(self) -> None:
        """Handle all waiting messages."""
        for router, message in self.channel.receive():
            match message:
                case Heartbeat():
                    self._send(router, self._stats())
                case Reserve():
                    self._reserve(router, message)
                case Prefill():
                    self._prefill(router, message)
                case SendTo():
                    self._send_to(message)
                case SendPrefix():
                    self.lent.append(message)
                case Cancel():
                    self._cancel(message)

    def close(self) -> None:
        """Be gone: what still wants to happen here does not."""
        self._closed = True
        self.jobs.clear()
        self.decoding.clear()
        self.channel.close()

    def join(self, key: tuple[str, int]) -> None:
        """The KV of a request is here: decode it."""
        job = self.jobs.get(key)
        if job is None:
            return
        self._send(job.router, Joined(*key))
        job.position += 1
        if job.position < job.end:
            self.decoding[key] = job
        else:
            del self.jobs[key]

    def step(self, now: float) -> float:
        """One token for every live sample, if a step is due. Returns when the next one is."""
        if not self.decoding:
            return now + IDLE_S
        if now < self._next_step:
            return self._next_step
        self._next_step = max(self._next_step + self._behaviour.step_s, now)
        by_router: dict[bytes, list[SampleToken]] = {}
        self._counts["decode_steps"] += 1
        for key, job in list(self.decoding.items()):
            self._counts["output_tokens"] += len(job.live)
            by_router.setdefault(job.router, []).extend(map(job.token, sorted(job.live)))
            job.position += 1
            if job.position == job.end:
                del self.decoding[key], self.jobs[key]
        for router, tokens in by_router.items():
            self._cluster.on_step(tokens)
            self._send(router, StepTokens(tuple(tokens)))
        return self._next_step

    def _send(self, router: bytes, message: object) -> None:
        if not self._closed:
            self.channel.send(router, message)

    def _stats(self) -> EngineStats:
        member, running = self.member, len(self.jobs)
        return EngineStats(
            engine=member.engine,
            incarnation=member.incarnation,
            role=member.role,
            layout=LAYOUT,
            running=running,
            waiting=0,
            free_tokens=10_000,
            total_tokens=10_000,
            preemptions=0,
            slots=self._behaviour.slots,
            host_tier=BytesUsed(0, 0),
            staging=BytesUsed(0, int(self._behaviour.fetches)),
            counts=EngineCounts(**self._counts),
            transfers=(TransferCounts("memory", started=self._handed_over, completed=self._handed_over),),
            links_up=0,
            speed=self._behaviour.speed,
        )

    def _reserve(self, router: bytes, message: Reserve) -> None:
        key = (message.request_id, message.attempt)
        if len(self.jobs) >= self._behaviour.slots:
            self._send(router, Busy(*key, self._behaviour.retry_after_s))
            return
        self.jobs[key] = _Job(router, message)
        ticket = self._ticket(key, len(message.token_ids))
        self._cluster.after(self._behaviour.grant_s, lambda: self._send(router, Granted(*key, ticket)))

    def _ticket(self, key: tuple[str, int], num_tokens: int) -> Ticket:
        endpoint = RankEndpoint(self.member.engine, "memory", "localhost", "", 0, 0)
        return Ticket("/".join(map(str, key)), 1, LAYOUT, 0, num_tokens, 10.0, (endpoint,))

    def _prefill(self, router: bytes, message: Prefill) -> None:
        key = (message.request_id, message.attempt)
        job = _Job(router, message)
        if self.member.role == "prefill":
            self.jobs[key] = job
        if message.cached is not None:
            self._send(router, FetchPrefix(*key, self._ticket(key, message.cached.num_tokens)))
        self._cluster.after(self._behaviour.prefill_s, lambda: self._answer(key, job))

    def _send_to(self, message: SendTo) -> None:
        key = (message.request_id, message.attempt)
        if (job := self.jobs.get(key)) is not None:
            job.target = message.ticket.endpoints[0].address
            self._hand_over(key, job)

    def _answer(self, key: tuple[str, int], job: _Job) -> None:
        if key not in self.jobs:
            return
        if self._behaviour.fail_prefill is not None:
            self.jobs.pop(key)
            self._send(job.router, Failed(*key, *self._behaviour.fail_prefill))
            return
        prompt_logprobs = None
        if job.message.params.prompt_logprobs is not None:
            prompt_logprobs = (NO_LOGPROBS,) * (len(job.message.token_ids) - 1)
        tokens = tuple(map(job.token, sorted(job.live)))
        self._counts["queried_tokens"] += len(job.message.token_ids)
        self._counts["prompt_tokens"] += len(job.message.token_ids)
        self._counts["output_tokens"] += len(tokens)
        first = FirstToken(*key, tokens, prompt_logprobs, 0, 0.0, self._behaviour.prefill_s)
        self._cluster.on_step(tokens)
        self._cluster.after(self._behaviour.first_token_delay_s, lambda: self._send(job.router, first))
        self._cluster.after(self._behaviour.transfer_s, lambda: self._transferred(key))

    def _transferred(self, key: tuple[str, int]) -> None:
        if (job := self.jobs.get(key)) is not None:
            job.transferred = True
            self._hand_over(key, job)

    def _hand_over(self, key: tuple[str, int], job: _Job) -> None:
        if not (job.target and job.transferred):
            return
        if self.member.role == "prefill":
            del self.jobs[key]
        self._handed_over += 1
        self._cluster.join(job.target, key)

    def _cancel(self, message: Cancel) -> None:
        self.cancels.append(message)
        key = (message.request_id, message.attempt)
        job = self.decoding.get(key)
        if message.sample is not None and job is not None:
            job.live.discard(message.sample)
        if message.sample is None or (job is not None and not job.live):
            self.jobs.pop(key, None)
            self.decoding.pop(key, None)
