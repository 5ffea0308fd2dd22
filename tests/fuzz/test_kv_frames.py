"""KV frames and answers, spoilt and sealed again, among those of live transfers.

Nothing raises, no page outside a live reservation changes, and what is verified is right to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from splitserve.cluster.codec import join
from splitserve.kv_transfer.memory import MemoryReceiver
from splitserve.kv_transfer.protocol import SEAL_BYTES, KvFrame, ReceiveFailed, ReceiverEvent, Verified, seal, unseal
from splitserve.kv_transfer.staging import Window
from splitserve.kv_transfer.transport import Arrival
from tests.fuzz.mutate import bounded, changed, fuzz, mutated
from tests.kv_transfer.ranks import Pair, assert_same, dense_kv, expected_cache, layout

TOKENS, START, NUM_PAGES = 10, 3, 16
PAGES = {"a": [5, 2, 9], "b": [0, 15, 7]}
TAKEN_AGAIN = 9.0  # what the next owner writes into pages of a transfer that failed
SOURCE, TARGET = layout(2, heads=2, layers=2), layout(1, heads=2, layers=2)


class InPlace(MemoryReceiver):
    """Takes payloads where they lie, as staging in a GPU's memory does."""

    def take(self, arrival: Arrival, offset: int, size: int) -> torch.Tensor:
        if arrival.payload is None:
            return self._network.staging[self._address][offset : offset + size]
        return super().take(arrival, offset, size)


class Attacked:
    """Two transfers from two ranks to one, whose messages `spoil` takes and sends again."""

    def __init__(self, shared_staging: bool) -> None:
        epochs = patch("splitserve.kv_transfer.staging.secrets.randbits", return_value=7)  # for examples that repeat
        with patch("tests.kv_transfer.ranks.MemoryReceiver", InPlace), epochs:
            self.pair = Pair(SOURCE, TARGET, num_pages=NUM_PAGES, shared_staging=shared_staging)
        self.dense = {name: dense_kv(SOURCE, TOKENS, seed) for seed, name in enumerate(PAGES)}
        self.ended: dict[str, ReceiverEvent] = {}
        for place, (name, pages) in enumerate(PAGES.items()):
            ticket = self.pair.open(name, pages, START, TOKENS, Window(place * 1024, 1024))
            self.pair.begin(ticket, pages, self.dense[name])
            self.pair.all_ready(ticket)

    def step(self, seconds: float) -> None:
        _, ((*events,),) = self.pair.step(seconds)
        for event in events:
            if isinstance(event, Verified | ReceiveFailed):
                assert event.transfer_id not in self.ended
                self.ended[event.transfer_id] = event
            if isinstance(event, Verified):
                self.pair.receivers[0].commit(event.transfer_id)
            elif isinstance(event, ReceiveFailed):
                for layer in self.pair.target_caches[0].layers:
                    layer[:, PAGES[event.transfer_id]] = TAKEN_AGAIN

    def check(self) -> None:
        expected = expected_cache(TARGET, 0, NUM_PAGES, [], self.dense["a"], range(0))
        assert self.ended.keys() == PAGES.keys()
        for name, event in self.ended.items():
            right = expected_cache(TARGET, 0, NUM_PAGES, PAGES[name], self.dense[name], range(START, TOKENS))
            for layer, values in zip(expected.layers, right.layers, strict=True):
                layer[:, PAGES[name]] = values[:, PAGES[name]] if isinstance(event, Verified) else TAKEN_AGAIN
        assert_same(self.pair.target_caches[0], expected)


def resealed(*trees: Any) -> bytes:
    """Messages of these trees, that travel together."""
    return sealed(join([packed(tree) for tree in trees]))


def packed(tree: Any) -> bytes:
    try:
        data: bytes = msgpack.packb(tree, unicode_errors="surrogatepass")
    except (OverflowError, ValueError):
        data = b"\xc1"
    return data


def sealed(data: bytes) -> bytes:
    return data + hashlib.blake2b(data, digest_size=SEAL_BYTES).digest()


@st.composite
def spoilt(draw: st.DrawFn, sent: list[Any]) -> tuple[str, str, bytes, bytes | None]:
    """(address, origin, header, payload) of one of the posts `sent`, changed."""
    address, origin, header, *rest = draw(st.sampled_from(sent)).args
    payload = rest[0] if rest else None
    if draw(st.booleans()):
        together = msgpack.unpackb(header[:-SEAL_BYTES])
        within = resealed(*(draw(changed([tree])) for tree in together))
        header = draw(st.sampled_from([within, sealed(packed(draw(changed([together]))))]))
    elif draw(st.booleans()):
        header = draw(mutated([header]))
    if draw(st.booleans()):
        payload = draw(st.none() | mutated([payload or header]))
    return address, origin, header, payload


@fuzz
@given(data=st.data(), shared_staging=st.booleans())
def test_live_transfers(data: st.DataObject, shared_staging: bool) -> None:
    attacked = Attacked(shared_staging)
    network, honest = attacked.pair.network, attacked.pair.network.post
    with patch.object(network, "post", wraps=honest) as post, bounded():
        for _ in range(data.draw(st.integers(1, 4))):
            attacked.step(0.01)
            sent = post.call_args_list[:64]
            for message in data.draw(st.lists(spoilt(sent), min_size=1, max_size=3)) if sent else ():
                honest(*message)
        for _ in range(24):
            attacked.step(0.5)
    attacked.check()


WRONG: dict[str, dict[str, Any]] = {
    "words askew": {"offset": 1, "tokens": (START, START + 1)},  # on a GPU, the end of the process
    "tokens before the start": {"tokens": (0, 3)},
    "tokens that are none": {"tokens": (-4, START - 1)},
    "tokens behind the end": {"tokens": (TOKENS, TOKENS + 2)},
    "tokens across the end": {"tokens": (TOKENS - 1, TOKENS + 2)},
    "no tokens": {"tokens": (5, 5)},
    "layers that are none": {"layers": (-1, 1)},
    "layers behind the last": {"layers": (1, 3), "tokens": (START, START + 1)},
    "a place before staging": {"offset": -64},
    "a place across the end of staging": {"offset": (1 << 16) - 64},
    "another's share": {"offset": 1024 + 512},
    "another target": {"target_rank": 1},
    "no source": {"source_rank": 7},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("shared_staging", [True, False])
def test_wrong_frames_ahead_of_right_ones(change: dict[str, Any], shared_staging: bool) -> None:
    attacked = Attacked(shared_staging)
    honest = attacked.pair.network.post

    def post(address: str, origin: str, header: bytes, payload: bytes | None = None) -> None:
        for message in unseal(header):
            if isinstance(message, KvFrame):
                honest(address, origin, seal(replace(message, **change)), payload)
        honest(address, origin, header, payload)

    finish(attacked, post)


def test_damaged_payloads_ahead_of_right_ones() -> None:
    attacked = Attacked(shared_staging=False)
    honest = attacked.pair.network.post

    def post(address: str, origin: str, header: bytes, payload: bytes | None = None) -> None:
        if payload:
            honest(address, origin, header, bytes([payload[0] ^ 1]) + payload[1:])
        honest(address, origin, header, payload)

    finish(attacked, post)


def finish(attacked: Attacked, post: Callable[..., None]) -> None:
    with patch.object(attacked.pair.network, "post", post), bounded():
        for _ in range(24):
            attacked.step(0.5)
    attacked.check()
    assert all(isinstance(event, Verified) for event in attacked.ended.values())
