"""The cluster key: a file whose holders are a cluster's workers and routers.

It has 32 random bytes as 64 hexadecimal digits on one line. They are the secret of the CURVE pair that all members
share; its public half follows from them and is written nowhere.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from pathlib import Path

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.errors import StartupError

KEY_BYTES = 32


def write_cluster_key(path: Path) -> None:
    """Make a new key that only its owner may read. Raises StartupError where a file is there already."""
    write_private(path, secrets.token_hex(KEY_BYTES) + "\n")


def read_cluster_key(path: Path) -> CurveKeys:
    """The keys of a file. Raises StartupError where it cannot be read, is no key, or may be read by everybody."""
    what = f"security.cluster_key: {path}"
    try:
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            text = file.read(2 * KEY_BYTES + 2).strip()
    except OSError as error:
        raise StartupError(f"{what}: {error.strerror}; `splitserve keygen` makes one, for all hosts alike") from error
    if mode & 0o007:
        raise StartupError(f"{what}: found mode {mode:04o}, which lets everybody have it; `chmod 600` it")
    if not re.fullmatch(b"[0-9a-f]{%d}" % (2 * KEY_BYTES), text):
        raise StartupError(f"{what}: expected {2 * KEY_BYTES} hexadecimal digits, as `splitserve keygen` makes them")
    return CurveKeys.of_secret(bytes.fromhex(text.decode()))


def write_private(path: Path, text: str) -> None:
    """Write a new file of mode 0600. Raises StartupError where there is one already, or none can be made."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise StartupError(f"{path}: {error.strerror}; name a new file") from error
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
