"""Batches of prompt chunks on their way through a prefill engine's device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from splitserve.engine.batch import Batch, Chunk
from splitserve.engine.block_manager import BlockManager
from splitserve.engine.device_sampler import PendingTokens, TokenChooser
from splitserve.engine.pace import BatchTimes
from splitserve.engine.ranks import Ranks
from splitserve.engine.sampler import SampledToken
from splitserve.engine.sequence import Sequence
from splitserve.engine.to_device import to_device
from splitserve.kv_transfer.outlet import KvOutlet
from splitserve.prefill_worker.prompt_request import PromptRequest

MOST = 2  # so that the device always has the next one waiting


@dataclass(frozen=True)
class _Launched:
    """A batch under way: the prompts that end with it, each with its samples, and the tokens of all of these."""

    prompts: list[tuple[PromptRequest, list[Sequence]]]
    tokens: PendingTokens
    prompt_tokens: int
    began: float


class Batches:
    """Those under way, at most MOST, in the order in which they were launched. `clock` gives seconds, monotonic."""

    def __init__(
        self, ranks: Ranks, blocks: BlockManager, outlet: KvOutlet, chooser: TokenChooser, clock: Callable[[], float]
    ) -> None:
        self._ranks, self._blocks, self._outlet, self._chooser, self._clock = ranks, blocks, outlet, chooser, clock
        self._under_way: deque[_Launched] = deque()
        self._times = BatchTimes(clock)

    def __bool__(self) -> bool:
        return bool(self._under_way)

    @property
    def has_room(self) -> bool:
        """Whether another one may be launched."""
        return len(self._under_way) < MOST

    @property
    def tokens(self) -> int:
        """Of prompts, in all of them."""
        return sum(batch.prompt_tokens for batch in self._under_way)

    @property
    def line(self) -> tuple[float, float]:
        """Seconds that any batch takes, and each token more (`BatchTimes`)."""
        return self._times.line

    @property
    def rested_s(self) -> float:
        """Seconds since the last one ended; none while one is under way."""
        return 0.0 if self._under_way else self._times.rested_s

    def launch(self, chunks: list[tuple[PromptRequest, int]]) -> None:
        """Compute so many tokens of each of these prompts, and choose the first tokens of those that end with them."""
        began = self._clock()
        batch = Batch.of([Chunk(request.sequence, size, request.wanted_logits(size)) for request, size in chunks])
        written = [(request.transfer_id, request.sequence.computed_tokens + size) for request, size in chunks]
        logits: torch.Tensor = self._ranks.execute(self._outlet.run_command(batch, written))
        prompts, rows, row = [], [], 0
        for request, size in chunks:
            sequence, wanted = request.sequence, request.wanted_logits(size)
            request.note_logprobs(size, logits[row : row + wanted])
            row += wanted
            sequence.computed_tokens += size
            self._blocks.publish(request.table, sequence.token_ids, sequence.computed_tokens)
            if not sequence.pending_tokens:
                prompts.append((request, request.samples()))
                rows += [row - 1] * request.message.params.n
        samples = [sample for _, samples in prompts for sample in samples]
        tokens = self._chooser.choose(logits[to_device(rows, logits.device)], samples)
        self._under_way.append(_Launched(prompts, tokens, sum(size for _, size in chunks), began))

    def take_done(self) -> list[tuple[PromptRequest, list[tuple[Sequence, SampledToken | None]]]]:
        """Prompts that have ended since the last time, with each sample's sequence and first token.

        None stands for a token where the model failed.
        """
        done = []
        while self._under_way and self._under_way[0].tokens.ready:
            batch = self._under_way.popleft()
            chosen = iter(batch.tokens.wait())
            self._times.ended(batch.prompt_tokens, batch.began)
            done += [(request, [(sample, next(chosen)) for sample in samples]) for request, samples in batch.prompts]
        return done
