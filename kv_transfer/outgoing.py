"""One transfer as its source rank sees it: what is ready, what has been cut into frames, and what is on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from splitserve.cluster.counts import Transport
from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import HandOff, RankEndpoint, Ticket
from splitserve.kv_transfer.mover import Mark, Move
from splitserve.kv_transfer.packing import bytes_per_layer_token
from splitserve.kv_transfer.protocol import KvFrame
from splitserve.kv_transfer.reshard import Piece, reshard
from splitserve.kv_transfer.staging import FrameSizes, Window, window_share

TOKENS_A_CUT = 64  # or a multiple: frames then begin where tiles of most pages do


@dataclass(frozen=True)
class Region:
    """Layers [start, stop) by tokens [start, stop)."""

    layers: tuple[int, int]
    tokens: tuple[int, int]


def next_region(
    cut: Sequence[int], ready: Sequence[int], token_bytes: int, slot_bytes: int, least: int
) -> Region | None:
    """What to send next, or None while it pays to wait.

    `cut` and `ready` say for each layer up to which token it has been cut and computed; `token_bytes` are those of
    one token of one layer. A frame takes the first layer that has something and the next ones that stand at the same
    tokens: all of them, where need be with fewer tokens, in as few frames as do. One of fewer bytes than `least` waits
    for the next layer, which is being computed.
    """
    first = next((layer for layer in range(len(cut)) if cut[layer] < ready[layer]), None)
    if first is None:
        return None
    start, stop, last = cut[first], ready[first], first + 1
    while last < len(cut) and cut[last] == start and ready[last] >= stop:
        last += 1
    rows = slot_bytes // token_bytes
    if (last - first) * (stop - start) > rows:
        last = min(last, first + max(1, rows // min(TOKENS_A_CUT, stop - start)))
        most = rows // (last - first)
        even = -(-(stop - start) // -(-(stop - start) // most))
        whole = -(-even // TOKENS_A_CUT) * TOKENS_A_CUT
        return Region((first, last), (start, min(stop, start + (whole if whole <= most else even))))
    next_comes = last < len(cut) and cut[last] == start and ready[last] < stop
    if next_comes and (last - first) * (stop - start) * token_bytes < min(least, slot_bytes // 2):
        return None
    return Region((first, last), (start, stop))


@dataclass
class Lane:
    """The way to one target rank: the piece it gets, and this rank's share of the window there, a slot a frame."""

    piece: Piece
    target: RankEndpoint
    token_bytes: int
    slot_bytes: int
    least: int
    free_slots: list[int]
    cut: list[int]

    @property
    def is_cut(self) -> bool:
        return min(self.cut) >= self.piece.stop_token

    def take(self, ready: Sequence[int]) -> Region | None:
        """Cut the next region, when a slot is free and something is ready."""
        if not self.free_slots:
            return None
        within = [min(token, self.piece.stop_token) for token in ready]
        region = next_region(self.cut, within, self.token_bytes, self.slot_bytes, self.least)
        if region is not None:
            for layer in range(*region.layers):
                self.cut[layer] = region.tokens[1]
        return region


@dataclass
class Flight:
    """A frame that has not been acknowledged. It holds a slot of its lane and is packed and sent (again) at `due`.

    `written` is the mark behind which its KV is in the pages, None once that has passed. `move` fills `payload` while
    it is being packed. What has landed in the meantime keeps its slot until that ends.
    """

    frame: KvFrame
    lane: Lane
    due: float
    written: Mark
    move: Move | None = None
    payload: torch.Tensor | None = None
    landed: bool = False


@dataclass
class Outgoing:
    """A transfer in progress.

    `ready` says for each layer up to which token its KV lies in the pages, once its mark in `marks` has passed.
    `beat_at` is when all targets next hear that this rank is at it, and `rests_until` when there is something to do for
    it again, if nothing is heard of it before.
    """

    ticket: Ticket
    table: torch.Tensor
    lanes: list[Lane]
    transport: Transport
    ready: list[int]
    marks: list[Mark]
    owes_hand_off: bool
    expires: float
    beat_at: float
    rests_until: float
    hand_off: HandOff | None = None
    flights: dict[int, Flight] = field(default_factory=dict)
    sequence: int = 0

    @property
    def awaits_receiver(self) -> bool:
        """Whether the next move is the receiver's. It is this rank's own engine's while KV is being computed."""
        return bool(self.flights) or (self.owes_hand_off and self.hand_off is not None)

    def targets(self, rank: int) -> tuple[RankEndpoint, ...]:
        """All that hear from source rank `rank`; the hand-off goes from rank 0 to rank 0, with a piece or without."""
        first = self.ticket.endpoints[:1] if rank == 0 else ()
        return tuple(dict.fromkeys((*first, *(lane.target for lane in self.lanes))))

    @property
    def has_more_to_send(self) -> bool:
        """Whether frames for target rank 0 are still to leave."""
        uncut = any(not lane.is_cut for lane in self.lanes if lane.piece.target_rank == 0)
        flights = [flight for flight in self.flights.values() if flight.lane.piece.target_rank == 0]
        return uncut or any(flight.written is not None or flight.move is not None for flight in flights)

    @property
    def is_packing(self) -> bool:
        """Whether this rank may still write to the window, once it has looked for moves that are done."""
        return any(flight.move is not None and flight.move.total() is None for flight in self.flights.values())

    @property
    def is_under_way(self) -> bool:
        """Whether a device computes or packs KV for a frame."""
        return any(flight.move is not None or flight.written is not None for flight in self.flights.values())

    def rest(self) -> None:
        """Nothing is under way, and nothing can be cut until more is ready or a frame has landed."""
        self.rests_until = min([self.expires, self.beat_at, *(flight.due for flight in self.flights.values())])

    @property
    def is_complete(self) -> bool:
        return not self.flights and not self.owes_hand_off and all(lane.is_cut for lane in self.lanes)


def build_lanes(
    ticket: Ticket, source: KvLayout, rank: int, frame_sizes: Callable[[RankEndpoint], FrameSizes]
) -> list[Lane]:
    """The lanes of source rank `rank`, with frames of `frame_sizes`.

    Raises TransferFailed when the ticket does not fit the cache or has no room.
    """
    if len(ticket.endpoints) != ticket.layout.tp:
        raise TransferFailed(f"endpoints: found {len(ticket.endpoints)}; a target of tp={ticket.layout.tp} has as many")
    plan = reshard(source, ticket.layout, ticket.start_token, ticket.num_tokens)
    return [_lane(ticket, source, plan, piece, frame_sizes) for piece in plan if piece.source_rank == rank]


def _lane(
    ticket: Ticket,
    source: KvLayout,
    plan: tuple[Piece, ...],
    piece: Piece,
    frame_sizes: Callable[[RankEndpoint], FrameSizes],
) -> Lane:
    target = ticket.endpoints[piece.target_rank]
    window = Window(target.window_offset, target.window_bytes)
    if not window.is_possible:
        raise TransferFailed(f"window: found {window}; no staging area has that")
    share = window_share(plan, piece, window)
    token_bytes = bytes_per_layer_token(source, piece.source_heads)
    sizes = frame_sizes(target)
    slots = share.slots(token_bytes, sizes)
    if not slots:
        raise TransferFailed(f"window: a source's share has {share.size} bytes; one token of a layer has {token_bytes}")
    return Lane(
        piece=piece,
        target=target,
        token_bytes=token_bytes,
        slot_bytes=slots[0].size,
        least=sizes.least,
        free_slots=[slot.offset for slot in slots],
        cut=[piece.start_token] * source.num_layers,
    )
