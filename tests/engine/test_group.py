"""Collectives between the ranks of one engine (threads here), and the leader's command stream."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

from splitserve.cluster.channel import CurveKeys, secure
from splitserve.cluster.codec import pack
from splitserve.cluster.errors import ProtocolError, StartupError, WorkerUnavailable
from splitserve.cluster.messages import Heartbeat
from splitserve.engine.group import FollowerLink, GlooGroup, LeaderLink, host_store, join_store

ADDRESS = "127.0.0.1"
TIMEOUT_S = 20.0


def listening_addresses() -> set[str]:
    """Local addresses of this process's listening TCP sockets, as /proc writes them: hexadecimal, port cut off."""
    inodes = {os.readlink(fd) for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink() and os.path.lexists(fd)}
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.add(fields[1].split(":")[0])
    return found


def on_ranks(size: int, work: Callable[[GlooGroup], Any]) -> list[Any]:
    """Results of `work` on each of `size` ranks that share this process."""
    store, endpoint = host_store(ADDRESS, TIMEOUT_S)

    def rank_main(rank: int) -> Any:
        own = store if rank == 0 else join_store(endpoint, TIMEOUT_S)
        return work(GlooGroup(own, rank, size, ADDRESS, TIMEOUT_S))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(rank_main, range(size)))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_collectives(size: int, dtype: torch.dtype) -> None:
    parts = [torch.randn(5, 6, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(size)]

    def work(group: GlooGroup) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own = parts[group.rank]
        return group.all_reduce(own.clone()), group.all_gather(own, 0), group.all_gather(own.t(), 1)

    total = torch.stack(parts).double().sum(0)
    for reduced, rows, columns in on_ranks(size, work):
        assert reduced.dtype == dtype
        torch.testing.assert_close(reduced.double(), total, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-5)
        assert torch.equal(rows, torch.cat(parts, 0))
        assert torch.equal(columns, torch.cat([part.t() for part in parts], 1))


def test_a_rows_sum_does_not_depend_on_its_place() -> None:
    """Ring reductions add in an order that depends on the element's offset; this one must not."""

    def work(group: GlooGroup) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(37, 96, generator=torch.Generator().manual_seed(group.rank)) * 10 ** (3 * group.rank)
        return group.all_reduce(x.clone()), torch.cat([group.all_reduce(row.clone()[None]) for row in x])

    results = on_ranks(3, work)
    for together, alone in results:
        assert torch.equal(together, alone)
        assert torch.equal(together, results[0][0])


def test_nothing_listens_beyond_the_address() -> None:
    listening: list[set[str]] = on_ranks(2, lambda group: listening_addresses())
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}  # in both notations of /proc
    assert listening[0]
    assert listening[0] <= loopback


def test_an_address_of_another_host_is_refused() -> None:
    with pytest.raises(StartupError, match=r"cannot bind 192\.0\.2\.1"):
        host_store("192.0.2.1", TIMEOUT_S)


def test_an_absent_leader_is_reported() -> None:
    with pytest.raises(StartupError, match="nobody answers at"):
        join_store(f"{ADDRESS}:1", 0.2)


@pytest.fixture
def leader(request: pytest.FixtureRequest) -> Iterator[LeaderLink]:
    link = LeaderLink(2, ADDRESS, getattr(request, "param", None))
    yield link
    link.close()


def join(leader: LeaderLink, keys: CurveKeys | None = None) -> list[FollowerLink]:
    followers = [FollowerLink(leader.address, rank, keys) for rank in range(1, leader.followers + 1)]
    leader.wait_for_followers(TIMEOUT_S)
    return followers


KEYS = CurveKeys.generate()


@pytest.mark.parametrize(("leader", "keys"), [(None, None), (KEYS, KEYS)], indirect=["leader"], ids=["plain", "curve"])
def test_every_follower_gets_the_same_commands_in_order(leader: LeaderLink, keys: CurveKeys | None) -> None:
    followers = join(leader, keys)
    for step in range(200):
        leader.send(Heartbeat(str(step)))
    for follower in followers:
        assert [follower.receive(TIMEOUT_S) for _ in range(200)] == [Heartbeat(str(step)) for step in range(200)]
        assert follower.receive(0.01) is None
        follower.close()


def test_reports_name_their_rank(leader: LeaderLink) -> None:
    followers = join(leader)
    assert leader.reports() == []
    for follower in followers:
        follower.report(Heartbeat("a"))
        follower.report(Heartbeat("b"))
    reports: list[tuple[int, Any]] = []
    while len(reports) < 4:
        reports += leader.reports()
    assert sorted(reports, key=lambda report: (report[0], report[1].router)) == [
        (rank, Heartbeat(router)) for rank in (1, 2) for router in ("a", "b")
    ]
    for follower in followers:
        follower.close()


def test_followers_that_do_not_join_are_named(leader: LeaderLink) -> None:
    follower = FollowerLink(leader.address, 1)
    with pytest.raises(StartupError, match=r"TP ranks \[2\] did not join"):
        leader.wait_for_followers(0.3)
    follower.close()


def test_a_lost_follower_is_noticed(leader: LeaderLink) -> None:
    followers = join(leader)
    followers[1].close()

    def send_for_ten_seconds() -> None:
        for _ in range(1000):
            leader.send(Heartbeat("x"))
            time.sleep(0.01)

    with pytest.raises(WorkerUnavailable, match="TP rank 2 is gone"):
        send_for_ten_seconds()
    followers[0].close()


@pytest.mark.parametrize(
    ("frames", "problem"),
    [
        ([(0, 1), (2, 1)], "command 2 came where 1 was due"),
        ([(0, 1), (0, 1)], "command 0 came where 1 was due"),
        ([(1, 1)], "command 1 came where 0 was due"),
        ([(0, 0)], "1 frames, expected 2"),
        ([(0, 2)], "3 frames, expected 2"),
    ],
)
def test_a_broken_command_stream_is_fatal(frames: list[tuple[int, int]], problem: str) -> None:
    """`frames`: step number and number of payload frames of each command that a broken leader sends."""
    router: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    secure(router, None, server=True)
    port = router.bind_to_random_port(f"tcp://{ADDRESS}")
    follower = FollowerLink(f"tcp://{ADDRESS}:{port}", 1)
    identity = router.recv_multipart()[0]
    for step, payloads in frames:
        router.send_multipart([identity, step.to_bytes(8, "big"), *[pack(Heartbeat("x"))] * payloads])
    for _ in frames[:-1]:
        assert follower.receive(TIMEOUT_S) == Heartbeat("x")
    with pytest.raises(ProtocolError, match=problem):
        follower.receive(TIMEOUT_S)
    follower.close()
    router.close(linger=0)


def test_a_stranger_is_refused(leader: LeaderLink) -> None:
    stranger: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
    stranger.connect(leader.address)
    stranger.send(b"hello")
    with pytest.raises(ProtocolError, match="a stranger"):
        leader.wait_for_followers(TIMEOUT_S)
    stranger.close(linger=0)
