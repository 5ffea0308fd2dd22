"""One transfer as a receiving rank sees it: what is due from whom, and what has landed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import HandOff
from splitserve.kv_transfer.lifecycle import Lifecycle
from splitserve.kv_transfer.mover import Mark, Move
from splitserve.kv_transfer.packing import bytes_per_layer_token
from splitserve.kv_transfer.protocol import Incoming, KvFrame
from splitserve.kv_transfer.reshard import Piece, reshard
from splitserve.kv_transfer.staging import ALIGNMENT, Window, window_share


class Share:
    """What one source rank owes: its piece, its part of the window, and a bitmap [layers, tokens] of what is here.

    What comes again comes in the frames of before, so these are known by their layers and tokens.
    """

    def __init__(self, piece: Piece, layout: KvLayout, window: Window) -> None:
        self.piece, self.window = piece, window
        self._token_bytes = bytes_per_layer_token(layout, piece.target_heads)
        self._landed = np.zeros((layout.num_layers, piece.stop_token - piece.start_token), dtype=np.bool_)
        self._missing = self._landed.size
        self._frames: set[tuple[tuple[int, int], tuple[int, int]]] = set()

    def size(self, frame: KvFrame) -> int:
        """Bytes of the frame's payload."""
        return self._token_bytes * (frame.layers[1] - frame.layers[0]) * (frame.tokens[1] - frame.tokens[0])

    def admits(self, frame: KvFrame) -> bool:
        """Whether the frame names part of the piece and a place in the window."""
        (first, last), (start, stop) = frame.layers, frame.tokens
        return (
            0 <= first < last <= len(self._landed)
            and self.piece.start_token <= start < stop <= self.piece.stop_token
            and self.window.offset <= frame.offset
            and frame.offset % ALIGNMENT == 0
            and frame.offset + self.size(frame) <= self.window.end
        )

    def has(self, frame: KvFrame) -> bool:
        return self.is_complete or (frame.layers, frame.tokens) in self._frames

    def mark(self, frame: KvFrame) -> None:
        part = self._part(frame)
        self._missing -= part.size - int(np.count_nonzero(part))
        part[:] = True
        self._frames.add((frame.layers, frame.tokens))

    def spoil(self, frame: KvFrame) -> None:
        """Something else than what is owed was written where the frame goes: that is missing, again if it was here."""
        part = self._part(frame)
        self._missing += int(np.count_nonzero(part))
        part[:] = False

    @property
    def is_complete(self) -> bool:
        return self._missing == 0

    def _part(self, frame: KvFrame) -> npt.NDArray[np.bool_]:
        start = self.piece.start_token
        return self._landed[slice(*frame.layers), frame.tokens[0] - start : frame.tokens[1] - start]


@dataclass(frozen=True)
class Landing:
    """A frame on its way from staging into pages; `peer` awaits the answer."""

    frame: KvFrame
    share: Share
    peer: bytes
    move: Move


class Reception:
    """A transfer on target rank `rank`. `expires` ends the lease, and after the end, the window's quarantine.

    `writers` are the source ranks that may still send; `peers` are the transport's names of those that have.
    `landings` are by source rank and sequence. Behind `mark` nothing else uses the pages of `table` any more; None
    once a copy waits for it, as copies follow one another. Rank 0 also awaits the hand-off, from source rank 0.
    """

    def __init__(
        self, incoming: Incoming, layout: KvLayout, rank: int, table: torch.Tensor, mark: Mark, now: float
    ) -> None:
        self.incoming, self.table, self.mark = incoming, table, mark
        self.window = Window(incoming.window_offset, incoming.window_bytes)
        self.lifecycle = Lifecycle()
        self.hand_off: HandOff | None = None
        self.peers: dict[int, bytes] = {}
        self.landings: dict[tuple[int, int], Landing] = {}
        self._awaits_hand_off = rank == 0
        plan = reshard(incoming.source, layout, incoming.start_token, incoming.stop_token)
        self.shares = {
            piece.source_rank: Share(piece, layout, window_share(plan, piece, self.window))
            for piece in plan
            if piece.target_rank == rank
        }
        self.writers = set(self.shares) | ({0} if self._awaits_hand_off else set())
        self.renew(now)

    def renew(self, now: float) -> None:
        self.expires = now + self.incoming.lease_s

    @property
    def has_begun(self) -> bool:
        return bool(self.peers) or self.is_complete

    @property
    def is_complete(self) -> bool:
        return not any(self.owes(source_rank) for source_rank in {0, *self.shares})

    def owes(self, source_rank: int) -> bool:
        """Whether something is missing that `source_rank` has to send."""
        share = self.shares.get(source_rank)
        awaits_hand_off = self._awaits_hand_off and self.hand_off is None and source_rank == 0
        return awaits_hand_off or (share is not None and not share.is_complete)
