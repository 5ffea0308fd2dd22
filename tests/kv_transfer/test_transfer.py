"""Sender and receiver over the memory network, without faults: bits, streaming, credit, ends."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import RankEndpoint, Ticket
from splitserve.kv_transfer.checksum import checksum
from splitserve.kv_transfer.lifecycle import Lifecycle, TransferState
from splitserve.kv_transfer.memory import Faults
from splitserve.kv_transfer.mover import Move
from splitserve.kv_transfer.protocol import (
    Freed,
    KvAck,
    KvFinish,
    KvFrame,
    KvRenew,
    ReceiveFailed,
    ReceiverEvent,
    SenderEvent,
    SendFailed,
    Sent,
    Verified,
    seal,
    unseal,
)
from splitserve.kv_transfer.staging import EpochSource, Window
from tests.kv_transfer.ranks import (
    HAND_OFF,
    Pair,
    assert_same,
    dense_kv,
    expected_cache,
    layout,
    poisoned_cache,
    shuffled_pages,
)

WINDOW = Window(0, 4096)
CASES = {
    "1 to 2": (layout(1), layout(2)),
    "2 to 1": (layout(2), layout(1)),
    "2 to 4": (layout(2), layout(4)),
    "3 to 1": (layout(3, heads=3), layout(1, heads=3)),
    "1 to 3": (layout(1, heads=3), layout(3, heads=3)),
    "replicated source": (layout(4, heads=2), layout(1, heads=2)),
    "replicated target": (layout(2, heads=2), layout(8, heads=2)),
    "latent 4 to 2": (layout(4, planes=1), layout(2, planes=1)),
    "pages 4 to 7": (layout(1), layout(1, page_size=7)),
    "pages 16 to 3, 2 to 4": (layout(2, page_size=16), layout(4, page_size=3)),
}


@pytest.mark.parametrize("shared", [False, True], ids=["carried", "shared"])
@pytest.mark.parametrize(("source", "target"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("start", [0, 5])
def test_pages_arrive_bit_for_bit(source: KvLayout, target: KvLayout, start: int, shared: bool) -> None:
    pair, stop = Pair(source, target, shared_staging=shared), 23
    dense = dense_kv(source, stop)
    source_pages = shuffled_pages(source, stop, pair.num_pages, 1)
    target_pages = shuffled_pages(target, stop, pair.num_pages, 2)
    ticket = pair.open("r/0", target_pages, start, stop, WINDOW)
    pair.begin(ticket, source_pages, dense)
    pair.all_ready(ticket)
    sent, received = run(pair)
    assert sent == [[Sent("r/0")]] * source.tp
    assert received == [[Verified("r/0", None if rank else HAND_OFF)] for rank in range(target.tp)]
    for rank, (receiver, cache) in enumerate(zip(pair.receivers, pair.target_caches, strict=True)):
        receiver.commit("r/0")
        assert receiver.poll() == [Freed("r/0")]
        assert receiver.resident == {}
        assert_same(cache, expected_cache(target, rank, pair.num_pages, target_pages, dense, range(start, stop)))


def run(pair: Pair, steps: int = 300) -> tuple[list[list[SenderEvent]], list[list[ReceiverEvent]]]:
    """Events by rank until all sources have ended and a little longer."""
    sent: list[list[SenderEvent]] = [[] for _ in pair.senders]
    received: list[list[ReceiverEvent]] = [[] for _ in pair.receivers]
    for _ in range(steps):
        by_source, by_target = pair.step()
        for rank, sender_events in enumerate(by_source):
            sent[rank] += sender_events
        for rank, receiver_events in enumerate(by_target):
            received[rank] += receiver_events
        if not any(sender.active for sender in pair.senders):
            break
    for log, receiver in zip(received, pair.receivers, strict=True):
        log.extend(receiver.poll())
    return sent, received


def started(lease_s: float = 8.0) -> tuple[Pair, Ticket]:
    pair = Pair(layout(1), layout(1), lease_s=lease_s)
    ticket = pair.open("r/0", list(range(6)), 0, 23, WINDOW)
    pair.begin(ticket, list(range(6)), dense_kv(pair.source, 23))
    return pair, ticket


def test_layers_stream_while_prefill_computes() -> None:
    pair, _ = started()
    sender, cache = pair.senders[0], pair.target_caches[0]
    for stop in (10, 20, 23):
        for layer in range(3):
            sender.ready([("r/0", stop)], [layer])
            for _ in range(5):
                assert pair.step() == ([[]], [[]])
        written = [(tensor != -7.0).any(dim=(0, 2, 4)).sum().item() for tensor in cache.layers]
        assert written == [stop] * 3, "all that is ready has arrived, and no more"
    sender.finish("r/0", HAND_OFF)
    assert run(pair) == ([[Sent("r/0")]], [[Verified("r/0", HAND_OFF)]])


@pytest.mark.parametrize("earlier", [False, True], ids=["its-first", "a-later-one"])
def test_a_follower_that_hears_of_a_transfer_late_loses_nothing(earlier: bool) -> None:
    """KV may reach a decode rank before its leader's command does."""
    pair = Pair(layout(1), layout(2))
    if earlier:
        first = pair.open("first/0", list(range(6, 12)), 0, 23, Window(4096, 4096))
        pair.begin(first, list(range(6, 12)), dense_kv(pair.source, 23))
        pair.all_ready(first)
        run(pair)
    ticket = pair.open("r/0", list(range(6)), 0, 23, WINDOW, late=frozenset({1}))
    pair.begin(ticket, list(range(6)), dense_kv(pair.source, 23))
    pair.all_ready(ticket)
    for _ in range(20):
        sent, received = pair.step()
        assert sent == [[]]
        assert received[1] == []
    pair.receivers[1].open(pair.incoming(ticket, list(range(6))))
    sent, received = run(pair)
    assert sent == [[Sent("r/0")]]
    assert Verified("r/0", None) in received[1]


