"""The cluster key on file, and what those get who do not have it."""

from __future__ import annotations

import asyncio
import stat
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import zmq

from splitserve.cluster.channel import CurveKeys, RouterChannel, Socket, bind, secure
from splitserve.cluster.cluster_key import read_cluster_key, write_cluster_key
from splitserve.cluster.codec import MAX_MESSAGE_BYTES, pack
from splitserve.cluster.errors import StartupError
from splitserve.cluster.messages import Cancel, Heartbeat
from splitserve.deploy.cli import main
from splitserve.kv_transfer.protocol import KvDrained, seal
from tests.cluster.doors import ADDRESS, Door, count_within, group_door, knock, kv_door, worker_door

ABORT = Cancel("router-0-1", 1)
STRANGERS = {"plain": None, "another key": CurveKeys.generate()}


def test_keygen_makes_a_private_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "cluster.key"
    assert main(["keygen", str(file)]) == 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert file.read_text().strip() not in capsys.readouterr().out
    keys = read_cluster_key(file)
    assert keys == read_cluster_key(file)
    assert zmq.curve_public(keys.secret.encode()).decode() == keys.public
    before = file.read_bytes()
    assert main(["keygen", str(file)]) == 1
    assert "File exists; name a new file" in capsys.readouterr().err
    assert file.read_bytes() == before
    write_cluster_key(tmp_path / "other.key")
    assert read_cluster_key(tmp_path / "other.key") != keys


@pytest.mark.parametrize(
    "text", ["", "\n", "ab" * 31, "ab" * 33, "xy" * 32, "AB" * 32, "ab" * 32 + "\nmore", "\xff" * 64]
)
def test_what_is_no_key_is_refused_and_not_repeated(tmp_path: Path, text: str) -> None:
    file = tmp_path / "cluster.key"
    file.write_text(text)
    file.chmod(0o600)
    with pytest.raises(StartupError, match=f"cluster_key: {file}: expected 64 hexadecimal digits") as caught:
        read_cluster_key(file)
    assert len(text) < 10 or text[:10] not in str(caught.value)


def test_a_key_that_everybody_may_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cluster.key"
    write_cluster_key(file)
    file.chmod(0o644)
    with pytest.raises(StartupError, match="found mode 0644, which lets everybody have it; `chmod 600` it"):
        read_cluster_key(file)
    file.chmod(0o640)  # as volumes of Kubernetes have it for a pod's group
    read_cluster_key(file)


def test_a_missing_key_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file or directory; `splitserve keygen` makes one"):
        read_cluster_key(tmp_path / "none")


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize(
    ("make", "abort"),
    [(worker_door, pack(ABORT)), (group_door, pack(ABORT)), (kv_door, seal(KvDrained("r/0", 1, 0, "give it up")))],
)
def test_an_abort_of_a_stranger_reaches_nobody(
    make: Callable[[ExitStack, CurveKeys], Door], abort: bytes, stranger: str
) -> None:
    keys = CurveKeys.generate()
    with ExitStack() as stack:
        door = make(stack, keys)
        knock(stack, door, STRANGERS[stranger], abort)
        assert count_within(door, 1, 0.5) == 0
        knock(stack, door, keys, abort)
        assert count_within(door, 1, 5.0) == 1, "a member's does"


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_worker_without_the_key_gets_no_request(stranger: str) -> None:
    """It may hold an address that a worker had before, and must neither read prompts nor answer them."""

    async def scenario(socket: Socket, address: str) -> None:
        channel = RouterChannel(address, b"router", print, CurveKeys.generate())
        channel.send(Heartbeat("router"))
        assert not await asyncio.to_thread(socket.poll, 500)
        channel.close()

    socket: Socket = zmq.Context.instance().socket(zmq.ROUTER)
    with socket:
        secure(socket, STRANGERS[stranger], server=True)
        asyncio.run(scenario(socket, bind(socket, ADDRESS)))


def test_an_oversized_message_of_a_member_is_cut_off() -> None:
    keys = CurveKeys.generate()
    with ExitStack() as stack:
        door = worker_door(stack, keys)
        knock(stack, door, keys, bytes(MAX_MESSAGE_BYTES + 1))
        assert count_within(door, 1, 1.0) == 0
        knock(stack, door, keys, pack(ABORT))
        assert count_within(door, 1, 5.0) == 1
