"""Which engines an attempt goes to: what the policy has to know, looked up, and what follows from its choice."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence

from splitserve.cluster.channel import KV_IDLE_S
from splitserve.cluster.errors import Overloaded
from splitserve.cluster.messages import Cached
from splitserve.cluster.topology_sections import Router as RouterSettings
from splitserve.router.attempt import Attempt
from splitserve.router.engines import Engines
from splitserve.router.output_buffer import SampleOutput
from splitserve.router.policy import EngineView, Placement, Wanted, lateness, place, predicted_ttfts
from splitserve.router.request import Request


class Placer:
    """Places requests on `engines`."""

    def __init__(self, engines: Engines, settings: RouterSettings) -> None:
        self._engines, self._policy, self._slo = engines, settings.policy, settings.slo
        self._placements = itertools.count()
        self._links: dict[Placement, float] = {}  # when KV was last asked to go from prefill to decode

    def wanted(self, request: Request, sample: SampleOutput) -> Wanted:
        """What the policy has to know of `sample`, which goes on from where it stands."""
        token_ids = request.tokens_of(sample)
        cached = self._engines.cached_tokens(token_ids, request.extra_keys) if self._policy == "kv_aware" else {}
        return Wanted(len(token_ids), cached, request.broken, self._slo.tpot_s or math.inf)

    def place(
        self,
        request: Request,
        samples: Sequence[SampleOutput],
        prefills: Sequence[EngineView],
        decodes: Sequence[EngineView],
        wanted: Wanted,
    ) -> Attempt:
        """Choose engines for `samples`. Raises Overloaded where their first token would be too late."""
        placement = place(prefills, decodes, self._policy, next(self._placements), wanted, self._linked())
        ttft_s, fetch = predicted_ttfts(prefills, wanted)[placement.prefill]
        self._refuse_late(request, next(one for one in prefills if one.engine == placement.prefill), ttft_s)
        cached = Cached(self._engines.layout(fetch.holder), fetch.tokens) if fetch.holder else None
        to_compute = wanted.uncached(fetch.holder or placement.prefill)
        return request.attempt(samples, placement, to_compute, fetch.holder, cached)

    def note(self, pair: Placement) -> None:
        """KV will go from `pair`'s prefill engine to its decode engine."""
        self._links[pair] = time.monotonic()

    def _refuse_late(self, request: Request, prefill: EngineView, ttft_s: float) -> None:
        """What would have its first token too late is better told at once. What goes on from earlier is not refused."""
        if request.placement.decode or request.goes_on:
            return
        limit_s = min(request.deadline.remaining_s, (self._slo.ttft_s or math.inf) - request.waited_s)
        if late_s := lateness(prefill, ttft_s, limit_s):
            raise Overloaded(f"the first token is predicted {late_s:.1f} s too late", late_s)

    def _linked(self) -> dict[Placement, float]:
        """Pairs of engines with a way for KV that is still open."""
        closed_before = time.monotonic() - KV_IDLE_S
        self._links = {pair: used_at for pair, used_at in self._links.items() if used_at > closed_before}
        return self._links