def test_the_hand_off_alone_is_a_transfer() -> None:
    pair = Pair(layout(2), layout(2))
    ticket = pair.open("r/0", list(range(6)), 8, 8, Window(0, 0))
    pair.begin(ticket, list(range(6)), dense_kv(pair.source, 8))
    assert pair.step() == ([[], [Sent("r/0")]], [[], [Verified("r/0", None)]])
    pair.senders[0].finish("r/0", HAND_OFF)
    assert run(pair) == ([[Sent("r/0")], []], [[Verified("r/0", HAND_OFF)], []])


def test_a_transfer_is_not_complete_without_its_hand_off() -> None:
    pair, _ = started()
    for layer in range(3):
        pair.senders[0].ready([("r/0", 23)], [layer])
    for _ in range(50):
        assert pair.step() == ([[]], [[]])
    assert pair.receivers[0].resident == {"r/0": TransferState.SENDING}
    pair.senders[0].finish("r/0", HAND_OFF)
    assert run(pair)[1] == [[Verified("r/0", HAND_OFF)]]


def test_memory_in_flight_is_bounded_by_the_window() -> None:
    pair, ticket = started()
    pair.all_ready(ticket)
    for _ in range(50):
        pair.senders[0].pump()
    arrivals = pair.receivers[0]._transport.receive(1000)
    in_flight = [arrival.payload.nbytes for arrival in arrivals if arrival.payload is not None]
    assert 0 < sum(in_flight) <= WINDOW.size


def test_two_transfers_share_the_ranks() -> None:
    pair = Pair(layout(2), layout(1))
    tables = {"a/0": [0, 3, 5], "b/0": [1, 9, 2]}
    for index, (name, pages) in enumerate(tables.items()):
        ticket = pair.open(name, pages, 0, 11, Window(4096 * index, 4096))
        pair.begin(ticket, pages, dense_kv(pair.source, 11, seed=index))
        pair.all_ready(ticket)
    run(pair)
    for index, (name, pages) in enumerate(tables.items()):
        assert pair.receivers[0].resident[name] is TransferState.VERIFIED
        expected = expected_cache(pair.target, 0, 16, pages, dense_kv(pair.source, 11, seed=index), range(11))
        found = pair.target_caches[0]
        for left, right in zip(found.layers, expected.layers, strict=True):
            assert torch.equal(left[:, pages], right[:, pages])


def test_a_receiver_that_aborts_stops_the_sender_and_gets_its_window_back() -> None:
    pair, _ = started()
    pair.senders[0].ready([("r/0", 23)], [0])
    pair.step()
    pair.receivers[0].abort("r/0", "cancelled by its client")
    assert pair.receivers[0].poll() == [ReceiveFailed("r/0", "cancelled by its client")]
    assert pair.step() == ([[SendFailed("r/0", "cancelled by its client")]], [[Freed("r/0")]])
    assert pair.senders[0].active == ()


def test_a_sender_that_aborts_ends_the_receiver_at_once() -> None:
    pair, _ = started()
    pair.senders[0].abort("r/0", "out of pages")
    assert pair.step() == ([[]], [[ReceiveFailed("r/0", "source rank 0 stopped: out of pages"), Freed("r/0")]])


