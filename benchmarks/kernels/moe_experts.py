"""Routed experts on one GPU: both grouped GEMMs against a copy, and the whole layer against vLLM's fused kernel.

    python -m benchmarks.kernels.moe_experts

DeepSeek-V2-Lite's shape. Times come from CUDA graphs of several calls, each with a routing of its own, so that no call
finds its weights in L2: calls of one row take disjoint experts, calls of more rows stream far more than L2 holds.
Bandwidth counts the bytes of the experts touched. The peer's times are vLLM 0.26.0's tuned kernel on another H100.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.kernels.timing import copy_gb, graph_us
from benchmarks.rows import Figure, Row, write
from splitserve.kernels.launch import num_sms
from splitserve.kernels.moe_experts import Experts, routed_experts, routed_experts_reference
from splitserve.kernels.moe_gemms import Choices, grouped_down, grouped_gate_up
from splitserve.kernels.moe_schedule import block_schedule
from splitserve.kernels.moe_tiles import expert_tiles

DEVICE = torch.device("cuda")
HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1408, 64, 6
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 2
VLLM_US = {1: 46.0, 8: 217.0, 32: 386.0, 64: 400.0, 128: 415.0, 256: 416.0, 8192: 2000.0}
ROWS = (1, 8, 16, 32, 64, 128, 256, 2048, 8192)
SAMPLES, LARGEST_ERROR = 5, 0.02
GEMM_ROWS = 256  # up to which the GEMMs are bound by reading weights


@dataclass(frozen=True)
class Routing:
    """One call's rows and choices."""

    x: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor
    live_rows: torch.Tensor

    @property
    def touched(self) -> int:
        return int(self.chosen.flatten().bincount().count_nonzero())


class Layer:
    """A layer's random weights, and what is timed of it."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self._gate_up = torch.empty(EXPERTS, 2 * WIDTH, HIDDEN, device=DEVICE, dtype=torch.bfloat16)
        self._down = torch.empty(EXPERTS, HIDDEN, WIDTH, device=DEVICE, dtype=torch.bfloat16)
        self._gate_up.normal_(0, HIDDEN**-0.5)
        self._down.normal_(0, WIDTH**-0.5)
        self._experts = Experts(self._gate_up, self._down)

    def routed(self, routing: Routing) -> torch.Tensor:
        return routed_experts(routing.x, routing.weights, routing.chosen, self._experts, routing.live_rows)

    def error(self, routing: Routing) -> float:
        """The largest error in units of the largest expected value."""
        rows = len(routing.x)
        expected = routed_experts_reference(routing.x, routing.weights, routing.chosen, self._experts, rows).float()
        return float((self.routed(routing).float() - expected).abs().max() / expected.abs().max())

    def gemms(self, routing: Routing) -> Callable[[], object]:
        """Both GEMMs for a schedule that is there already."""
        tiles, sms = expert_tiles(len(routing.x), TOP_K, EXPERTS), num_sms(DEVICE)
        schedule = block_schedule(routing.chosen, routing.live_rows, EXPERTS, tiles.block_m)
        choices = Choices(routing.chosen, routing.live_rows, shared=0)

        def call() -> None:
            act = grouped_gate_up(routing.x, self._gate_up, schedule, choices, tiles, sms)
            grouped_down(act, self._down, schedule, choices, tiles, sms)

        return call


def main() -> None:
    copied, layer = copy_gb(), Layer()
    print(f"{torch.cuda.get_device_name()}, copy {copied:.0f} GB/s (read + write)")
    for rows in ROWS:
        found = routings(rows)
        error = layer.error(found[0])
        assert error < LARGEST_ERROR, f"{rows} rows: error {error}"
        times = measure([lambda routing=routing: layer.routed(routing) for routing in found])  # type: ignore[misc]
        peer = VLLM_US.get(rows)
        case = f"routed experts v2lite rows={rows}"
        write([Row("kernels", case, "time", "us", Figure.of(times), "vllm" if peer else "none", peer, "lower")])
        if rows <= GEMM_ROWS:
            touched = sum(routing.touched for routing in found) / len(found)
            rates = [touched * EXPERT_BYTES / us / 1e3 for us in measure([layer.gemms(routing) for routing in found])]
            case = f"grouped expert GEMMs v2lite rows={rows}"
            write([Row("kernels", case, "bandwidth", "GB/s", Figure.of(rates), "copy", copied, "higher")])


def measure(calls: list[Callable[[], object]]) -> list[float]:
    """Microseconds a call, SAMPLES times."""

    def all_calls() -> None:
        for call in calls:
            call()

    return [graph_us(all_calls, len(calls)) for _ in range(SAMPLES)]


def routings(rows: int) -> list[Routing]:
    """Several calls; those of one row go round all experts."""
    live_rows = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
    order, found = torch.randperm(EXPERTS, device=DEVICE).repeat(2), []
    for call in range(10 if rows <= 8 else 4 if rows <= 256 else 1):
        scores = torch.rand(rows, EXPERTS, device=DEVICE)
        if rows == 1:
            scores[0, order[call * TOP_K : (call + 1) * TOP_K]] += 1
        weights, chosen = scores.topk(TOP_K, dim=-1)
        found.append(Routing(torch.randn(rows, HIDDEN, device=DEVICE).bfloat16(), weights / TOP_K, chosen, live_rows))
    return found


if __name__ == "__main__":
    main()
