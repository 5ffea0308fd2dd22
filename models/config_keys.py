"""Checked reading of a model's config.json. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from splitserve.cluster.errors import ModelLoadError


class Keys:
    """Typed access to a JSON object; every fault is a ModelLoadError that names the key."""

    def __init__(self, raw: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.raw, self.source, self.prefix = raw, source, prefix

    def error(self, key: str, expected: str) -> ModelLoadError:
        found = f"{self.raw[key]!r:.80}" if key in self.raw else "nothing"
        name = key if key.isprintable() else ascii(key)  # a file's own keys, of which some cannot be printed
        return ModelLoadError(f"{self.source}: {self.prefix}{name}: found {found}; {expected}")

    def has(self, key: str) -> bool:
        """Whether the key is there with a value; null counts as absent, as it does for transformers."""
        return self.raw.get(key) is not None

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        value = self.raw[key] if self.has(key) else default
        if type(value) is not int or value < minimum:
            raise self.error(key, f"expected an integer of at least {minimum}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.raw[key] if self.has(key) else default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
            raise self.error(key, "expected a number above 0")
        return float(value)

    def optional_number(self, key: str) -> float | None:
        return self.number(key) if self.has(key) else None

    def boolean(self, key: str, default: bool) -> bool:
        value = self.raw[key] if self.has(key) else default
        if type(value) is not bool:
            raise self.error(key, "expected true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        value = self.raw.get(key)
        ids = [] if value is None else value if type(value) is list else [value]
        if any(type(token) is not int or token < 0 for token in ids):
            raise self.error(key, "expected a token id or a list of token ids")
        return tuple(ids)

    def strings(self, key: str) -> list[str]:
        value = self.raw.get(key)
        if type(value) is not list or not all(isinstance(text, str) for text in value):
            raise self.error(key, "expected a list of strings")
        return value

    def section(self, key: str) -> Keys:
        """The object under `key`, empty where there is none."""
        value = self.raw.get(key)
        if value is not None and not isinstance(value, Mapping):
            raise self.error(key, "expected an object")
        return Keys(value or {}, self.source, f"{self.prefix}{key}.")