def slow_pair(seconds: float) -> tuple[Pair, Ticket]:
    """One layer's worth of tokens under way, on devices whose copies take up to `seconds`."""
    pair = Pair(layout(1, layers=1), layout(1, layers=1), shared_staging=True, copies_take_s=seconds)
    ticket = pair.open("r/0", [0, 1], 0, 8, WINDOW)
    pair.begin(ticket, [0, 1], dense_kv(pair.source, 8))
    pair.all_ready(ticket)
    while not pair.devices[0].busy:  # its KV is still being computed
        pair.tick(0.1)
        pair.senders[0].pump()
    return pair, ticket


def test_a_sender_that_stops_writes_no_more_when_it_says_so() -> None:
    pair, _ = slow_pair(3.0)
    staging = pair.network.staging["target/0"]
    pair.senders[0].abort("r/0", "cancelled")
    received: list[list[ReceiverEvent]] = [[]]
    while pair.devices[0].busy:
        assert pair.senders[0].busy
        assert not staging.any()
        assert received == [[]]
        _, received = pair.step(0.1)
    assert not pair.senders[0].busy
    assert staging.any()
    assert received == [[ReceiveFailed("r/0", "source rank 0 stopped: cancelled"), Freed("r/0")]]


def test_a_slot_is_not_filled_anew_while_it_is_being_packed() -> None:
    """An acknowledgement that comes while its frame is packed once more leaves the slot to that."""
    pair, ticket = slow_pair(3.0)
    sender = pair.senders[0]
    (lane,) = sender._outgoing["r/0"].lanes
    (flight,) = sender._outgoing["r/0"].flights.values()
    slots = len(lane.free_slots)
    pair.network.post("source/0", "target/0", seal(KvAck("r/0", ticket.epoch, flight.frame.sequence, hand_off=False)))
    sender.pump()
    assert len(lane.free_slots) == slots
    while pair.devices[0].busy:
        pair.tick(0.1)
    sender.pump()
    assert len(lane.free_slots) == slots + 1


def test_a_frame_leaves_while_the_next_one_is_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, ticket = started()
    sender = pair.senders[0]
    order, moves = list[str](), list[object]()
    pack, send = sender._mover.pack, sender._transport.send

    class UntilTheNext:
        """A copy that is under way until another one has begun."""

        def __init__(self, move: Move) -> None:
            self._move = move
            order.append("packed")
            moves.append(self)

        def total(self) -> int | None:
            return None if moves[-1] is self else self._move.total()

    def note(target: RankEndpoint, header: bytes, *payload: Any) -> None:
        if isinstance(unseal(header)[0], KvFrame):
            order.append("sent")
        send(target, header, *payload)

    monkeypatch.setattr(sender._mover, "pack", lambda *frame: UntilTheNext(pack(*frame)))
    monkeypatch.setattr(sender._transport, "send", note)
    pair.all_ready(ticket)
    sender.pump()
    assert order[:5] == ["packed", "packed", "sent", "packed", "sent"]


def test_a_payload_that_comes_while_others_end_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, _ = slow_pair(1.0)
    receiver, device = pair.receivers[0], pair.devices[1]
    while not receiver.busy:
        pair.step(0.1)
    while device.busy:
        pair.tick(0.1)
    ticket = pair.open("r/1", [4, 5], 0, 8, Window(4096, 4096))
    pair.begin(ticket, [6, 7], dense_kv(pair.source, 8))
    pair.all_ready(ticket)
    for _ in range(50):
        pair.tick(0.1)
        pair.senders[0].pump()
    receive, calls = receiver._transport.receive, itertools.count()
    monkeypatch.setattr(receiver._transport, "receive", lambda limit: receive(limit) if next(calls) else [])
    receiver.poll()
    assert device.busy


def test_a_prompt_that_is_being_computed_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(layout(1), layout(1))
    sender, marks = pair.senders[0], itertools.count()
    monkeypatch.setattr(sender._mover, "mark", lambda: next(marks))
    monkeypatch.setattr(sender._mover, "passed", lambda mark: mark is None or mark >= layout(1).num_layers)
    for number, name in enumerate(["first", "second"]):
        pages = [3 * number, 3 * number + 1, 3 * number + 2]
        ticket = pair.open(name, pages, 0, 12, Window(4096 * number, 4096))
        pair.begin(ticket, pages, dense_kv(pair.source, 12))
        pair.all_ready(ticket)
    events = [event for _ in range(20) for event in pair.step()[1][0]]
    assert events == [Verified("second", HAND_OFF)]
    assert sender.busy
    monkeypatch.setattr(sender._mover, "passed", lambda mark: True)
    events = [event for _ in range(20) for event in pair.step()[1][0]]
    assert events == [Verified("first", HAND_OFF)]
    assert not sender.busy


