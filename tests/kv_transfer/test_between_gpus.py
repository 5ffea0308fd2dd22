"""KV from the pages of GPUs to the pages of others, into segments that another process's GPU writes into."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Literal

import pytest
import torch

from splitserve.kv_transfer.protocol import Freed, ReceiveFailed, ReceiverEvent, Verified
from tests.kv_transfer.ranks import POISON, assert_same, dense_kv, expected_cache, layout
from tests.kv_transfer.test_hosts import TARGET_PAGES, TOKENS, DecodeRank, grant, start_peer, tell

pytestmark = pytest.mark.gpu

PAIRS = [(source, target) for source in (1, 2, 4) for target in (1, 2, 4)]


@pytest.fixture
def open_ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def peer() -> Iterator[subprocess.Popen[str]]:
    process = start_peer()
    yield process
    process.communicate(timeout=20)


def gpus(count: int, first: int = 0) -> list[str]:
    """A GPU for each of `count` ranks, from number `first` on, and round again where there are no more."""
    return [f"cuda:{(first + rank) % torch.cuda.device_count()}" for rank in range(count)]


def poll(ranks: list[DecodeRank], count: int, seconds: float = 60.0) -> list[ReceiverEvent]:
    events: list[ReceiverEvent] = []
    deadline = time.monotonic() + seconds
    while len(events) < count and time.monotonic() < deadline:
        events += [event for rank in ranks for event in rank.receiver.poll()]
    return events


@pytest.mark.parametrize("transport", ["cuda_ipc", "shm", "tcp"])
@pytest.mark.parametrize(("heads", "planes"), [(4, 2), (2, 2), (1, 1)], ids=["heads", "shared-heads", "latents"])
@pytest.mark.parametrize(("source_tp", "target_tp"), PAIRS)
def test_pages_arrive_bit_for_bit(
    open_ends: ExitStack,
    peer: subprocess.Popen[str],
    transport: Literal["cuda_ipc", "shm", "tcp"],
    heads: int,
    planes: Literal[1, 2],
    source_tp: int,
    target_tp: int,
) -> None:
    target = layout(target_tp, heads=heads, planes=planes, page_size=5)
    source = replace(target, tp=source_tp, page_size=16)
    devices = gpus(target_tp, first=source_tp)
    ranks = [DecodeRank(open_ends, target, rank, transport, device=device) for rank, device in enumerate(devices)]
    ticket = grant(ranks, target)
    for rank in ranks:
        rank.open(ticket, source, TARGET_PAGES)
    tell(peer, ticket, devices=",".join(gpus(source_tp)))
    assert {type(event) for event in poll(ranks, target_tp)} == {Verified}
    assert peer.stdout is not None
    assert peer.stdout.readline().count("Sent(") == source_tp
    dense = dense_kv(target, TOKENS)
    for number, rank in enumerate(ranks):
        assert_same(rank.cache, expected_cache(target, number, 16, TARGET_PAGES, dense, range(TOKENS)))
        rank.receiver.commit("r/0")
    assert poll(ranks, target_tp) == [Freed("r/0")] * target_tp


def test_a_sender_that_dies_costs_a_lease_and_no_other_page(open_ends: ExitStack) -> None:
    target = layout(1, page_size=5)
    decode = DecodeRank(open_ends, target, 0, "cuda_ipc", device="cuda:0")
    ticket = grant([decode], target, lease_s=10.0)  # the peer compiles its kernel first
    decode.open(ticket, replace(target, page_size=16), TARGET_PAGES)
    process = start_peer()
    tell(process, ticket, share=0.5, devices=gpus(1, first=1)[0])
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        assert decode.receiver.poll() == []
    assert process.communicate()[0].strip() == "half"
    assert (decode.cache.layers[0] != POISON).any(), "half of it had come"
    events = poll([decode], 2)
    assert events == [ReceiveFailed("r/0", "no KV came for a lease of 10 s"), Freed("r/0")]
    untouched = [page for page in range(16) if page not in TARGET_PAGES]
    for layer in decode.cache.layers:
        assert bool((layer[:, untouched] == POISON).all())


def test_a_sender_lets_go_of_a_receiver_that_is_gone(peer: subprocess.Popen[str]) -> None:
    """Its memory returns to the GPU, whatever the sender has mapped before."""
    free = torch.cuda.mem_get_info()[0]
    for _ in range(3):
        with ExitStack() as stack:
            target = layout(1, page_size=5)
            decode = DecodeRank(stack, target, 0, "cuda_ipc", device="cuda:0")
            ticket = grant([decode], target)
            decode.open(ticket, replace(target, page_size=16), TARGET_PAGES)
            tell(peer, ticket, devices=gpus(1, first=1)[0])
            assert len(poll([decode], 1)) == 1
            assert peer.stdout is not None
            peer.stdout.readline()
    torch.cuda.empty_cache()
    assert free - torch.cuda.mem_get_info()[0] < 64 << 20
