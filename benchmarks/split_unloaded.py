"""One request at a time on a cluster: when its first token comes, and how soon decode goes on with it."""

from __future__ import annotations

from benchmarks.rows import Figure
from benchmarks.split_load import Answer, ask, requests_of
from benchmarks.split_report import SHAPES, SPLIT, Mode, Report
from splitserve.client import AsyncClient

SIZES = {"2k": (2048, 40), "8k": (8192, 24), "32k": (32768, 12)}  # prompt tokens, and how many such requests
ANSWER_TOKENS, WARM_UP = 16, 3
VLLM_HAND_OFF_MS = {"2k": 22.0}


async def unloaded(client: AsyncClient, mode: Mode, report: Report) -> None:
    """The client's TTFT at each of SIZES and, where there is a hand-off, how long that takes."""
    for size, (tokens, count) in SIZES.items():
        answers = [Answer() for _ in range(WARM_UP + count)]
        for request, answer in zip(requests_of(tokens, ANSWER_TOKENS, len(answers), seed=tokens), answers, strict=True):
            await ask(client, request, answer)
            if answer.error:
                raise RuntimeError(f"a prompt of {tokens} tokens failed: {answer.error}")
        load, counted = f"{SHAPES} {size}, unloaded", answers[WARM_UP:]
        report.add("kv", load, mode, "ttft", Figure.of([1e3 * answer.ttft_s for answer in counted]))
        if mode == SPLIT:
            report.add_hand_off(load, counted, VLLM_HAND_OFF_MS.get(size))
