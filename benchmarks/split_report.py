"""What the split benchmark reports: names, units, vLLM's figures, rows and a table."""

from __future__ import annotations

from typing import Literal

from rich.console import Console
from rich.table import Table

from benchmarks.rows import Figure, Row, hardware, write
from benchmarks.split_load import SLO_TPOT_S, SLO_TTFT_S, Answer

Mode = Literal["2 colocated", "1P1D"]
COLOCATED: Mode = "2 colocated"
SPLIT: Mode = "1P1D"
MODES = (COLOCATED, SPLIT)  # in the order in which they run

SHAPES = "v2lite-bf16"
GOODPUT = f"goodput (ttft <= {1e3 * SLO_TTFT_S:g} ms, tpot <= {1e3 * SLO_TPOT_S:g} ms)"
LOAD_METRICS = ("ttft p50", "ttft p99", "tpot p50", "tpot p99", "itl p99", "throughput", "goodput")
UNITS = {"throughput": "tokens/s", "goodput": "req/s", "KV sent": "GB/s"}  # all others are times, in ms
HAND_OFF_MS = 3.0

# vLLM 0.26.0 on another pair of H100 80GB: two colocated replicas and 1P1D (NIXL), figures of LOAD_METRICS without
# goodput. It answered less than rate x 128 tokens/s at loads that it kept up with: the ramps of its runs may be in it.
_VLLM = {
    (1.5, COLOCATED): (37, 38, 3.8, 5.0, 5.3, 142),
    (1.5, SPLIT): (59, 66, 4.1, 6.1, 6.7, 142),
    (12, COLOCATED): (46, 71, 10.0, 12.5, 32.0, 1331),
    (12, SPLIT): (102, 148, 11.6, 12.6, 13.9, 1300),
    (18, COLOCATED): (54, 93, 14.6, 15.5, 36.0, 2283),
    (18, SPLIT): (125, 194, 13.4, 13.7, 15.4, 2227),
    (24, COLOCATED): (56, 109, 15.6, 17.9, 37.1, 2623),
    (24, SPLIT): (128, 246, 13.7, 14.4, 17.2, 2578),
}
VLLM_GPU = "H100"
VLLM_RATES = tuple(sorted({rate for rate, _ in _VLLM}))


def vllm(rate: float, mode: Mode, metric: str) -> float | None:
    """vLLM's figure, None where there is none."""
    return dict(zip(LOAD_METRICS, _VLLM.get((rate, mode), ()), strict=False)).get(metric)


def load_name(prompt_tokens: int, answer_tokens: int, rate: float) -> str:
    return f"{SHAPES} {prompt_tokens}+{answer_tokens}, {rate:g} req/s"


class Report:
    """Writes rows as they come, and shows what loads came to in the end."""

    def __init__(self) -> None:
        self._colocated: dict[tuple[str, str], float] = {}
        self._table = Table(caption="times in ms", caption_justify="left")
        for column in ("req/s", "mode", "TTFT p50/p99", "TPOT p50/p99", "ITL p99", "tokens/s", "goodput"):
            self._table.add_column(column, justify="right", no_wrap=True)

    def add(
        self, bench: str, load: str, mode: Mode, metric: str, figure: Figure, peer: tuple[str, float] | None = None
    ) -> None:
        """A row. Without a `peer` of its own, that of 1P1D is what two colocated replicas reached before.

        vLLM's figures are no peer's on other GPUs than its own.
        """
        if peer is not None and peer[0] == "vllm" and VLLM_GPU not in hardware():
            peer = None
        if mode == COLOCATED:
            self._colocated[load, metric] = figure.value
        elif peer is None and self._colocated.get((load, metric)):  # of 0 there is no ratio
            peer = COLOCATED, self._colocated[load, metric]
        name, unit = GOODPUT if metric == "goodput" else metric, UNITS.get(metric, "ms")
        better: Literal["lower", "higher"] = "lower" if unit == "ms" else "higher"
        peer_name, peer_value = peer or ("none", None)
        write([Row(bench, f"{load}, {mode}", name, unit, figure, peer_name, peer_value, better)])

    def add_hand_off(self, load: str, answers: list[Answer], vllm_ms: float | None) -> None:
        """Medians, p10 and p90 of `answers`: until decode has the KV, and until it has made a token of it."""
        joined = Figure.of([1e3 * answer.joined_s for answer in answers])
        second = Figure.of([1e3 * answer.gaps_s[0] for answer in answers])
        self.add("kv", load, SPLIT, "prefill done to KV joined", joined, ("bar", HAND_OFF_MS))
        peer = None if vllm_ms is None else ("vllm", vllm_ms)
        self.add("kv", load, SPLIT, "prefill done to decode's first token", second, peer)

    def add_load(self, load: str, rate: float, mode: Mode, figures: dict[str, Figure]) -> None:
        for metric, figure in figures.items():
            peer = vllm(rate, mode, metric)
            self.add("split", load, mode, metric, figure, None if peer is None else ("vllm", peer))
        ttft50, ttft99, tpot50, tpot99, itl, throughput, goodput = (figures[name].value for name in LOAD_METRICS)
        times = f"{ttft50:.0f}/{ttft99:.0f}", f"{tpot50:.1f}/{tpot99:.1f}", f"{itl:.1f}"
        self._table.add_row(f"{rate:g}", mode, *times, f"{throughput:,.0f}", f"{goodput:.1f}")

    def show(self) -> None:
        if self._table.row_count:
            Console(width=100).print(self._table)
