"""Many transfers over a network that loses, delays, repeats, reorders and damages, between engines that die or stall.

A transfer must end committed bit for bit or failed, no page outside a live reservation may ever change, and in the
end nothing may be left: no transfer, no window, no page.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import Ticket
from splitserve.kv_transfer.memory import Faults
from splitserve.kv_transfer.protocol import Freed, KvRenew, ReceiveFailed, SendFailed, Sent, Verified, seal
from splitserve.kv_transfer.staging import Window, WindowAllocator, window_size
from tests.kv_transfer.ranks import HAND_OFF, POISON, Pair, assert_same, dense_kv, layout, poisoned_cache, write

LAYOUTS = [
    (layout(1, layers=2), layout(1, layers=2, page_size=3)),
    (layout(1, layers=2), layout(2, layers=2)),
    (layout(2, layers=2), layout(1, layers=2, page_size=5)),
    (layout(4, heads=2, layers=2), layout(1, heads=2, layers=2)),
    (layout(2, planes=1, layers=2), layout(1, planes=1, layers=2)),
]
FAULTS = [
    Faults(),
    Faults(drop=0.1, repeat=0.2, corrupt=0.1, delay_s=0.3),
    Faults(drop=0.3, repeat=0.1, corrupt=0.2, delay_s=1.0),
    Faults(delay_s=6.0, repeat=0.5),
]
SOURCE_PAGES, TARGET_PAGES = 40, 14
LEASE_S, TRANSFERS, STEP_S, MAX_STEPS = 2.0, 6, 0.1, 2000


@dataclass
class Live:
    """A transfer as the two engines' leaders know it."""

    ticket: Ticket
    window: Window
    target_pages: list[int]
    dense: torch.Tensor
    verified: set[int] = field(default_factory=set)
    freed: set[int] = field(default_factory=set)
    sent: set[int] = field(default_factory=set)
    outcome: str = ""
    aborted_by_receiver: bool = False


