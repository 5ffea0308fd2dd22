"""Sizes in bytes, as people write and read them."""

from __future__ import annotations

import re

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE_PATTERN = r"^[0-9]{1,15}(\.[0-9]{1,6})? ?(B|KB|MB|GB|TB|KiB|MiB|GiB|TiB)$"
_SIZE = re.compile(SIZE_PATTERN)


def parse_bytes(text: str) -> int:
    """Bytes of "512MiB" (binary) or "80GB" (decimal). Raises ValueError for anything else."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError("expected a number of bytes or a size such as 512MiB or 2GB")
    unit = match.group(2)
    return int(float(text.removesuffix(unit)) * _UNITS[unit])


def format_bytes(size: int) -> str:
    """Three significant digits in binary units: 536870912 -> "512 MiB"."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB"]
    while value >= 999.5 and units[1:]:
        value /= 1024
        units.pop(0)
    return f"{value:.3g} {units[0]}" if value < 999.5 else f"{value:.0f} {units[0]}"