def test_a_repeated_frame_is_written_once() -> None:
    pair, _ = slow_pair(0.5)
    pair.network.faults = Faults(repeat=1.0)
    while pair.devices[0].busy:
        pair.tick(0.1)
    pair.senders[0].pump()
    pair.receivers[0].poll()
    assert pair.devices[1].busy == 1
    assert pair.receivers[0].busy
    assert run(pair)[1] == [[Verified("r/0", HAND_OFF)]]
    assert not pair.senders[0].busy
    assert not pair.receivers[0].busy


def test_a_ticket_that_waits_for_its_turn_is_kept_and_can_be_declined() -> None:
    pair = Pair(layout(2), layout(1), lease_s=8.0)
    ticket = pair.open("r/0", list(range(6)), 0, 23, WINDOW)
    for _ in range(10):
        for sender in pair.senders:
            sender.renew(ticket)
        assert pair.step(5.0)[1] == [[]]
    for sender in pair.senders:
        sender.decline(ticket, "queue full")
    assert pair.receivers[0].poll() == [ReceiveFailed("r/0", "source rank 0 stopped: queue full"), Freed("r/0")]


def test_without_a_sender_the_lease_ends_it_and_quarantine_keeps_the_window() -> None:
    pair = Pair(layout(1), layout(1), lease_s=8.0)
    pair.open("r/0", [0, 1], 0, 8, WINDOW)
    assert pair.step(7.9)[1] == [[]]
    assert pair.step(0.2)[1] == [[ReceiveFailed("r/0", "no KV came for a lease of 8 s")]]
    with pytest.raises(TransferFailed, match="still belongs to r/0"):
        pair.open("s/0", [2, 3], 0, 8, Window(4000, 1000))
    assert pair.step(7.8)[1] == [[]]
    assert pair.step(0.3)[1] == [[Freed("r/0")]]
    pair.open("s/0", [2, 3], 0, 8, Window(4000, 1000))


def test_a_slow_prefill_keeps_its_lease_while_it_moves() -> None:
    pair, _ = started(lease_s=8.0)
    for token in range(1, 24):
        for layer in range(3):
            pair.senders[0].ready([("r/0", token)], [layer])
        for _ in range(3):
            assert pair.step(2.0) == ([[]], [[]])
    pair.senders[0].finish("r/0", HAND_OFF)
    assert run(pair) == ([[Sent("r/0")]], [[Verified("r/0", HAND_OFF)]])


def test_a_transfer_waits_for_its_own_prefill_as_long_as_that_takes() -> None:
    pair, ticket = started(lease_s=8.0)
    for _ in range(100):
        assert pair.step(1.0) == ([[]], [[]])
    pair.all_ready(ticket)
    assert run(pair)[0] == [[Sent("r/0")]]


def test_a_receiver_that_falls_silent_costs_the_sender_a_lease() -> None:
    pair, _ = started(lease_s=8.0)
    sender = pair.senders[0]
    for layer in range(3):
        sender.ready([("r/0", 23)], [layer])
    events = []
    for _ in range(9):
        pair.clock.now += 1.0
        events.append(sender.pump())
    assert events == [[]] * 8 + [[SendFailed("r/0", "no progress for a lease of 8 s")]]
    assert sender.active == ()


def test_a_receiver_that_never_takes_the_hand_off_costs_the_sender_a_lease() -> None:
    pair, ticket = started(lease_s=8.0)
    for layer in range(3):
        pair.senders[0].ready([("r/0", 23)], [layer])
    for _ in range(50):
        assert pair.step() == ([[]], [[]])
    pair.senders[0].finish(ticket.transfer_id, HAND_OFF)
    pair.clock.now += 9.0
    assert pair.senders[0].pump() == [SendFailed("r/0", "no progress for a lease of 8 s")]


def test_verified_waits_for_the_engine_alone() -> None:
    pair, ticket = started()
    pair.all_ready(ticket)
    run(pair)
    for _ in range(100):
        assert pair.step(10.0) == ([[]], [[]])
    pair.receivers[0].commit("r/0")
    assert pair.step()[1] == [[Freed("r/0")]]