class Chaos:
    def __init__(self, seed: int, source: KvLayout, target: KvLayout, faults: Faults) -> None:
        self.rng = random.Random(seed)
        staging = 6144
        self.pair = Pair(
            source,
            target,
            SOURCE_PAGES,
            staging,
            seed,
            faults,
            shared_staging=seed % 2 == 0,
            lease_s=LEASE_S,
            copies_take_s=(0.0, 0.3, 1.5)[seed % 3],
        )
        self.windows = WindowAllocator(staging)
        self.free_pages = list(range(TARGET_PAGES))
        self.source_pages = self.rng.sample(range(SOURCE_PAGES), SOURCE_PAGES)
        self.expected = [poisoned_cache(target, SOURCE_PAGES) for _ in range(target.tp)]
        self.live: dict[str, Live] = {}
        self.started = 0
        self.outcomes: Counter[str] = Counter()
        self.dead = self.rng.choice([None, None, *range(source.tp)])
        self.dies_after = self.rng.randint(0, 40)
        self.stalled_until = [0.0] * source.tp

    def run(self) -> Counter[str]:
        for step in range(MAX_STEPS):
            if self.started < TRANSFERS:
                self._start()
            elif not self.live:
                break
            self._disturb()
            self._turn(step)
            if step % 5 == 0:
                self._check_pages()
        self._check_end()
        return self.outcomes

    def _start(self) -> None:
        pair, tokens = self.pair, self.rng.randint(1, 18)
        start = self.rng.randint(0, tokens)
        size = window_size(pair.target, tokens, pair.source.tp, self.rng.choice([512, 1536, 3072]))
        needed = -(-tokens // pair.target.page_size)
        if len(self.free_pages) < needed or (window := self.windows.allocate(size)) is None:
            return
        self.started += 1
        self.rng.shuffle(self.free_pages)
        pages = [self.free_pages.pop() for _ in range(needed)]
        ticket = pair.open(f"r{self.started}/0", pages, start, tokens, window)
        source_pages = [self.source_pages.pop() for _ in range(-(-tokens // pair.source.page_size))]
        dense = dense_kv(pair.source, tokens, seed=self.started)
        self.live[ticket.transfer_id] = Live(ticket, window, pages, dense)
        if self.rng.random() < 0.1:
            return  # the request never reaches prefill
        for rank, (sender, cache) in enumerate(zip(pair.senders, pair.source_caches, strict=True)):
            sender.begin(ticket, source_pages)
            write(cache, rank, source_pages, dense, range(tokens))

    def _disturb(self) -> None:
        if self.rng.random() < 0.01:
            self.stalled_until[self.rng.randrange(self.pair.source.tp)] = self.pair.clock.now + 2.5 * LEASE_S
        if not self.live or self.rng.random() > 0.02:
            return
        live = self.rng.choice(list(self.live.values()))
        name = live.ticket.transfer_id
        if self.rng.random() < 0.5 and not live.outcome:
            live.aborted_by_receiver = True
            for receiver in self.pair.receivers:
                receiver.abort(name, "cancelled")
        else:
            for sender in self.pair.senders:
                sender.abort(name, "cancelled")

    def _turn(self, step: int) -> None:
        self.pair.tick(STEP_S)
        for rank, sender in enumerate(self.pair.senders):
            if (rank == self.dead and step >= self.dies_after) or self.pair.clock.now < self.stalled_until[rank]:
                continue
            self._prefill(rank)
            for event in sender.pump():
                match event:
                    case Sent():
                        if live := self.live.get(event.transfer_id):
                            live.sent.add(rank)
                    case SendFailed():
                        for other in self.pair.senders:
                            other.abort(event.transfer_id, event.reason)
        for rank, receiver in enumerate(self.pair.receivers):
            for received in receiver.poll():
                self._on_received(rank, received)

    def _prefill(self, rank: int) -> None:
        sender = self.pair.senders[rank]
        for name in sender.active:
            tokens = self.live[name].ticket.num_tokens if name in self.live else 0
            sender.ready([(name, self.rng.randint(0, tokens))], [self.rng.randrange(2)])
            if self.rng.random() < 0.3:
                sender.ready([(name, tokens)], [0])
                sender.ready([(name, tokens)], [1])
                if rank == 0:
                    sender.finish(name, HAND_OFF)

    def _on_received(self, rank: int, event: Verified | ReceiveFailed | Freed) -> None:
        live = self.live[event.transfer_id]
        match event:
            case Verified():
                assert event.hand_off == (None if rank else HAND_OFF)
                live.verified.add(rank)
                if len(live.verified) == self.pair.target.tp and not live.outcome:
                    self._commit(live)
            case ReceiveFailed():
                assert live.outcome != "committed"
                assert live.aborted_by_receiver or len(live.sent) < self.pair.source.tp
                if not live.outcome:
                    self._fail(live)
            case Freed():
                live.freed.add(rank)
                if len(live.freed) == self.pair.target.tp:
                    self.windows.release(live.window)
                    del self.live[event.transfer_id]

    def _commit(self, live: Live) -> None:
        live.outcome = "committed"
        self.outcomes["committed"] += 1
        tokens = range(live.ticket.start_token, live.ticket.num_tokens)
        for rank, (receiver, cache) in enumerate(zip(self.pair.receivers, self.expected, strict=True)):
            receiver.commit(live.ticket.transfer_id)
            write(cache, rank, live.target_pages, live.dense, tokens)
        self._check_pages()
        self._give_away(live)

    def _fail(self, live: Live) -> None:
        live.outcome = "failed"
        self.outcomes["failed"] += 1
        for receiver in self.pair.receivers:
            receiver.abort(live.ticket.transfer_id, "another rank failed")
        self._give_away(live)

    def _give_away(self, live: Live) -> None:
        """The pages go to a next owner at once, who writes something else into them."""
        for cache in (*self.pair.target_caches, *self.expected):
            for layer in cache.layers:
                layer[:, live.target_pages] = POISON
        self.free_pages += live.target_pages

    def _check_pages(self) -> None:
        reserved = {page for live in self.live.values() if not live.outcome for page in live.target_pages}
        kept = [page for page in range(SOURCE_PAGES) if page not in reserved]
        for found, expected in zip(self.pair.target_caches, self.expected, strict=True):
            for left, right in zip(found.layers, expected.layers, strict=True):
                assert torch.equal(left[:, kept], right[:, kept])

    def _check_end(self) -> None:
        assert self.started == TRANSFERS
        assert not self.live, "every transfer ends"
        assert self.outcomes.total() == TRANSFERS
        assert self.windows.granted_bytes == 0
        assert sorted(self.free_pages) == list(range(TARGET_PAGES))
        assert all(not receiver.resident for receiver in self.pair.receivers)
        for _ in range(100):
            self.pair.tick(LEASE_S / 2)
            for sender in self.pair.senders:
                sender.pump()
            for receiver in self.pair.receivers:
                assert receiver.poll(limit=100_000) == [], "what comes late is nobody's"
        assert all(not sender.active for sender in self.pair.senders)
        self._check_pages()


@pytest.mark.parametrize("faults", FAULTS, ids=["calm", "rough", "rougher", "late"])
@pytest.mark.parametrize(("source", "target"), LAYOUTS, ids=["1-1", "1-2", "2-1", "4-1 replicated", "2-1 latent"])
def test_every_transfer_ends_and_nothing_else_changes(source: KvLayout, target: KvLayout, faults: Faults) -> None:
    outcomes: Counter[str] = Counter()
    for seed in range(12):
        outcomes += Chaos(seed, source, target, faults).run()
    assert outcomes["committed"] > 5
    assert outcomes["failed"] > 5


def test_frames_that_come_after_an_abort_find_no_way_into_reused_pages() -> None:
    for shared in (False, True):
        pair = Pair(layout(1), layout(1), faults=Faults(delay_s=5.0), shared_staging=shared, lease_s=4.0)
        pages = [0, 1, 2, 3]
        first = pair.open("a/0", pages, 0, 16, Window(0, 2048))
        pair.begin(first, pages, dense_kv(pair.source, 16, seed=1))
        pair.all_ready(first)
        pair.senders[0].pump()
        pair.receivers[0].abort("a/0", "cancelled")
        second = pair.open("b/0", pages, 0, 16, Window(2048, 2048))
        for _ in range(100):
            pair.step(0.1)
        cache = pair.target_caches[0]
        assert_same(cache, poisoned_cache(pair.target, pair.num_pages))
        assert "a/0" not in pair.receivers[0].resident
        third = pair.open("c/0", pages, 0, 16, Window(0, 2048))
        assert len({first.epoch, second.epoch, third.epoch}) == 3


def test_a_window_is_granted_again_only_after_its_last_writer() -> None:
    """A sender that sleeps through its lease wakes and writes into what is another's window by then."""
    pair = Pair(layout(1), layout(1), shared_staging=True, lease_s=2.0)
    window, dense = Window(0, 2048), dense_kv(pair.source, 16, seed=2)
    sleeper = pair.open("a/0", [0, 1, 2, 3], 0, 16, window)
    pair.begin(sleeper, [0, 1, 2, 3], dense_kv(pair.source, 16, seed=1))
    for _ in range(60):
        pair.clock.now += 0.1
        pair.receivers[0].poll()
    assert pair.receivers[0].resident == {}
    second = pair.open("b/0", [4, 5, 6, 7], 0, 16, window)
    for _ in range(40):
        # As if the sleeper's process wrote right behind the other sender, each time before the receiver looks.
        pair.network.staging["target/0"].random_()
        pair.network.post("target/0", "sleeper", seal(KvRenew("a/0", sleeper.epoch, 0)))
        pair.receivers[0].poll()
    assert_same(pair.target_caches[0], poisoned_cache(pair.target, pair.num_pages))
    assert pair.receivers[0].resident.keys() == {"b/0"}
    pair.begin(second, [8, 9, 10, 11], dense)
    pair.all_ready(second)
    damaged = 0
    for turn in range(200):
        pair.clock.now += 0.01
        pair.senders[0].pump()
        if turn % 3:
            pair.network.staging["target/0"][::97] += 1
            damaged += 1
        pair.receivers[0].poll()
    assert damaged > 100
    write(expected := poisoned_cache(pair.target, pair.num_pages), 0, [4, 5, 6, 7], dense, range(16))
    assert_same(pair.target_caches[0], expected)
