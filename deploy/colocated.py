"""Prefill and decode in one process over one set of pages: chunks and decode steps alternate, no KV moves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from splitserve.cluster.channel import Pollable
from splitserve.cluster.counts import BytesUsed
from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import (
    Cancel,
    EngineStats,
    HandOff,
    Prefill,
    PrefixUpdate,
    Reserve,
    SendPrefix,
    SendTo,
    Ticket,
    transfer_id_of,
)
from splitserve.decode_worker.engine import DecodeEngine
from splitserve.engine.batch import Batch
from splitserve.engine.block_manager import BlockTable
from splitserve.engine.ranks import RunBatch
from splitserve.kv_transfer.inlet import Landed, Lost
from splitserve.kv_transfer.outlet import NO_TRAFFIC, Delivered
from splitserve.prefill_worker.engine import PrefillEngine


class LocalInlet:
    """Grants the reservation's own pages to the prefill engine beside it."""

    staging = BytesUsed(0, 0)

    def __init__(self, layout: KvLayout, lease_s: float) -> None:
        self._layout, self._lease_s = layout, lease_s
        self.tables: dict[str, BlockTable] = {}
        self.landed: list[Landed | Lost] = []

    def open(self, transfer_id: str, source: KvLayout, table: BlockTable, stop_token: int) -> Ticket:
        self.tables[transfer_id] = table
        return Ticket(
            transfer_id=transfer_id,
            epoch=0,
            layout=self._layout,
            start_token=table.cached_tokens,
            num_tokens=stop_token,
            lease_s=self._lease_s,
            endpoints=(),
        )

    def expect(self, transfer_id: str) -> None:
        """The pages are there."""

    def close(self, transfer_id: str) -> None:
        del self.tables[transfer_id]

    def poll(self) -> list[Landed | Lost]:
        landed, self.landed = self.landed, []
        return landed


class LocalOutlet:
    """Prefill into pages that decode reserved. They stay decode's: nothing is freed here."""

    traffic = NO_TRAFFIC

    def __init__(self, inlet: LocalInlet) -> None:
        self._inlet = inlet
        self._open: set[str] = set()
        self._delivered: list[Delivered] = []

    def open(self, request: Prefill, ticket: Ticket | None) -> BlockTable:
        transfer_id = transfer_id_of(request.request_id, request.attempt)
        if transfer_id not in self._inlet.tables:
            raise TransferFailed("the reservation is gone")
        self._open.add(transfer_id)
        return self._inlet.tables[transfer_id]

    def send_to(self, ticket: Ticket) -> None:
        """It goes nowhere."""

    def run_command(self, batch: Batch, written: Sequence[tuple[str, int]]) -> object:
        return RunBatch(batch)

    def finish(self, transfer_id: str, hand_off: HandOff) -> None:
        self._open.remove(transfer_id)
        self._inlet.landed.append(Landed(transfer_id, hand_off))
        self._delivered.append(Delivered(transfer_id, None))

    def keep(self, tickets: Sequence[Ticket]) -> None:
        """A reservation in the same process needs no lease."""

    def decline(self, ticket: Ticket, reason: str) -> None:
        """Nobody waits for it but the decode engine, which the same message has reached."""

    def lend(self, prefix: SendPrefix) -> None:
        """Nobody asks a colocated engine."""

    def abort(self, transfer_id: str, reason: str) -> None:
        self._open.discard(transfer_id)

    def poll(self) -> list[Delivered]:
        given_up = [transfer_id for transfer_id in self._open if transfer_id not in self._inlet.tables]
        self._open.difference_update(given_up)
        delivered, self._delivered = self._delivered, []
        return delivered + [Delivered(transfer_id, "decode gave the request up") for transfer_id in given_up]


class ColocatedEngine:
    """One prefill and one decode engine behind one socket."""

    def __init__(self, prefill: PrefillEngine, decode: DecodeEngine) -> None:
        self._prefill, self._decode = prefill, decode

    def handle(self, router: bytes, item: object) -> None:
        if isinstance(item, Prefill | SendTo | Cancel):
            self._prefill.handle(router, item)
        if isinstance(item, Reserve | Cancel):
            self._decode.handle(router, item)

    def step(self) -> bool:
        # Prefill first, always: it drops what decode has given up since, before it could write into freed pages.
        prefilled = self._prefill.step()
        return self._decode.step() or prefilled

    @property
    def sockets(self) -> list[Pollable]:
        return self._decode.sockets

    @property
    def idle(self) -> bool:
        return self._prefill.idle and self._decode.idle

    def forget(self, router: bytes) -> None:
        self._prefill.forget(router)
        self._decode.forget(router)

    def expire(self) -> None:
        self._prefill.expire()
        self._decode.expire()

    def stats(self) -> EngineStats:
        prefill, decode = self._prefill.stats(), self._decode.stats()
        running, waiting = prefill.running + decode.running, prefill.waiting + decode.waiting
        tokens = prefill.counts.output_tokens + decode.counts.output_tokens
        # Both look prompts up in the same cache: prefill's count is the whole of it.
        counts = replace(prefill.counts, output_tokens=tokens, decode_steps=decode.counts.decode_steps)
        speed = replace(prefill.speed, step_s=decode.speed.step_s)
        return replace(decode, role="colocated", running=running, waiting=waiting, counts=counts, speed=speed)

    def prefix_update(self, since: int) -> PrefixUpdate | None:
        return self._decode.prefix_update(since)  # they share their pages
