"""KV over NCCL between GPUs of one host, as it goes between hosts: to the bit, and whatever becomes of a sender."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace

import pytest
import torch

from splitserve.cluster.layout import KvLayout
from splitserve.kv_transfer.linked_receiver import LinkedReceiver
from splitserve.kv_transfer.nccl import PAIR_BYTES
from splitserve.kv_transfer.protocol import Freed, ReceiveFailed, Verified
from tests.kv_transfer.ranks import assert_same, dense_kv, expected_cache, layout
from tests.kv_transfer.test_between_gpus import gpus, poll
from tests.kv_transfer.test_hosts import TARGET_PAGES, TOKENS, DecodeRank, grant, start_peer, tell

pytestmark = pytest.mark.gpu

PAIRS = [(1, 1), (1, 2), (2, 1), (2, 2)]
FIRST_PAIR_BYTES = 700 << 20  # NCCL itself takes 515 MiB with a process's first communicator
HALF_MET_S = 30.0


@pytest.fixture
def open_ends() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def peer() -> Iterator[subprocess.Popen[str]]:
    with start_peer() as process:
        yield process
        process.kill()


def decode_ranks(stack: ExitStack, target: KvLayout, source_tp: int) -> list[DecodeRank]:
    """On GPUs after those of the sources: NCCL refuses two ranks on one."""
    if source_tp + target.tp > torch.cuda.device_count():
        pytest.skip(f"needs {source_tp + target.tp} GPUs")
    devices = gpus(target.tp, first=source_tp)
    return [DecodeRank(stack, target, rank, "nccl", device=device) for rank, device in enumerate(devices)]


def linked(rank: DecodeRank) -> LinkedReceiver:
    assert rank.linked is not None
    return rank.linked


def send_and_check(ranks: list[DecodeRank], target: KvLayout, source_tp: int, peer: subprocess.Popen[str]) -> None:
    source, ticket = replace(target, tp=source_tp, page_size=16), grant(ranks, target)
    for rank in ranks:
        rank.open(ticket, source, TARGET_PAGES)
    tell(peer, ticket, devices=",".join(gpus(source_tp)))
    assert {type(event) for event in poll(ranks, len(ranks))} == {Verified}
    for number, rank in enumerate(ranks):
        expected = expected_cache(target, number, 16, TARGET_PAGES, dense_kv(target, TOKENS), range(TOKENS))
        assert_same(rank.cache, expected)
        rank.receiver.commit("r/0")
    assert poll(ranks, len(ranks)) == [Freed("r/0")] * len(ranks)


@pytest.mark.parametrize(("heads", "planes"), [(4, 2), (1, 1)], ids=["heads", "latents"])
@pytest.mark.parametrize(("source_tp", "target_tp"), PAIRS)
def test_pages_arrive_bit_for_bit(
    open_ends: ExitStack, peer: subprocess.Popen[str], heads: int, planes: int, source_tp: int, target_tp: int
) -> None:
    target = layout(target_tp, heads=heads, planes=1 if planes == 1 else 2, page_size=5)
    ranks = decode_ranks(open_ends, target, source_tp)
    send_and_check(ranks, target, source_tp, peer)
    puts = [incoming.puts for rank in ranks for incoming in linked(rank)._incoming.values()]
    assert puts
    assert all(puts), "none of it went over TCP"


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_sender_that_is_gone_costs_its_link_and_nothing_more(
    open_ends: ExitStack, peer: subprocess.Popen[str], fault: signal.Signals
) -> None:
    """It goes while a receive is posted for it: what it announced last never comes."""
    target = layout(1, page_size=5)
    (rank,) = decode_ranks(open_ends, target, 1)
    free = torch.cuda.mem_get_info(rank.cache.layers[0].device)[0]
    ticket = grant([rank], target, lease_s=6.0)
    rank.open(ticket, replace(target, page_size=16), TARGET_PAGES)
    tell(peer, ticket, share=0.5, devices="cuda:0")
    deadline = time.monotonic() + HALF_MET_S
    while not any(link.state == "up" for link in linked(rank).links):
        assert time.monotonic() < deadline
        assert rank.receiver.poll() == []
    peer.send_signal(fault)
    (incoming,) = linked(rank)._incoming.values()
    incoming.link.receive(linked(rank)._staging[:64])  # as if it had announced one more
    began = time.monotonic()
    while linked(rank).links:
        assert time.monotonic() - began < 3.0
        began_poll = time.monotonic()
        assert rank.receiver.poll() == []
        assert time.monotonic() - began_poll < 0.2, "the engine's loop goes on"
    assert [type(event) for event in poll([rank], 2)] == [ReceiveFailed, Freed]
    for link in linked(rank)._ending:
        assert link.join(5.0)
    torch.cuda.synchronize(rank.cache.layers[0].device)
    taken = free - torch.cuda.mem_get_info(rank.cache.layers[0].device)[0]
    assert taken < FIRST_PAIR_BYTES + PAIR_BYTES
    with start_peer() as another:
        send_and_check([rank], target, 1, another)
        assert [incoming.puts > 0 for incoming in linked(rank)._incoming.values()] == [True]
        another.kill()


def test_pairs_come_and_go_without_a_trace(open_ends: ExitStack) -> None:
    target = layout(1, page_size=5)
    (rank,) = decode_ranks(open_ends, target, 1)
    device, taken = rank.cache.layers[0].device, []
    for _ in range(4):
        with start_peer() as peer:
            send_and_check([rank], target, 1, peer)
            free = torch.cuda.mem_get_info(device)[0]
            peer.kill()
            linked(rank)._part(next(iter(linked(rank)._incoming)), "the test is done with it")
        for link in linked(rank)._ending:
            assert link.join(5.0)
        taken.append(torch.cuda.mem_get_info(device)[0] - free)
    assert min(taken[1:]) > 0.8 * PAIR_BYTES, "what a pair takes comes back"
