"""Converted models on disk: `${SPLITSERVE_CACHE:-${XDG_CACHE_HOME:-~/.cache}/splitserve}/models/<key>`.

An entry appears whole or not at all: it is made in `<key>.partial` and renamed, under the lock of `<key>.lock`, so
that workers that start together convert once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from splitserve.cluster.errors import ModelLoadError

FORMAT = 1  # raise when what a conversion writes changes
SOURCE_FILE = "source.json"


@dataclass(frozen=True)
class CacheEntry:
    """One converted model: its folder, the file it was made from and its size in bytes."""

    folder: Path
    source: str
    bytes: int


def cache_folder() -> Path:
    """Where converted models lie."""
    if named := os.environ.get("SPLITSERVE_CACHE"):
        return Path(named) / "models"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "splitserve" / "models"


def cached(source: Path, convert: Callable[[Path, Path], None]) -> Path:
    """The folder that `convert(source, folder)` makes of a file, made now if it is not there.

    The file counts as the same while its path, size and time of change are. Raises ModelLoadError when the cache
    cannot be written, and what `convert` raises.
    """
    source = source.resolve()
    status = source.stat()
    identity = f"{FORMAT}\0{source}\0{status.st_size}\0{status.st_mtime_ns}"
    folder = cache_folder() / hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    if folder.is_dir():
        return folder
    try:
        with _locked(folder):
            if not folder.is_dir():
                partial = _partial(folder)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                convert(source, partial)
                (partial / SOURCE_FILE).write_text(json.dumps({"source": str(source)}))
                partial.rename(folder)
    except OSError as error:
        raise ModelLoadError(
            f"{cache_folder()}: cannot keep the converted model ({error}); free space or set SPLITSERVE_CACHE"
        ) from error
    return folder


def entries() -> list[CacheEntry]:
    """All converted models."""
    sources = sorted(cache_folder().glob(f"*/{SOURCE_FILE}"))
    return [
        CacheEntry(
            folder=source.parent,
            source=str(json.loads(source.read_text())["source"]),
            bytes=sum(file.stat().st_size for file in source.parent.iterdir()),
        )
        for source in sources
        if source.parent.suffix != ".partial"
    ]


def clear() -> int:
    """Remove all entries, and what broken conversions left; returns the bytes freed. Running models keep theirs."""
    freed = 0
    for lock in sorted(cache_folder().glob("*.lock")):
        folder = lock.with_suffix("")
        with _locked(folder):
            for leftover in filter(Path.is_dir, (folder, _partial(folder))):
                freed += sum(file.stat().st_size for file in leftover.iterdir())
                shutil.rmtree(leftover)
    return freed


def _partial(folder: Path) -> Path:
    return folder.with_suffix(".partial")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the entry's lock, which the system releases when its holder dies."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
