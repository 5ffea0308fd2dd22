"""A request for a prompt, from its arrival until its KV is delivered."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from splitserve.cluster.messages import FirstToken, Prefill, SampleToken, Ticket, TokenLogprobs, transfer_id_of
from splitserve.engine.block_manager import BlockTable
from splitserve.engine.grammar import GrammarState
from splitserve.engine.sampler import prompt_logprobs
from splitserve.engine.sequence import Sequence


@dataclass(eq=False)
class PromptRequest:
    """`uncached`: prompt tokens that no cache had when it came. Times are the engine's clock's.

    `ticket` says where its KV goes, once decode has granted that. The KV of so many tokens more is on its way here as
    `fetching` says.
    """

    router: bytes
    message: Prefill
    sequence: Sequence
    arrived: float
    uncached: int
    ticket: Ticket | None = None
    fetching: int = 0
    started: float = 0.0
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()

    @property
    def transfer_id(self) -> str:
        return transfer_id_of(self.message.request_id, self.message.attempt)

    @property
    def can_begin(self) -> bool:
        """Whether the mask of its first token is there, if it needs one, and what is fetched."""
        return not self.fetching and self.missing_mask is None

    @property
    def missing_mask(self) -> GrammarState | None:
        """What makes the mask of its first token, where that is not there yet."""
        grammar = self.sequence.grammar
        return None if grammar is None or grammar.ready else grammar

    @property
    def table(self) -> BlockTable:
        """Its pages, once it has any."""
        assert self.sequence.table is not None
        return self.sequence.table

    def samples(self) -> list[Sequence]:
        """Its sequence once for each sample, all prompt computed."""
        first, count = self.sequence, self.message.params.n
        return [replace(first, sample=first.sample + n, token_ids=list(first.token_ids)) for n in range(count)]

    def wanted_logits(self, size: int) -> int:
        """How many of the next `size` tokens need logits: all for prompt log probabilities, else the prompt's last."""
        if self.message.params.prompt_logprobs is not None:
            return size
        return int(size == self.sequence.pending_tokens)

    def note_logprobs(self, size: int, logits: torch.Tensor) -> None:
        """Keep the prompt's log probabilities, if they are asked for, of the next `size` tokens with their `logits`."""
        sequence, top = self.sequence, self.message.params.prompt_logprobs
        if top is not None:
            targets = sequence.token_ids[sequence.computed_tokens + 1 : sequence.computed_tokens + size + 1]
            self.prompt_logprobs += tuple(prompt_logprobs(logits[: len(targets)], targets, top))

    def first_token(self, tokens: tuple[SampleToken, ...], now: float) -> FirstToken:
        """The answer to the router: the first token of each sample."""
        table = self.sequence.table
        return FirstToken(
            request_id=self.message.request_id,
            attempt=self.message.attempt,
            tokens=tokens,
            prompt_logprobs=None if self.message.params.prompt_logprobs is None else self.prompt_logprobs,
            cached_tokens=table.cached_tokens if table else 0,
            queue_s=self.started - self.arrived,
            prefill_s=now - self.started,
        )
