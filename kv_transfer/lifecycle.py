"""The states of one transfer on one receiving rank.

RESERVED --> SENDING --> LANDED --> VERIFIED --> COMMITTED
    |           |           |           |            |
    +-----------+-----------+-----------+            |
                      |                              |
                      v                              v
                  ABORTING --------------------> DRAINED --> FREE

RESERVED    pages and window are set apart; no source rank has spoken
SENDING     a source rank has spoken; frames go into pages as their checksums hold
LANDED      the last frame is here
VERIFIED    every checksum holds; waits for the engine, whose ranks all agree before any commits
COMMITTED   the pages belong to the sequence
ABORTING    the epoch is dead: nothing of it is written any more, and its pages may be given away at once
DRAINED     nobody writes the window: every source rank said so, or a lease has passed since the end
FREE        forgotten, and the window may be granted again
"""

from __future__ import annotations

from enum import Enum, auto

from splitserve.cluster.errors import TransferFailed


class TransferState(Enum):
    RESERVED = auto()
    SENDING = auto()
    LANDED = auto()
    VERIFIED = auto()
    COMMITTED = auto()
    ABORTING = auto()
    DRAINED = auto()
    FREE = auto()


_NEXT = {
    TransferState.RESERVED: {TransferState.SENDING, TransferState.ABORTING},
    TransferState.SENDING: {TransferState.LANDED, TransferState.ABORTING},
    TransferState.LANDED: {TransferState.VERIFIED, TransferState.ABORTING},
    TransferState.VERIFIED: {TransferState.COMMITTED, TransferState.ABORTING},
    TransferState.COMMITTED: {TransferState.DRAINED},
    TransferState.ABORTING: {TransferState.DRAINED},
    TransferState.DRAINED: {TransferState.FREE},
    TransferState.FREE: set(),
}


class Lifecycle:
    """Where a transfer stands. The only way on is `move`."""

    def __init__(self) -> None:
        self._state = TransferState.RESERVED

    @property
    def state(self) -> TransferState:
        return self._state

    @property
    def awaits_sender(self) -> bool:
        """Whether KV may still come: the lease runs."""
        return self._state in (TransferState.RESERVED, TransferState.SENDING)

    @property
    def is_over(self) -> bool:
        """Whether only the window is left to drain."""
        return self._state in (TransferState.COMMITTED, TransferState.ABORTING)

    def move(self, *states: TransferState) -> None:
        """Go through `states` one by one. Raises TransferFailed at the first that may not follow."""
        for state in states:
            if state not in _NEXT[self._state]:
                raise TransferFailed(f"a transfer cannot go from {self._state.name} to {state.name}")
            self._state = state
