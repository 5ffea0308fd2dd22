from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.deploy.processes import Process, kill_session, session_members
from tests.deploy.clusters import wait_until

FAMILY = (
    "import os, subprocess, sys, time\n"
    "child = subprocess.Popen([sys.executable, '-c', 'import os, time; os.setpgrp(); time.sleep(60)'])\n"
    "print(child.pid, flush=True); time.sleep(60)"
)


@pytest.fixture
def family() -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A session leader and the number of its child, which has a process group of its own."""
    leader = subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    yield leader, child
    leader.kill()
    leader.wait()
    leader.stdout.close()


def process_of(pid: int) -> Process:
    process = Process.of(pid)
    assert process is not None
    return process


def test_a_process_is_known_by_its_start_too() -> None:
    me = process_of(os.getpid())
    assert me.is_alive()
    assert not replace(me, started=me.started - 1).is_alive()
    assert Process.of(2**22 + 1) is None


def test_a_process_of_an_earlier_boot_is_gone_with_its_session(family: tuple[subprocess.Popen[str], int]) -> None:
    leader, _ = family
    process = process_of(leader.pid)
    earlier = replace(process, boot="00000000-0000-0000-0000-000000000000")
    assert process.is_alive()
    assert not earlier.is_alive()
    leader.kill()
    leader.wait()
    assert list(session_members(process)) != []
    assert list(session_members(earlier)) == []


def test_a_killed_leader_leaves_its_session_to_be_ended(family: tuple[subprocess.Popen[str], int]) -> None:
    leader, child = family
    process, child_process = process_of(leader.pid), process_of(child)
    assert set(session_members(process)) == {leader.pid, child}
    leader.kill()
    leader.wait()
    assert not process.is_alive()
    assert list(session_members(process)) == [child]
    assert kill_session(process) == []
    wait_until(lambda: not child_process.is_alive(), 5, "the child's end")


def test_a_process_lives_as_long_as_one_of_its_threads() -> None:
    """Its files and their locks are let go of by the last one, after its leader is a zombie."""
    code = (
        "import ctypes, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,)).start(); print(flush=True)\n"
        "ctypes.CDLL(None).pthread_exit(None)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True) as leader:
        assert leader.stdout is not None
        leader.stdout.readline()
        stat = Path(f"/proc/{leader.pid}/stat")
        wait_until(lambda: ") Z " in stat.read_text(), 5, "the leader's end")
        process = process_of(leader.pid)
        assert list(session_members(process)) == [leader.pid]
        assert kill_session(process) == []
        assert Process.of(leader.pid) is None


def test_a_number_given_out_again_has_no_members(family: tuple[subprocess.Popen[str], int]) -> None:
    leader, child = family
    earlier = replace(process_of(leader.pid), started=process_of(leader.pid).started - 1)
    assert list(session_members(earlier)) == []
    assert kill_session(earlier) == []
    assert process_of(child).is_alive()


def test_the_caller_survives_the_end_of_its_own_session() -> None:
    code = (
        "import os; os.setsid(); from splitserve.deploy.processes import Process, kill_session\n"
        "print(kill_session(Process.of(os.getpid())))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr
