"""All prompts of a prefill engine, by where they stand: waiting, running, or computed and being sent."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from splitserve.prefill_worker.prompt_request import PromptRequest


class Prompts:
    """`waiting` and `running` are in the order in which they came; `sending` are by transfer."""

    def __init__(self) -> None:
        self.waiting: deque[PromptRequest] = deque()
        self.running: list[PromptRequest] = []
        self.sending: dict[str, PromptRequest] = {}

    def __iter__(self) -> Iterator[PromptRequest]:
        """All that there are now, whatever becomes of them meanwhile."""
        return iter([*self.waiting, *self.running, *self.sending.values()])

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running or self.sending)

    def find(self, transfer_id: str) -> PromptRequest | None:
        return next((request for request in self if request.transfer_id == transfer_id), None)

    def start(self, request: PromptRequest) -> None:
        self.waiting.remove(request)
        self.running.append(request)

    def computed(self, request: PromptRequest) -> None:
        self.running.remove(request)
        self.sending[request.transfer_id] = request

    def remove(self, request: PromptRequest) -> None:
        if request in self.waiting:
            self.waiting.remove(request)
        if request in self.running:
            self.running.remove(request)
        self.sending.pop(request.transfer_id, None)

    @property
    def running_tokens(self) -> int:
        """Of the prompts that run, those that are not computed yet."""
        return sum(request.sequence.pending_tokens for request in self.running)

    @property
    def tokens(self) -> int:
        """All that are to be computed, less what was cached of waiting prompts when they came and what is fetched."""
        return self.running_tokens + sum(request.uncached - request.fetching for request in self.waiting)
