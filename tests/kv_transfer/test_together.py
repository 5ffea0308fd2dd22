"""Small prompts share messages and turns, and stay apart all the same."""

from __future__ import annotations

import hashlib
import random

import pytest

from splitserve.cluster.codec import join, pack
from splitserve.cluster.errors import ProtocolError
from splitserve.kv_transfer import sender as sending
from splitserve.kv_transfer.memory import Faults
from splitserve.kv_transfer.protocol import (
    MAX_HEADER_BYTES,
    SEAL_BYTES,
    KvAck,
    KvDrained,
    KvFinish,
    KvFrame,
    KvRenew,
    Sent,
    Verified,
    seal,
    seal_all,
    unseal,
)
from splitserve.kv_transfer.receiver import MAX_MESSAGES
from splitserve.kv_transfer.sender import MOST_PACKED
from splitserve.kv_transfer.staging import Window
from tests.kv_transfer.ranks import HAND_OFF, Pair, assert_same, dense_kv, layout, poisoned_cache, write

PROMPTS, TOKENS, WINDOW_BYTES = 40, 2, 4096
NAMES = [f"r{n}/0" for n in range(PROMPTS)]


def many(faults: Faults | None = None, seed: int = 0, lease_s: float = 8.0, copies_take_s: float = 0.0) -> Pair:
    """Prompts of a page each, all ready: that of page n goes to the n-th page from the end."""
    pair = Pair(
        source=layout(1),
        target=layout(1),
        num_pages=PROMPTS,
        staging_bytes=PROMPTS * WINDOW_BYTES,
        seed=seed,
        faults=faults or Faults(),
        shared_staging=True,
        lease_s=lease_s,
        copies_take_s=copies_take_s,
    )
    windows = [Window(n * WINDOW_BYTES, WINDOW_BYTES) for n in range(PROMPTS)]
    tickets = [pair.open(NAMES[n], [PROMPTS - 1 - n], 0, TOKENS, window) for n, window in enumerate(windows)]
    for n, ticket in enumerate(tickets):
        pair.begin(ticket, [n], dense_kv(pair.source, TOKENS, seed=n))
    for ticket in tickets:
        pair.all_ready(ticket)
    return pair


def parcels_to_target(pair: Pair) -> list[list[object]]:
    return [unseal(parcel.header) for parcel in pair.network.collect("target/0", 1000)]


def test_frames_of_a_turn_are_one_message_and_so_are_their_answers() -> None:
    pair = many()
    pair.senders[0].pump()
    (frames,) = parcels_to_target(pair)
    assert [frame.transfer_id for frame in frames if isinstance(frame, KvFrame)] == NAMES[:MOST_PACKED]
    pair.network.post("target/0", "source/0", seal(*frames))
    for _ in range(-(-MOST_PACKED // MAX_MESSAGES)):
        assert len(pair.receivers[0].poll()) == MAX_MESSAGES, "and the engine has its turn"
    answers = [unseal(parcel.header) for parcel in pair.network.collect("source/0", 1000)]
    assert [len(acks) for acks in answers] == [MAX_MESSAGES] * (MOST_PACKED // MAX_MESSAGES)
    assert all(isinstance(ack, KvAck) for acks in answers for ack in acks)


def test_large_frames_wait_for_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "SMALL_BYTES", 0)
    pair = many()
    pair.senders[0].pump()
    assert [len(parcel) for parcel in parcels_to_target(pair)] == [1] * MOST_PACKED


def test_what_waits_for_its_turn_keeps_the_engine_from_sleeping() -> None:
    pair = many()
    sender = pair.senders[0]
    sender.pump()
    assert sender.busy
    sender.pump(), sender.pump()
    assert not sender.busy, "all has been packed, and nothing is acknowledged yet"


def test_what_has_come_and_waits_keeps_the_engine_from_sleeping() -> None:
    pair = many()
    pair.senders[0].pump()
    receiver = pair.receivers[0]
    receiver.poll()
    assert receiver.busy
    receiver.poll()
    assert not receiver.busy


def test_a_wrong_message_spoils_none_of_those_beside_it() -> None:
    pair = many()
    pair.senders[0].pump()
    (frames,) = parcels_to_target(pair)
    reply, stray = KvAck(NAMES[0], 1, 1, hand_off=True), KvRenew(NAMES[0], 1, 0)
    pair.network.post("target/0", "source/0", seal(reply, *frames[:5], stray, *frames[5:7]))
    receiver = pair.receivers[0]
    assert [event.transfer_id for event in receiver.poll(20)] == NAMES[:7]
    assert receiver.rejected == 1


@pytest.mark.parametrize("seed", range(12))
def test_all_arrive_whatever_happens_to_messages_and_copies(seed: int) -> None:
    dice = random.Random(seed)
    faults = Faults(drop=0.2, repeat=0.2, corrupt=0.1, delay_s=dice.choice((0, 0.3)))
    pair = many(faults, seed, copies_take_s=dice.choice((0.0, 0.05)))
    sent, verified = set(), set()
    for _ in range(4000):
        (sender_events,), (receiver_events,) = pair.step()
        sent |= {event.transfer_id for event in sender_events if isinstance(event, Sent)}
        for event in receiver_events:
            if isinstance(event, Verified):
                assert event.hand_off == HAND_OFF
                verified.add(event.transfer_id)
                pair.receivers[0].commit(event.transfer_id)
        if len(sent) == PROMPTS:
            break
    assert sent == verified == set(NAMES)
    expected = poisoned_cache(pair.target, PROMPTS)
    for n in range(PROMPTS):
        write(expected, 0, [PROMPTS - 1 - n], dense_kv(pair.source, TOKENS, seed=n), range(TOKENS))
    assert_same(pair.target_caches[0], expected)


def test_those_that_wait_for_their_turn_keep_their_leases() -> None:
    """Those ahead are never acknowledged, and are packed again in every turn."""
    pair = many(lease_s=1.0)
    sender = pair.senders[0]
    for _ in range(3):
        pair.tick(1.0 / 8)
        sender.pump()
    said = [message for parcel in parcels_to_target(pair) for message in parcel]
    assert {message.transfer_id for message in said if isinstance(message, KvFinish)} == set(NAMES)


def test_parcels_hold_what_a_header_may() -> None:
    long = [KvDrained(f"r{n}/0", n, 0, "x" * (n * 7 % 3000)) for n in range(100)]
    parcels = list(seal_all(long))
    assert [message for parcel in parcels for message in unseal(parcel)] == long
    assert max(map(len, parcels)) <= MAX_HEADER_BYTES
    assert len(parcels) < 20
    small = [KvAck("r/0", 1, n, hand_off=False) for n in range(2000)]
    parcels = list(seal_all(small))
    assert [message for parcel in parcels for message in unseal(parcel)] == small
    assert max(map(len, parcels)) <= MAX_HEADER_BYTES


@pytest.mark.parametrize("parcel", [pack(KvAck("r/0", 1, 1, hand_off=True)), join([b"\x01"]), join([b""]), b"\xc0"])
def test_what_is_no_array_of_messages_is_refused(parcel: bytes) -> None:
    seal_of_it = hashlib.blake2b(parcel, digest_size=SEAL_BYTES).digest()
    with pytest.raises(ProtocolError, match=r"expected a message|expected an array|not MessagePack"):
        unseal(parcel + seal_of_it)
