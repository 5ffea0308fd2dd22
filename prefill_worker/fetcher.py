"""Takes the KV of prompts' beginnings that other engines have cached, into pages of prompts that wait for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from splitserve.cluster.counts import BytesUsed
from splitserve.cluster.messages import FetchPrefix
from splitserve.engine.serving import Send
from splitserve.kv_transfer.inlet import KvInlet, Landed
from splitserve.prefill_worker.prompt_request import PromptRequest

SMOOTHING = 0.2


@dataclass(frozen=True)
class _Fetch:
    """Of the tokens before `stop_token`; given up when it takes longer than `patience_s`. `followers` begin alike."""

    request: PromptRequest
    stop_token: int
    began: float
    patience_s: float
    followers: list[PromptRequest] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        return self.stop_token - self.request.table.cached_tokens


class PrefixFetcher:
    """Asks for prefixes through `send`, and takes them through `inlet`. `clock` gives seconds, monotonic."""

    def __init__(self, inlet: KvInlet, send: Send, clock: Callable[[], float]) -> None:
        self._inlet, self._send, self._clock = inlet, send, clock
        self._under_way: dict[str, _Fetch] = {}
        self.token_s = 0.0  # of one token, lately

    @property
    def staging(self) -> BytesUsed:
        return self._inlet.staging

    def follow(self, request: PromptRequest, stop_token: int) -> bool:
        """Wait for what another prompt fetches, if that is the same: it is cached then."""
        beginning = request.message.token_ids[:stop_token]
        for fetch in self._under_way.values():
            if (fetch.stop_token, fetch.request.message.token_ids[:stop_token]) == (stop_token, beginning):
                fetch.followers.append(request)
                request.fetching = fetch.request.fetching
                return True
        return False

    def begin(self, request: PromptRequest, stop_token: int, patience_s: float) -> None:
        """Fetch what the table of `request` lacks before `stop_token`, if there is staging for it now."""
        message, transfer_id = request.message, _transfer_id(request)
        assert message.cached is not None
        ticket = self._inlet.open(transfer_id, message.cached.source, request.table, stop_token)
        if ticket is None:
            return
        self._under_way[transfer_id] = fetch = _Fetch(request, stop_token, self._clock(), patience_s)
        request.fetching = fetch.tokens
        self._send(request.router, FetchPrefix(message.request_id, message.attempt, ticket))
        self._inlet.expect(transfer_id)

    def poll(self) -> list[PromptRequest]:
        """Prompts whose prefix has come: their tables say so. Those that wait in vain go on without."""
        landed = []
        for event in self._inlet.poll():
            fetch = self._under_way.get(event.transfer_id)
            if fetch is None:
                continue
            self._end(fetch)
            if isinstance(event, Landed):
                fetch.request.table.cached_tokens = fetch.stop_token
                landed.append(fetch.request)
        for fetch in list(self._under_way.values()):
            if self._clock() - fetch.began > fetch.patience_s:
                self._end(fetch)
        return landed

    def abort(self, request: PromptRequest) -> None:
        """Give up what is fetched for `request`, if anything is."""
        if (fetch := self._under_way.pop(_transfer_id(request), None)) is not None:
            for waiting in (request, *fetch.followers):
                waiting.fetching = 0
            self._inlet.close(_transfer_id(request))

    def _end(self, fetch: _Fetch) -> None:
        seen = (self._clock() - fetch.began) / fetch.tokens
        self.token_s += SMOOTHING * (seen - self.token_s) if self.token_s else seen
        self.abort(fetch.request)


def _transfer_id(request: PromptRequest) -> str:
    return f"{request.transfer_id}/prefix"