def test_only_a_verified_transfer_commits() -> None:
    pair, _ = started()
    with pytest.raises(TransferFailed, match="from RESERVED to COMMITTED"):
        pair.receivers[0].commit("r/0")
    with pytest.raises(TransferFailed, match="x/0 is not open"):
        pair.receivers[0].commit("x/0")


def test_calls_about_unknown_transfers_change_nothing() -> None:
    pair, _ = started()
    pair.senders[0].ready([("x/0", 5)], [0])
    pair.senders[0].finish("x/0", HAND_OFF)
    pair.senders[0].abort("x/0", "never was")
    pair.receivers[0].abort("x/0", "never was")
    assert pair.senders[0].active == ("r/0",)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda pair: pair.open("r/0", [8, 9], 0, 8, Window(8192, 64)), "r/0 is open already"),
        (lambda pair: pair.open("s/0", [8, 9], 0, 8, Window(1 << 16, 64)), "staging has 65536 bytes"),
        (lambda pair: pair.open("s/0", [8], 0, 8, Window(8192, 64)), "8 tokens need 2"),
        (lambda pair: pair.open("s/0", [8, 9], 9, 8, Window(8192, 64)), "tokens: found"),
        (lambda pair: pair.open("s/0", [8, 9], 0, 8, Window(0, 64)), "still belongs to r/0"),
    ],
)
def test_reservations_that_cannot_be_right_are_refused(spoil: Callable[[Pair], object], match: str) -> None:
    pair, _ = started()
    with pytest.raises(TransferFailed, match=match):
        spoil(pair)
    assert list(pair.receivers[0].resident) == ["r/0"]


def test_states_go_only_forward() -> None:
    rng = random.Random(0)
    ends = set()
    for _ in range(200):
        lifecycle, path = Lifecycle(), []
        while lifecycle.state is not TransferState.FREE:
            state = rng.choice(list(TransferState))
            try:
                lifecycle.move(state)
                path.append(state)
            except TransferFailed:
                assert state not in path or path[-1] is not TransferState.FREE
        assert len(set(path)) == len(path)
        assert path[-2:] == [TransferState.DRAINED, TransferState.FREE]
        assert (TransferState.COMMITTED in path) != (TransferState.ABORTING in path)
        ends.add(path[-3])
    assert ends == {TransferState.COMMITTED, TransferState.ABORTING}


def test_epochs_differ_within_and_between_lives() -> None:
    source, other = EpochSource(), EpochSource()
    epochs = [source.next() for _ in range(1000)] + [other.next() for _ in range(1000)]
    assert len(set(epochs)) == 2000
    assert max(epochs) < 2**63


def wild_header(rng: random.Random, epoch: int) -> bytes:
    """Noise, or a sealed message with a bit of truth and many odd numbers."""
    wild = [-(2**63), -1, 0, 1, 2, 3, 22, 23, 24, 4096, 2**31, 2**63]
    one, two, three, four, five, six, seven, eight, nine = rng.choices(wild, k=9)
    source, target = rng.choice([0, one]), rng.choice([0, two])
    layers, tokens = (three, four), (five, six)
    name, live = rng.choice(["r/0", "x/0"]), rng.choice([epoch, seven])
    choices = [
        seal(KvFrame(name, live, source, target, nine, layers, tokens, eight, one, rng.choice([None, HAND_OFF]))),
        seal(KvRenew(name, live, source)),
        seal(KvAck(name, live, two, hand_off=bool(two))),
        rng.randbytes(rng.randint(0, 300)),
    ]
    return rng.choice(choices)


def test_headers_at_random_never_raise_and_never_write() -> None:
    pair, ticket = started()
    pair.step()
    rng, receiver, sender = random.Random(1), pair.receivers[0], pair.senders[0]
    for _ in range(3000):
        payload = rng.choice([None, b"", rng.randbytes(64)])
        pair.network.post("target/0", "wild", wild_header(rng, ticket.epoch), payload)
        pair.network.post("source/0", "wild", wild_header(rng, ticket.epoch))
        assert receiver.poll() == []
        assert sender.pump() == []
    assert receiver.rejected > 1000
    assert sender.rejected > 1000
    assert_same(pair.target_caches[0], poisoned_cache(pair.target, pair.num_pages))


