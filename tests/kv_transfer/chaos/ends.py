"""The two ends of KV transfers in a chaos run: what a prefill and a decode rank do with them, without engines.

A rank that finds something wrong dies of an AssertionError, which ends the run.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from splitserve.cluster.channel import Pollable
from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.messages import HandOff, Ticket
from splitserve.engine.kv_cache import KvCache
from splitserve.kv_transfer.by_device import new_mover
from splitserve.kv_transfer.inlet import WINDOWS_PER_STAGING
from splitserve.kv_transfer.lifecycle import TransferState
from splitserve.kv_transfer.protocol import Freed, Incoming, ReceiveFailed, ReceiverEvent, SendFailed, Verified
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.staging import EpochSource, Window, WindowAllocator, window_size
from tests.kv_transfer.chaos.setup import (
    MAX_LINKS,
    POISON,
    RankState,
    Setup,
    request_of,
    same_rows,
    source_cache,
    threads_and_files,
    warm_up,
)
from tests.kv_transfer.chaos.ways import receiving, sending

GUARD_EVERY = 8  # of a target's pages, one belongs to nobody

Tell = Callable[..., object]


class SourceRank:
    """A prefill rank, with the KV of all prompts in its pages."""

    address = ""

    def __init__(self, setup: Setup, device: torch.device, tell: Tell) -> None:
        self._setup, self._tell = setup, tell
        transport, self._linked = sending(setup, device)
        mover = new_mover(source_cache(setup, device))
        self._sender = KvSender(mover, 0, transport, time.monotonic)
        self._targets: dict[str, str] = {}
        self._tokens: set[str] = set()
        warm_up(mover)

    @property
    def sockets(self) -> list[Pollable]:
        return self._sender.sockets

    @property
    def busy(self) -> bool:
        return self._sender.busy

    @property
    def frames(self) -> int:
        return sum(len(outgoing.flights) for outgoing in self._sender._outgoing.values())

    @property
    def is_linked(self) -> bool:
        """Where there are links, whether two are up."""
        return self._linked is None or sum(link.state == "up" for link in self._linked.links) >= 2

    def handle(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("begin", Ticket() as ticket):
                self._begin(ticket)
            case ("abort", str(transfer_id), str(reason)):
                self._targets.pop(transfer_id, None)
                self._sender.abort(transfer_id, reason)
            case _:
                raise AssertionError(message)

    def poll(self) -> int:
        """How many transfers have ended."""
        events = self._sender.pump()
        links = self._linked.links if self._linked else []
        assert len(links) <= MAX_LINKS
        self._tokens |= {link.token for link in links}
        for event in events:
            target = self._targets.pop(event.transfer_id)
            if isinstance(event, SendFailed):
                self._tell("stopped", event.transfer_id, event.reason)
            else:
                state, _ = self._links.get(target, ("", 0))
                self._tell("sent", event.transfer_id, state == "up")
        return len(events)

    def state(self, warm: tuple[int, int] | None) -> RankState:
        left = f"{self._sender.active}" if self._sender.active or self._sender.busy else ""
        return RankState(left, threads_and_files(), warm, self._links, len(self._tokens))

    def close(self) -> None:
        self._sender.close()

    def _begin(self, ticket: Ticket) -> None:
        tokens, pages = self._setup.prompt(ticket.transfer_id)
        try:
            self._sender.begin(ticket, pages)
        except TransferFailed as error:
            self._sender.decline(ticket, str(error))
            self._tell("stopped", ticket.transfer_id, str(error))
            return
        self._targets[ticket.transfer_id] = ticket.endpoints[0].address
        self._sender.ready([(ticket.transfer_id, tokens)], range(self._setup.source.num_layers))
        self._sender.finish(ticket.transfer_id, HandOff((request_of(ticket.transfer_id),)))

    @property
    def _links(self) -> dict[str, tuple[str, int]]:
        peers = self._linked._peers if self._linked else {}
        return {address: (peer.link.state, peer.puts) for address, peer in peers.items() if peer.link is not None}


class TargetRank:
    """A decode rank. What has come is compared when it is verified, and again when its window is free."""

    def __init__(self, setup: Setup, device: torch.device, tell: Tell) -> None:
        self._setup, self._tell = setup, tell
        self._expected, self._cache = source_cache(setup, device), KvCache(setup.target, setup.target_pages, device)
        for layer in self._cache.layers:
            layer.fill_(POISON)
        self._guards = list(range(0, setup.target_pages, GUARD_EVERY))
        self._free = [page for page in range(setup.target_pages) if page % GUARD_EVERY]
        self._windows, self._epochs = WindowAllocator(setup.staging_bytes), EpochSource()
        self._granted: dict[str, tuple[Window, list[int]]] = {}
        transport, self._linked, self._endpoint = receiving(setup, device)
        mover = new_mover(self._cache)
        self._receiver = KvReceiver(mover, 0, setup.staging_bytes, transport, time.monotonic)
        self.address = self._endpoint.address
        warm_up(mover)
        self._check()
        assert same_rows(self._cache, [0], self._cache, [GUARD_EVERY], 1)

    @property
    def sockets(self) -> list[Pollable]:
        return self._receiver.sockets

    @property
    def busy(self) -> bool:
        return self._receiver.busy

    @property
    def frames(self) -> int:
        """Transfers of which something has come."""
        return list(self._receiver.resident.values()).count(TransferState.SENDING)

    @property
    def is_linked(self) -> bool:
        """Where there are links, whether two are up."""
        return self._linked is None or sum(link.state == "up" for link in self._linked.links) >= 2

    def handle(self, message: tuple[Any, ...]) -> None:
        match message:
            case ("open", str(transfer_id)):
                self._open(transfer_id)
            case ("abort", str(transfer_id), str(reason)):
                self._receiver.abort(transfer_id, reason)
            case ("check",):
                self._check()
            case _:
                raise AssertionError(message)

    def poll(self) -> int:
        """How many transfers have ended."""
        events = self._receiver.poll()
        assert self._linked is None or len(self._linked.links) <= MAX_LINKS
        for event in events:
            self._take(event)
        return len(events)

    def state(self, warm: tuple[int, int] | None) -> RankState:
        pages = self._setup.target_pages - len(self._guards) - len(self._free)
        held = self._receiver.resident, self._granted, self._windows.granted_bytes, pages
        return RankState(f"{held}" if any(held) else "", threads_and_files(), warm)

    def close(self) -> None:
        self._check()
        self._receiver.close()

    def _open(self, transfer_id: str) -> None:
        setup, layout = self._setup, self._setup.target
        tokens, _ = setup.prompt(transfer_id)
        count = -(-tokens // layout.page_size)
        size = window_size(layout, tokens, 1, setup.staging_bytes // WINDOWS_PER_STAGING)
        if count > len(self._free) or (window := self._windows.allocate(size)) is None:
            self._tell("busy", transfer_id)
            return
        random.shuffle(self._free)
        pages, self._free = self._free[:count], self._free[count:]
        self._granted[transfer_id] = window, pages
        place, epoch = (window.offset, window.size), self._epochs.next()
        self._receiver.open(Incoming(transfer_id, epoch, setup.source, 0, tokens, tuple(pages), *place, setup.lease_s))
        endpoint = replace(self._endpoint, window_offset=window.offset, window_bytes=window.size)
        self._tell("granted", transfer_id, Ticket(transfer_id, epoch, layout, 0, tokens, setup.lease_s, (endpoint,)))

    def _take(self, event: ReceiverEvent) -> None:
        transfer_id = event.transfer_id
        window, pages = self._granted[transfer_id]
        match event:
            case Verified():
                assert event.hand_off == HandOff((request_of(transfer_id),))
                self._compare(transfer_id, pages)
                self._receiver.commit(transfer_id)
                self._tell("verified", transfer_id)
            case ReceiveFailed():
                self._tell("failed", transfer_id, event.reason)
                self._free += pages
                pages.clear()
            case Freed():
                if pages:
                    self._compare(transfer_id, pages)
                self._free += pages
                self._windows.release(window)
                del self._granted[transfer_id]

    def _compare(self, transfer_id: str, pages: list[int]) -> None:
        tokens, origin = self._setup.prompt(transfer_id)
        assert same_rows(self._cache, pages, self._expected, origin, tokens), f"{transfer_id} is not what was sent"

    def _check(self) -> None:
        for layer in self._cache.layers:
            assert bool((layer[:, self._guards] == POISON).all()), "a page that belongs to nobody was written"
