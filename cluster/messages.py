"""What the processes of a cluster say to each other.

    router                 prefill engine                 decode engine
      | Reserve ------------------------------------------->|
      |<------------------------------- Granted | Busy | Failed
      | Prefill -------------->|                             |   at once, where decode is known to have room
      | SendTo(ticket) ------->|                             |   once it is granted
      |<---------- FirstToken  | == KV frames, by layer ===> |
      |<-------------------------------------------- Joined  |   KV committed, the sequence has a slot
      |<---------------------------------------- StepTokens  |   one message a step, all of a router's requests
      | Cancel ----------------+---------------------------->|
      |<------ FetchPrefix ----|                                 it lacks what another engine has cached:
      | SendPrefix(ticket) -------------> that engine            its KV comes by the same protocol
      | Heartbeat -------------+---------------------------->|   keeps this router's requests leased
      |<------------ EngineStats, PrefixUpdate --------------|

Every message about a request carries its id and attempt; receivers ignore attempts that they do not know. `Failed`
ends the attempt on the engine that sends it. Durations are in seconds; nobody compares clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitserve.cluster.codec import message
from splitserve.cluster.counts import BytesUsed, EngineCounts, TransferCounts, Transport
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.sampling import SamplingParams

FinishReason = Literal["stop", "length", "cancelled"]


def transfer_id_of(request_id: str, attempt: int) -> str:
    """What the transfer of an attempt's KV is known by, before and after it is granted."""
    return f"{request_id}/{attempt}"


@message
@dataclass(frozen=True)
class RankEndpoint:
    """Where one decode rank takes KV: its socket, its staging segment and the window of it that is granted.

    `transport` is the way to its segment on its own `host`; `link` is where communicators with it meet, if any do.
    """

    address: str
    transport: Transport
    host: str
    segment: str
    window_offset: int
    window_bytes: int
    link: str = ""


@message
@dataclass(frozen=True)
class Ticket:
    """A decode engine's leave to send it the KV of prompt positions [start_token, num_tokens)."""

    transfer_id: str
    epoch: int
    layout: KvLayout
    start_token: int
    num_tokens: int
    lease_s: float
    endpoints: tuple[RankEndpoint, ...]


@message
@dataclass(frozen=True)
class HandOff:
    """Travels behind the last KV frame of a transfer, from rank 0 of prefill: what decode goes on from.

    `KvSender.finish(transfer_id, hand_off)` sends it, and the receiver's event that the KV is complete carries it.
    """

    first_tokens: tuple[int, ...]


@message
@dataclass(frozen=True)
class Reserve:
    """Ask a decode engine for pages, slots and staging. `source` is the KV layout that prefill will send from.

    An attempt that goes on from an earlier one is for one sample, number `first_sample`: the last `output_tokens` of
    `token_ids` are what that has answered so far.
    """

    request_id: str
    attempt: int
    token_ids: list[int]
    params: SamplingParams
    source: KvLayout
    deadline_s: float
    extra_keys: tuple[str, ...] = ()
    first_sample: int = 0
    output_tokens: int = 0


@message
@dataclass(frozen=True)
class Granted:
    request_id: str
    attempt: int
    ticket: Ticket


@message
@dataclass(frozen=True)
class Busy:
    """No room now. Ask again after `retry_after_s`, or elsewhere."""

    request_id: str
    attempt: int
    retry_after_s: float


@message
@dataclass(frozen=True)
class Cached:
    """Another engine, with KV of layout `source`, has the first `num_tokens` of a prompt cached."""

    source: KvLayout
    num_tokens: int


@message
@dataclass(frozen=True)
class Prefill:
    """Compute the tokens of a reservation. Where their KV goes `SendTo` says, now or later.

    What is `cached` elsewhere is fetched from there, as long as computing it would not be sooner done.
    """

    request_id: str
    attempt: int
    token_ids: list[int]
    params: SamplingParams
    deadline_s: float
    extra_keys: tuple[str, ...] = ()
    first_sample: int = 0
    output_tokens: int = 0
    cached: Cached | None = None


@message
@dataclass(frozen=True)
class SendTo:
    """Decode has granted what prefill was asked for: its KV goes there."""

    request_id: str
    attempt: int
    ticket: Ticket


@message
@dataclass(frozen=True)
class FetchPrefix:
    """From prefill: have what is cached elsewhere of this prompt sent here."""

    request_id: str
    attempt: int
    ticket: Ticket


