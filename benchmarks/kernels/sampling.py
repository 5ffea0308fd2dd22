"""The sampler on one GPU: what kinds of requests cost, by rows.

Times come from CUDA graphs of several calls, each with logits of its own; from 16 rows on all of them together are
larger than L2. Fewer are read from L2, where a step's logits are when they have just been computed. The peer is a copy
of the same logits in the same run. Logits are normal with deviation 3, so `nucleus` keeps tens of thousands of tokens.

    python -m benchmarks.kernels.sampling
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.kernels.timing import graph_us
from benchmarks.rows import Figure, Row, write
from splitserve.kernels.sampling import SamplerState, new_sampled_rows, new_sampler_state, sample_rows
from splitserve.kernels.sampling_scratch import new_sampler_scratch

DEVICE = torch.device("cuda")
VOCABS = (102_400, 129_280)
ROWS = (1, 16, 64, 256)
LOGITS_BYTES = 160_000_000
CASES: dict[str, dict[str, float]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "all filters": {"temperature": 1.0, "top_k": 50, "top_p": 0.9, "min_p": 0.05},
    "nucleus": {"temperature": 1.0, "top_p": 0.95},
    "penalties, 5 logprobs": {
        "repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.2, "logprobs": 5,
    },
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Batch:
    """Several sets of logits [rows, vocab], bfloat16."""

    logits: list[torch.Tensor]
    vocab: int

    @property
    def rows(self) -> int:
        return self.logits[0].shape[0]

    def copy(self) -> Callable[[], None]:
        copies = [torch.empty_like(values) for values in self.logits]

        def call() -> None:
            for target, values in zip(copies, self.logits, strict=True):
                target.copy_(values)

        return call

    def sample(self, params: dict[str, float]) -> Callable[[], None]:
        rows = self.rows
        state, out = state_of(params, rows, self.vocab), new_sampled_rows(rows, DEVICE)
        scratch = new_sampler_scratch(rows, self.vocab, DEVICE)
        slots, positions = (torch.arange(rows, dtype=dtype, device=DEVICE) for dtype in (torch.int32, torch.int64))
        live = torch.tensor([rows], dtype=torch.int32, device=DEVICE)

        def call() -> None:
            for values in self.logits:
                sample_rows(values, slots, positions, live, state, out, scratch)

        return call


def new_batch(rows: int, vocab: int) -> Batch:
    count = max(3, min(40, LOGITS_BYTES // (2 * rows * vocab)))
    generator = torch.Generator(DEVICE).manual_seed(rows)
    values = torch.randn(count, rows, vocab, generator=generator, device=DEVICE) * 3
    return Batch(list(values.bfloat16()), vocab)


def state_of(params: dict[str, float], slots: int, vocab: int) -> SamplerState:
    """All slots ask for `params`, with seeds of their own; a tenth of the vocabulary was in their prompts."""
    state = new_sampler_state(slots, vocab, DEVICE)
    for name, value in params.items():
        getattr(state, name).fill_(value)
    state.seed.copy_(torch.arange(slots))
    state.counts[:, ::10] = -(2**15)
    return state


def figure(call: Callable[[], None], calls: int) -> Figure:
    return Figure.of([graph_us(call, calls) for _ in range(5)])


def main() -> None:
    for vocab in VOCABS:
        for rows in ROWS:
            batch = new_batch(rows, vocab)
            copy = figure(batch.copy(), len(batch.logits)).value
            for name, params in CASES.items():
                found = figure(batch.sample(params), len(batch.logits))
                case = f"{name}, rows={rows}, vocab={vocab}"
                write([Row("sampling", case, "time", "us", found, "copy of the logits", copy, "lower")])


if __name__ == "__main__":
    main()
