"""What is made of files, and made again when one of them changes."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from splitserve.cluster.errors import StartupError

log = logging.getLogger(__name__)

T = TypeVar("T")


class Renewed(Generic[T]):
    """`load()` of the files at `paths`, as they are whenever `newest` is called.

    Files that cannot be used raise StartupError at first. Later ones leave the former value in use, and the log says
    why.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], T]) -> None:
        self._paths, self._load = paths, load
        self._seen = self._versions()
        self._value = load()

    def newest(self) -> T:
        versions = self._versions()
        if versions != self._seen:
            self._seen = versions
            try:
                self._value = self._load()
                log.info("%s: the new version is in use", self._paths[0])
            except StartupError as error:
                log.warning("%s: the former version stays in use; %s", self._paths[0], error)
        return self._value

    def _versions(self) -> list[tuple[int, int, int] | None]:
        return [_version(path) for path in self._paths]


def _version(path: str) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
