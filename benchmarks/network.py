"""A network of this process and its children alone, in which the way to a port can be cut and mended.

A cut is what a dead switch is: what is sent there vanishes, and nobody is told. Linux, with `unshare` and `ip`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Collection, Iterable

import psutil

INSIDE = "SPLITSERVE_OWN_NETWORK"
CUT, LOCAL = "50", "100"  # preferences of routing rules: what is cut goes before what is delivered on this host
LOOPBACK = "127.0.0.1"


def enter() -> None:
    """Start this program again with a network of its own, unless it has one. Raises SystemExit where that fails."""
    if INSIDE in os.environ:
        return
    os.environ[INSIDE] = "1"
    setup = (
        "ip link set lo up && ip route add default dev lo && "
        f'ip rule add pref {LOCAL} lookup local && ip rule del pref 0 && exec "$@"'
    )
    command = ["unshare", "--map-root-user", "--net", "sh", "-c", setup, "sh", *sys.orig_argv]
    try:
        os.execvp(command[0], command)
    except OSError as error:
        raise SystemExit(f"{command[0]}: {error.strerror}; it comes with util-linux") from error


def cut(pid: int, ports: Collection[int]) -> set[int]:
    """Let nothing through to these TCP ports of a process, nor back from them; returns all ports that are closed now.

    Rules by destination only: Linux routes what a connection sends by them, also one that was there before.
    """
    found = [
        each for each in psutil.Process(pid).net_connections(kind="tcp4") if each.laddr.port in ports and each.raddr
    ]
    closed = {*ports, *(each.raddr.port for each in found)}
    for port in closed:
        _ip("rule", "add", "pref", CUT, "ipproto", "tcp", "dport", str(port), "blackhole")
    return closed


def mend(ports: Iterable[int]) -> None:
    """Undo a cut."""
    for port in ports:
        _ip("rule", "del", "pref", CUT, "ipproto", "tcp", "dport", str(port), "blackhole")


def listening(pid: int) -> set[int]:
    """The TCP ports that a process listens on, for this host alone."""
    connections = psutil.Process(pid).net_connections(kind="tcp4")
    return {each.laddr.port for each in connections if each.status == "LISTEN" and each.laddr.ip == LOOPBACK}


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
