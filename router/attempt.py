"""One attempt of a request: what a pair of engines is asked for, some of its samples or all.

asked --Granted--> granted --FirstToken, Joined--> decoding --last tokens--> over
  |                   |                               |
 Busy                 +---- engine lost, KV lost -----+--> lost: others go on from what its samples have
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import (
    Busy,
    Cached,
    Cancel,
    Failed,
    FirstToken,
    Granted,
    Prefill,
    Reserve,
    SendPrefix,
    SendTo,
    Ticket,
)
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.output_buffer import SampleOutput
from splitserve.router.policy import Placement


class Attempt:
    """Number `number` of a request, for `samples` with consecutive indices that stand at the same token.

    `reply` ends the wait for decode's leave. `joined`: decode has all that it needs of prefill. `to_compute`: how many
    tokens prefill is expected to compute, once it has fetched what engine `holder` has `cached`. `early` is what
    prefill has answered before decode has.
    """

    def __init__(
        self,
        request_id: str,
        number: int,
        placement: Placement,
        samples: Sequence[SampleOutput],
        prompt: list[int],
        params: SamplingParams,
        extra_keys: tuple[str, ...],
        to_compute: int,
        holder: str = "",
        cached: Cached | None = None,
    ) -> None:
        self.number, self.placement, self.samples, self.to_compute = number, placement, samples, to_compute
        self.holder, self._cached = holder, cached
        self.reply: asyncio.Future[Granted | Busy | Failed] = asyncio.get_running_loop().create_future()
        self.joined = False
        self.early: FirstToken | None = None
        self._request_id = request_id
        self._asked: dict[str, Any] = {
            "request_id": request_id,
            "attempt": number,
            "token_ids": prompt + samples[0].token_ids,
            "params": params if params.n == len(samples) else replace(params, n=len(samples)),
            "extra_keys": extra_keys,
            "first_sample": samples[0].index,
            "output_tokens": len(samples[0].token_ids),
        }

    @property
    def unfinished(self) -> list[SampleOutput]:
        return [sample for sample in self.samples if sample.finish_reason is None]

    def needs(self, engine: str) -> bool:
        prefill, decode = self.placement
        return bool(self.unfinished) and (engine == decode or (engine == prefill and not self.joined))

    @property
    def is_held(self) -> bool:
        """Whether an engine may still hold something of it: not when decode itself has ended every sample."""
        ended = all(sample.finish_reason and not sample.stopped_by_string for sample in self.samples)
        return not (self.joined and ended)

    def reserve(self, source: KvLayout, deadline_s: float) -> Reserve:
        return Reserve(source=source, deadline_s=deadline_s, **self._asked)

    def prefill(self, deadline_s: float) -> Prefill:
        return Prefill(deadline_s=deadline_s, cached=self._cached, **self._asked)

    def send_prefix(self, ticket: Ticket) -> SendPrefix:
        """For the engine that has it cached."""
        token_ids: list[int] = self._asked["token_ids"]
        return SendPrefix(token_ids[: ticket.num_tokens + 1], self._asked["extra_keys"], ticket)

    def send_to(self, ticket: Ticket) -> SendTo:
        return SendTo(self._request_id, self.number, ticket)

    def cancel(self, sample: int | None = None) -> Cancel:
        return Cancel(self._request_id, self.number, sample)


def by_attempt(samples: Sequence[SampleOutput]) -> list[list[SampleOutput]]:
    """How to have `samples` answered from where they stand: all at once if none has a token, else one by one."""
    for sample in samples:
        sample.forget_early()
    unfinished = [sample for sample in samples if sample.finish_reason is None]
    if any(sample.token_ids for sample in samples):
        return [[sample] for sample in unfinished]
    return [unfinished] if unfinished else []
