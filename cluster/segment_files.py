"""Files in /dev/shm for KV: `splitserve-<cluster>-<process>-<random>`, each locked while its process lives."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
from pathlib import Path

FOLDER = Path("/dev/shm")
_NAME = r"splitserve-{cluster}-(?P<pid>[0-9]+)-[0-9a-f]{{8}}"
_ANY_NAME = re.compile(_NAME.format(cluster="[A-Za-z0-9._-]+"))


def new_name(cluster: str) -> str:
    return f"splitserve-{cluster}-{os.getpid()}-{secrets.token_hex(4)}"


def is_name(name: str) -> bool:
    return _ANY_NAME.fullmatch(name) is not None


def sweep(cluster: str) -> list[str]:
    """Remove what dead processes of `cluster` and of this user left. Returns the names of the files removed."""
    pattern = re.compile(_NAME.format(cluster=re.escape(cluster)))
    removed = []
    for path in sorted(FOLDER.glob("splitserve-*")):
        match = pattern.fullmatch(path.name)
        if match and _is_left_over(path, match["pid"]):
            path.unlink(missing_ok=True)
            removed.append(path.name)
    return removed


def _is_left_over(path: Path, pid: str) -> bool:
    """Whether the maker is dead: it neither runs nor, as in another container of this host, holds the lock."""
    if _runs(pid):
        return False
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        if os.fstat(file).st_uid != os.getuid():
            return False
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(file)
    return True


def _runs(pid: str) -> bool:
    try:
        stat = Path("/proc", pid, "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
