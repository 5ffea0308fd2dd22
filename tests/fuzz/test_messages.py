"""Messages between workers, tickets and layouts among them: what `unpack` lets through is exactly what it says."""

from __future__ import annotations

import contextlib
import dataclasses
import types
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import assume, given
from pydantic import ConfigDict, TypeAdapter

from splitserve.cluster.codec import pack, unpack
from splitserve.cluster.errors import ProtocolError, TransferFailed
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import Ticket
from splitserve.kv_transfer.outgoing import build_lanes
from splitserve.kv_transfer.reshard import reshard
from splitserve.kv_transfer.staging import ALIGNMENT, HOST_FRAMES
from tests.fuzz.mutate import bounded, changed, corpus, fuzz, mutated, seeds

STRICT = ConfigDict(strict=True, revalidate_instances="always")
LAYOUT = KvLayout(tp=2, num_layers=3, planes=2, num_kv_heads=4, head_dim=8, page_size=16, dtype="float32")
SEEDS = seeds("messages")


def check(data: bytes) -> None:
    try:
        with bounded():
            item = unpack(data)
    except ProtocolError:
        return
    assert unpack(pack(item)) == item  # NaN, which no field means anything by, would not
    kind: Any = types.GenericAlias(tuple, type(item))
    TypeAdapter(kind, config=STRICT).validate_python((item,))
    for part in walk(item):
        with bounded():
            use(part)


def walk(item: Any) -> list[Any]:
    """All messages within a message."""
    if dataclasses.is_dataclass(item):
        return [item, *(part for field in dataclasses.fields(item) for part in walk(getattr(item, field.name)))]
    return [part for value in item for part in walk(value)] if isinstance(item, tuple) else []


def use(part: Any) -> None:
    """What a worker does with a layout or a ticket before it knows whether they are any good."""
    match part:
        case KvLayout():
            assert part.bytes_per_page >= part.page_size
            with contextlib.suppress(TransferFailed):
                reshard(part, LAYOUT, 0, 100)
        case Ticket():
            with contextlib.suppress(TransferFailed):
                for lane in build_lanes(part, LAYOUT, 0, lambda _: HOST_FRAMES):
                    assert min(lane.free_slots) >= 0
                    assert all(offset % ALIGNMENT == 0 for offset in lane.free_slots)  # words are copied there


@pytest.mark.parametrize("path", corpus("messages"), ids=lambda path: path.name)
def test_corpus(path: Path) -> None:
    check(path.read_bytes())


@fuzz
@given(mutated(SEEDS))
def test_spoilt_bytes(data: bytes) -> None:
    check(data)


@fuzz
@given(changed([msgpack.unpackb(seed, strict_map_key=False) for seed in SEEDS]))
def test_spoilt_values(tree: list[Any]) -> None:
    try:
        data = msgpack.packb(tree, unicode_errors="surrogatepass")
    except (OverflowError, ValueError):
        assume(False)
    check(data)
