"""A request for an answer, from its reservation until its last sample ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitserve.cluster.messages import Cancel, Reserve, transfer_id_of
from splitserve.engine.block_manager import BlockTable
from splitserve.engine.sequence import Sequence


@dataclass(eq=False)
class DecodeRequest:
    """`tables` has one for each sample, and `copies` the (page, page) to copy once the prompt's KV is there.

    Once it has `joined`, `sequences` are the samples that go on. `cancelled` ones end as they join.
    """

    router: bytes
    message: Reserve
    tables: list[BlockTable]
    copies: list[tuple[int, int]]
    arrived: float
    joined: bool = False
    cancelled: set[int] = field(default_factory=set)
    sequences: list[Sequence] = field(default_factory=list)

    @property
    def transfer_id(self) -> str:
        return attempt_id(self.message)


def attempt_id(item: Reserve | Cancel | Sequence) -> str:
    """What an attempt, and the transfer of its KV, is known by."""
    return transfer_id_of(item.request_id, item.attempt)
