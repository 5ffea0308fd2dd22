"""What engines count, for routers to export: parts of `EngineStats`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitserve.cluster.codec import message

Transport = Literal["memory", "cuda_ipc", "shm", "nccl", "tcp"]


@message
@dataclass(frozen=True)
class BytesUsed:
    """Bytes of one rank that are taken, of how many."""

    used: int
    total: int


@message
@dataclass(frozen=True)
class EngineCounts:
    """What an engine has done since its incarnation started.

    `queried_tokens` of prompts were looked up in its prefix cache and `cached_tokens` of these found, of which
    `fetched_tokens` in another engine's; `prompt_tokens` were computed.
    """

    queried_tokens: int = 0
    cached_tokens: int = 0
    fetched_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    decode_steps: int = 0


@message
@dataclass(frozen=True)
class TransferCounts:
    """KV that went out by one transport. One rank's share of one attempt is a transfer.

    A transfer counts for the transport that its first frames took; `bytes` for the one that they took themselves, each
    time that they did.
    """

    transport: Transport
    started: int = 0
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    bytes: int = 0
