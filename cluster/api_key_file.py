"""The file of API keys, in TOML: a section for each holder, with the hash of the key and what it may ask for.

    [alice]
    sha256 = "5e884898da28047151d0e56f8dc6292773603d0d6aabbd..."
    requests_per_minute = 600
    tokens_per_minute = 100_000   # of prompts and answers
    concurrent = 16

A limit that is left out is none. `splitserve keygen --api alice` adds a section; the key itself is kept nowhere.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from splitserve.cluster.cluster_key import write_private
from splitserve.cluster.errors import InvalidRequest, StartupError

MAX_FILE_BYTES = 1 << 20
NAME = "[A-Za-z0-9_-]{1,60}"


class ApiKey(BaseModel):
    """What is known of a key, and its holder's limits."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$", repr=False)
    requests_per_minute: int | None = Field(default=None, ge=1, le=10**9)
    tokens_per_minute: int | None = Field(default=None, ge=1, le=10**12)
    concurrent: int | None = Field(default=None, ge=1, le=10**6)


_Keys = TypeAdapter(dict[str, ApiKey])


def hash_key(key: str) -> str:
    """What the file has of a key. Keys are 256 random bits, so that a fast hash does."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_api_keys(path: Path) -> dict[str, ApiKey]:
    """Keys by holder. Raises StartupError naming file, place and remedy."""
    what = f"security.api_keys: {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise StartupError(f"{what}: over {MAX_FILE_BYTES >> 20} MiB; name another file")
        keys = _Keys.validate_python(tomllib.loads(data.decode()))
    except OSError as error:
        raise StartupError(f"{what}: {error.strerror}; `splitserve keygen --api NAME` makes one") from error
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        raise StartupError(f"{what}: {'.'.join(map(str, first['loc']))}: {first['msg']}; mend it") from None
    except (ValueError, RecursionError) as error:
        raise StartupError(f"{what}: {error}; expected TOML in UTF-8") from None
    for name in keys:
        if not re.fullmatch(NAME, name):
            raise StartupError(f"{what}: found a holder {name[:80]!r}; expected letters, digits, - and _")
    return keys


def add_api_key(path: Path, name: str) -> str:
    """Add a section for `name` to a file, which is made where there is none; returns the key."""
    if not re.fullmatch(NAME, name):
        raise InvalidRequest("api", name, "give a name of 1 to 60 letters, digits, - and _")
    key = f"sk-{secrets.token_urlsafe(32)}"
    section = f'[{name}]\nsha256 = "{hash_key(key)}"\n'
    if not path.exists():
        write_private(path, section)
        return key
    if name in read_api_keys(path):
        raise InvalidRequest("api", name, f"{path} has a key of that name: give another, or delete its section there")
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{section}")
    return key
