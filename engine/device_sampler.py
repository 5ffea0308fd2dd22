"""First tokens: chosen at once from logits in hand, or enqueued on the device and read when they are there."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Protocol

import torch

from splitserve.cluster.messages import TokenLogprobs
from splitserve.engine.sampler import SampledToken, sample
from splitserve.engine.sequence import Sequence
from splitserve.engine.slot_state import SlotLayout, SlotState, SlotUpdateBuilder
from splitserve.kernels.sampling import SampledRows, new_sampled_rows, sample_rows
from splitserve.kernels.sampling_scratch import new_sampler_scratch

ROWS = 64


class PendingTokens(Protocol):
    """Tokens that are being chosen; None where the model failed."""

    @property
    def ready(self) -> bool:
        """Whether `wait` would return at once."""

    def wait(self) -> list[SampledToken | None]: ...


class TokenChooser(Protocol):
    def choose(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> PendingTokens:
        """Choose the next token of each of `sequences` by its row of `logits` [sequences, vocab]."""


@dataclass(frozen=True)
class _Chosen:
    tokens: list[SampledToken | None]
    ready: bool = True

    def wait(self) -> list[SampledToken | None]:
        return self.tokens


class HostSampler:
    """Chooses with torch, and waits for it."""

    def choose(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> PendingTokens:
        return _Chosen(sample(logits, [sequence.sampler_row() for sequence in sequences]) if sequences else [])


class DeviceSampler:
    """Enqueues the sampler's kernels behind whatever computes the logits."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._layout = SlotLayout(ROWS, 1, vocab_size)
        self._state = SlotState(self._layout, device)
        self._slots = torch.arange(ROWS, dtype=torch.int32, device=device)
        self._scratch = new_sampler_scratch(ROWS, vocab_size, device)
        if device.type == "cuda":
            self._warm_up(vocab_size)

    @torch.inference_mode()
    def choose(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> PendingTokens:
        parts = [
            self._choose(logits[start : start + ROWS], sequences[start : start + ROWS])
            for start in range(0, len(sequences), ROWS)
        ]
        return _Copied(parts, [sequence.params.logprobs for sequence in sequences], self._slots.is_cuda)

    def _choose(self, logits: torch.Tensor, sequences: Seq[Sequence]) -> SampledRows:
        updates = SlotUpdateBuilder(self._layout)
        for slot, sequence in enumerate(sequences):
            updates.sample_as(slot, sequence)
            if sequence.grammar is not None:
                updates.allow(slot, len(sequence.token_ids), sequence.grammar.mask)
        self._state.apply(updates.take())
        return self._sample(logits, len(sequences))

    def _sample(self, logits: torch.Tensor, live: int) -> SampledRows:
        rows, device = len(logits), logits.device
        out = new_sampled_rows(rows, device)
        live_rows = torch.full((1,), live, dtype=torch.int32, device=device)
        positions = self._state.table.lengths[:rows].long()
        sample_rows(logits, self._slots[:rows], positions, live_rows, self._state.sampler, out, self._scratch)
        return out

    @torch.inference_mode()
    def _warm_up(self, vocab_size: int) -> None:
        """Compile what the first request would wait for."""
        updates = SlotUpdateBuilder(self._layout)
        updates.set(0, {"length": 0})
        self._state.apply(updates.take())
        self._sample(torch.zeros(1, vocab_size, device=self._slots.device), live=0)


class _Copied:
    """Tokens on their way to the host."""

    def __init__(self, parts: list[SampledRows], logprobs: list[int | None], on_gpu: bool) -> None:
        self._logprobs = logprobs
        self._parts = [[_to_host(column) for column in vars(part).values()] for part in parts]
        self._done = torch.cuda.Event() if on_gpu else None  # type: ignore[no-untyped-call]
        if self._done is not None:
            self._done.record()

    @property
    def ready(self) -> bool:
        return self._done is None or bool(self._done.query())  # type: ignore[no-untyped-call]

    def wait(self) -> list[SampledToken | None]:
        if self._done is not None:
            self._done.synchronize()
        columns = (torch.cat(column).tolist() for column in zip(*self._parts, strict=True))
        return [_sampled(*row) for row in zip(*columns, self._logprobs, strict=True)]


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def _sampled(
    token: int, finite: int, logprob: float, top_ids: list[int], top_logprobs: list[float], wanted: int | None
) -> SampledToken | None:
    if not finite:
        return None
    if wanted is None:
        return SampledToken(token, None)
    top = tuple(zip(top_ids[:wanted], top_logprobs[:wanted], strict=True))
    return SampledToken(token, TokenLogprobs(logprob, top))
