"""Files that a command writes at its end."""

from __future__ import annotations

import os
from pathlib import Path

from splitserve.cluster.errors import InvalidRequest


def check_output(option: str, path: Path | None) -> None:
    """Raise InvalidRequest, before there is anything to write, where no file can be written at `path`."""
    if path is None:
        return
    place = path if path.exists() else path.parent
    if path.is_dir() or not path.parent.is_dir() or not os.access(place, os.W_OK):
        raise InvalidRequest(option, str(path), "name a file that can be written, in a folder that exists")