def test_what_was_written_over_wrongly_is_missing_again() -> None:
    """A sender cuts the same tokens once more, in another way, and their payload is damaged."""
    pair = Pair(layout(1, layers=1), layout(1, layers=1), copies_take_s=1.0)
    ticket, receiver, device = pair.open("r/0", [0, 1], 0, 8, WINDOW), pair.receivers[0], pair.devices[1]
    dense = dense_kv(pair.source, 8)

    def send(sequence: int, tokens: tuple[int, int], *, damaged: bool = False) -> list[object]:
        """Send a frame and wait for its end."""
        payload = dense[:, :, :, slice(*tokens)].contiguous().view(torch.uint8).flatten()
        frame = KvFrame("r/0", ticket.epoch, 0, 0, sequence, (0, 1), tokens, 0, 0, HAND_OFF)
        frame = replace(frame, checksum=checksum(payload, frame.identity()) + damaged)
        pair.network.post("target/0", "source/0", seal(frame), payload.numpy().tobytes())
        events: list[object] = [*receiver.poll()]
        while device.busy:
            pair.tick(0.1)
        return [*events, *receiver.poll()]

    assert send(1, (0, 6)) == []
    assert send(2, (2, 5), damaged=True) == []
    assert send(3, (6, 8)) == []
    assert send(2, (2, 5)) == [Verified("r/0", HAND_OFF)]
    assert_same(pair.target_caches[0], expected_cache(pair.target, 0, pair.num_pages, [0, 1], dense, range(8)))


def test_no_transfer_is_verified_while_something_is_being_written() -> None:
    pair, _ = slow_pair(1.0)
    receiver, reception = pair.receivers[0], pair.receivers[0]._receptions["r/0"]
    while not reception.landings:
        pair.step(0.1)
    (landing,) = reception.landings.values()
    landing.share.mark(landing.frame)
    receiver._settle(reception)
    while pair.devices[1].busy:
        assert reception.lifecycle.state is TransferState.SENDING
        pair.senders[0].pump()
        assert receiver.poll() == []
        pair.tick(0.1)
    assert receiver.poll() == [Verified("r/0", HAND_OFF)]


def test_a_hand_off_from_another_rank_is_refused() -> None:
    pair = Pair(layout(2), layout(1))
    ticket = pair.open("r/0", list(range(6)), 0, 23, WINDOW)
    pair.network.post("target/0", "wild", seal(KvFinish("r/0", ticket.epoch, 1, HAND_OFF)))
    frame = KvFrame("r/0", ticket.epoch, 1, 0, 1, (0, 1), (0, 1), 2048, 0, HAND_OFF)
    pair.network.post("target/0", "wild", seal(frame), bytes(64))
    pair.receivers[0].poll()
    assert pair.receivers[0].rejected == 2
    assert pair.receivers[0]._receptions["r/0"].hand_off is None


def messages_to_target(pair: Pair) -> list[object]:
    """Those that are on their way."""
    parcels = pair.network.collect("target/0", 100)
    return [message for parcel in parcels for message in unseal(parcel.header)]


def test_all_of_a_small_prompt_is_one_message() -> None:
    pair = Pair(layout(1), layout(1))
    ticket = pair.open("r/0", [0], 0, 2, WINDOW)
    pair.begin(ticket, [0], dense_kv(pair.source, 2))
    pair.all_ready(ticket)
    pair.senders[0].pump()
    (frame,) = messages_to_target(pair)
    assert isinstance(frame, KvFrame)
    assert (frame.layers, frame.tokens, frame.hand_off) == ((0, 3), (0, 2), HAND_OFF)


def finished_late() -> tuple[Pair, Ticket]:
    """All KV has arrived when the first tokens are known."""
    pair, ticket = started()
    pair.senders[0].ready([("r/0", 23)], range(3))
    for _ in range(20):
        pair.step()
    pair.senders[0].finish("r/0", HAND_OFF)
    pair.senders[0].pump()
    return pair, ticket


def test_a_first_token_that_is_known_late_follows_alone_and_at_once() -> None:
    pair, ticket = finished_late()
    assert messages_to_target(pair) == [KvFinish("r/0", ticket.epoch, 0, HAND_OFF)]


def test_a_frame_that_carried_no_hand_off_acknowledges_none() -> None:
    """The hand-off is lost, and the frame acknowledged once more."""
    pair, ticket = finished_late()
    messages_to_target(pair)
    pair.network.post("source/0", "target/0", seal(KvAck("r/0", ticket.epoch, 1, hand_off=False)))
    pair.senders[0].pump()
    assert pair.senders[0].active == ("r/0",)
    assert run(pair)[1] == [[Verified("r/0", HAND_OFF)]], "it comes again"