@message
@dataclass(frozen=True)
class SendPrefix:
    """Send the KV of these tokens, which are cached, or decline the ticket."""

    token_ids: list[int]
    extra_keys: tuple[str, ...]
    ticket: Ticket


@message
@dataclass(frozen=True)
class TokenLogprobs:
    """Log probability of the chosen token and of the `top` likeliest (token id, log probability)."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@message
@dataclass(frozen=True)
class SampleToken:
    """One new token of one sample of a request. `position` is its place in the sequence, the prompt counted."""

    request_id: str
    attempt: int
    sample: int
    position: int
    token_id: int
    finish_reason: FinishReason | None = None
    logprobs: TokenLogprobs | None = None


@message
@dataclass(frozen=True)
class FirstToken:
    """Prefill's answer: a first token for each sample. `prompt_logprobs`: an entry per prompt token but the first."""

    request_id: str
    attempt: int
    tokens: tuple[SampleToken, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] | None
    cached_tokens: int
    queue_s: float
    prefill_s: float


@message
@dataclass(frozen=True)
class Joined:
    """The KV is committed and the request's samples take part in decode."""

    request_id: str
    attempt: int


@message
@dataclass(frozen=True)
class StepTokens:
    """All new tokens of one decode step for the requests of one router."""

    tokens: tuple[SampleToken, ...]


@message
@dataclass(frozen=True)
class Failed:
    """The attempt is over on the engine that says so. `code` is a gRPC status name."""

    request_id: str
    attempt: int
    code: str
    message: str


@message
@dataclass(frozen=True)
class Cancel:
    """Free everything of a request, or one `sample` of it (None: all)."""

    request_id: str
    attempt: int
    sample: int | None = None


@message
@dataclass(frozen=True)
class Heartbeat:
    """From a router: its requests are alive for another lease. Answered with EngineStats.

    `prefix_version` is that of what it knows of the engine's cache; a PrefixUpdate follows where there is news.
    """

    router: str
    prefix_version: int = 0


@message
@dataclass(frozen=True)
class EngineSpeed:
    """How fast an engine has been lately, and what lies before it; 0 where it has not been seen at it.

    `pending_tokens`: prompt tokens that it has yet to compute, in batches of up to `batch_tokens`; one of n takes
    `batch_s + n * token_s`; the last one ended `rested_s` ago. `step_s`: of a decode step, while any was running.
    `fetched_token_s`: of a cached token that came from another engine.
    """

    pending_tokens: int = 0
    batch_tokens: int = 1
    batch_s: float = 0.0
    token_s: float = 0.0
    rested_s: float = 0.0
    step_s: float = 0.0
    fetched_token_s: float = 0.0

    @property
    def is_known(self) -> bool:
        """Whether it has computed prompts enough to tell."""
        return bool(self.batch_s or self.token_s)

    def compute_s(self, tokens: int) -> float:
        """Seconds that so many prompt tokens take, in as few batches as they fit in."""
        return -(-tokens // self.batch_tokens) * self.batch_s + tokens * self.token_s


@message
@dataclass(frozen=True)
class EngineStats:
    """How an engine stands, and what it has done.

    `slots`: sequences that it decodes at once; `staging`: for KV that comes in; `links_up`: its NCCL communicators.
    """

    engine: str
    incarnation: str
    role: Literal["prefill", "decode", "colocated"]
    layout: KvLayout
    running: int
    waiting: int
    free_tokens: int
    total_tokens: int
    preemptions: int
    slots: int
    host_tier: BytesUsed
    staging: BytesUsed
    counts: EngineCounts
    transfers: tuple[TransferCounts, ...]
    links_up: int
    speed: EngineSpeed


@message
@dataclass(frozen=True)
class PrefixUpdate:
    """What an engine's prefix cache `stored` and `evicted` since version `since`; since 0, all that it holds.

    Both are digests of `cluster/prefix.py`, one behind another, for pages of the engine's layout.
    """

    engine: str
    incarnation: str
    since: int
    version: int
    stored: bytes
    evicted: bytes


@message
@dataclass(frozen=True)
class Member:
    """One engine as routers see it. A restarted engine is a new incarnation; a `draining` one takes no new requests."""

    engine: str
    incarnation: str
    role: Literal["prefill", "decode", "colocated"]
    address: str
    layout: KvLayout
    draining: bool = False
