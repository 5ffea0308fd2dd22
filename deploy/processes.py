"""Processes of this host, seen through /proc: is one still the one we started, and who belongs to its session."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one with its number. `started`: clock ticks since `boot`."""

    pid: int
    started: int
    boot: str = field(default_factory=_boot_id)

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process with this number now, or None. A zombie is none once all its threads have let go of its files."""
        stat = _stat(pid)
        return None if stat is None else cls(pid, stat.started)

    def is_alive(self) -> bool:
        return Process.of(self.pid) == self


@dataclass(frozen=True)
class _Stat:
    session: int
    started: int


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = text.rpartition(")")[2].split()
    state, threads = fields[0], int(fields[17])
    return None if state in "ZX" and threads <= 1 else _Stat(session=int(fields[3]), started=int(fields[19]))


def session_members(leader: Process) -> Iterator[int]:
    """Numbers of the living processes in the session that `leader` started, itself included."""
    now = Process.of(leader.pid)
    if leader.boot != _boot_id() or now not in (None, leader):
        return  # the number was given out again, which happens only after the whole session is gone
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            stat = _stat(int(entry))
            if stat is not None and stat.session == leader.pid and stat.started >= leader.started:
                yield int(entry)


def kill_session(leader: Process, timeout_s: float = 5.0) -> list[int]:
    """Kill every process in `leader`'s session but the caller; returns those that outlived `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        left = [pid for pid in session_members(leader) if pid != os.getpid()]
        if not left or time.monotonic() > deadline:
            return left
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
