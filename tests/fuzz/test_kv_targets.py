"""Where a ticket says that KV goes: names of segments and addresses, which a sender opens or refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.messages import RankEndpoint
from splitserve.cluster.segment_files import FOLDER
from splitserve.kv_transfer.shm import ShmMapping, ShmSegment
from splitserve.kv_transfer.tcp import TcpSender
from tests.fuzz.mutate import bounded, fuzz, mutated

NAME = f"splitserve-fuzz-{os.getpid()}-0123abcd"
ADDRESSES = [b"tcp://127.0.0.1:5001", b"tcp://[::1]:5001", b"ipc:///tmp/x", b"inproc://x", b"udp://127.0.0.1:1"]


@pytest.fixture
def odd_file() -> Iterator[Path]:
    yield FOLDER / NAME
    (FOLDER / NAME).unlink()


@fuzz
@given(mutated([NAME.encode(), b"../../etc/passwd", b"/etc/passwd"]))
def test_names(name: bytes) -> None:
    with bounded(), pytest.raises(TransferFailed):
        ShmMapping(name.decode("utf-8", "surrogateescape"))


def test_a_segment_is_attached_by_its_name() -> None:
    with closing(ShmSegment("fuzz", 4096)) as segment:
        assert ShmMapping(segment.name).bytes.numel() == 4096


def test_an_empty_file_is_no_segment(odd_file: Path) -> None:
    odd_file.touch()
    with pytest.raises(TransferFailed, match="segment: "):
        ShmMapping(NAME)


def test_a_pipe_is_no_segment(odd_file: Path) -> None:
    os.mkfifo(odd_file)
    with pytest.raises(TransferFailed, match="segment: "):
        ShmMapping(NAME)


@fuzz
@given(mutated(ADDRESSES) | st.binary(max_size=20))
def test_addresses(address: bytes) -> None:
    target = RankEndpoint(address.decode("utf-8", "ignore"), "tcp", "host", "", 0, 64)
    with bounded(), closing(TcpSender(lambda: 0.0)) as sender:
        try:
            sender.connect(target)
        except TransferFailed as error:
            complaint = str(error)
        else:
            return
    assert "address" in complaint
