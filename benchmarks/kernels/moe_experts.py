"""Routed experts on one GPU: tile variants of both grouped GEMMs, then the whole layer, checked and timed.

All times come from CUDA graphs of several calls, each with a routing of its own, so that no call finds its weights in
L2: calls of few rows take disjoint experts, calls of more rows stream far more than L2 holds. Bandwidth counts the
bytes of the experts touched, and its peer is a copy (read + write) measured in the same run.

    python -m benchmarks.kernels.moe_experts
    python -m benchmarks.kernels.moe_experts --shape v3 --rows 32 128
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import triton

from benchmarks.kernels.timing import graph_us
from benchmarks.rows import Figure, Row, write
from splitserve.kernels import moe_experts
from splitserve.kernels.launch import num_sms
from splitserve.kernels.moe_experts import routed_experts, routed_experts_reference
from splitserve.kernels.moe_schedule import BlockSchedule, block_schedule
from splitserve.kernels.moe_tiles import ExpertTiles, GemmTile, expert_tiles
from splitserve.kernels.silu_and_mul import silu_and_mul

DEVICE = torch.device("cuda")
Stage = Literal["gate_up", "down"]


@dataclass(frozen=True)
class Shape:
    """A layer; `peer_us` is what vLLM 0.26's tuned kernel takes by rows, on an H100 with a copy of 3,004 GB/s."""

    hidden: int
    width: int
    experts: int
    top_k: int
    peer_us: dict[int, float]

    def bytes(self, stage: Stage) -> int:
        """Of one expert's bfloat16 weights."""
        return (4 if stage == "gate_up" else 2) * self.width * self.hidden


V2_LITE_PEER = {1: 46.0, 8: 217.0, 32: 386.0, 64: 400.0, 128: 415.0, 256: 416.0, 8192: 2000.0}
SHAPES = {"v2-lite": Shape(2048, 1408, 64, 6, V2_LITE_PEER), "v3": Shape(7168, 2048, 256, 8, {})}
ROWS = (64, 1, 256, 8192, 8, 32, 128, 2048)  # the first four try every variant, the others the best of those
FINALISTS = 3


def _tiles(*variants: str) -> list[GemmTile]:
    """ "n32 k128 w4 s4 p2" and so on; `swap` may follow."""
    tiles = []
    for words in (variant.split() for variant in variants):
        n, k, warps, stages, programs = (int(word[1:]) for word in words[:5])
        tiles.append(GemmTile(n, k, warps, stages, programs, "swap" in words))
    return tiles


DECODE: dict[Stage, list[GemmTile]] = {
    "gate_up": _tiles(
        "n32 k128 w4 s4 p2", "n32 k128 w4 s4 p3", "n32 k128 w4 s5 p2", "n32 k64 w4 s6 p3", "n32 k256 w4 s3 p2",
        "n16 k128 w4 s5 p4", "n16 k256 w2 s4 p4", "n64 k128 w4 s3 p2", "n64 k64 w4 s5 p2", "n64 k128 w8 s5 p1",
        "n64 k128 w4 s3 p2 swap", "n64 k128 w4 s5 p1 swap",
        "n64 k64 w4 s5 p2 swap", "n64 k64 w4 s3 p3 swap", "n128 k64 w8 s5 p1 swap",
        "n128 k64 w4 s3 p2 swap",
    ),
    "down": _tiles(
        "n32 k128 w4 s5 p3", "n32 k128 w4 s4 p4", "n32 k128 w4 s6 p2", "n32 k64 w4 s8 p3", "n16 k128 w4 s5 p4",
        "n16 k256 w2 s4 p4", "n64 k128 w4 s4 p2", "n64 k128 w4 s3 p3", "n64 k64 w4 s5 p3",
        "n64 k128 w4 s4 p2 swap", "n64 k128 w4 s3 p3 swap", "n64 k64 w4 s5 p3 swap",
        "n128 k64 w4 s5 p2 swap", "n128 k128 w4 s3 p1 swap", "n128 k64 w8 s5 p2 swap",
    ),
}  # fmt: skip
PREFILL: dict[Stage, list[GemmTile]] = {
    "gate_up": _tiles(
        "n128 k64 w8 s4 p1", "n128 k64 w8 s3 p1", "n64 k64 w4 s3 p2", "n64 k64 w8 s3 p2",
        "n64 k128 w8 s3 p1",
    ),
    "down": _tiles(
        "n256 k64 w8 s4 p1", "n256 k64 w8 s3 p1", "n128 k64 w4 s3 p2", "n128 k64 w8 s3 p2",
        "n128 k128 w8 s3 p1", "n128 k64 w8 s6 p1",
    ),
}  # fmt: skip


def name(tile: GemmTile) -> str:
    words = f"n{tile.block_n} k{tile.block_k} w{tile.warps} s{tile.stages} p{tile.programs_per_sm}"
    return words + " swap" * tile.swap


def block_sizes(shape: Shape, rows: int) -> tuple[int, ...]:
    """The `block_m` worth trying: near the slots that an expert can expect."""
    expected = rows * shape.top_k / shape.experts
    return (16,) if expected <= 6 else (16, 32) if expected <= 12 else (32, 64) if expected <= 48 else (128,)


def fitted(stage: Stage, block_m: int, tile: GemmTile) -> GemmTile | None:
    """`tile` with as many programs as an SM's shared memory holds, None for none (or for too many accumulators)."""
    weight_rows = tile.block_n * (2 if stage == "gate_up" else 1)
    buffers = tile.stages if block_m >= 64 or tile.swap else tile.stages - 1  # mma.sync keeps one stage in registers
    program_bytes = buffers * (weight_rows + block_m) * tile.block_k * 2 + 1280
    programs = min(tile.programs_per_sm, (228 << 10) // program_bytes)
    if programs == 0 or weight_rows * block_m > 128 * 32 * tile.warps:
        return None
    return replace(tile, programs_per_sm=programs)


@dataclass(frozen=True, eq=False)
class Routing:
    """One call's rows and what they should come to."""

    x: torch.Tensor
    weights: torch.Tensor
    chosen: torch.Tensor
    touched: int


class Layer:
    """A layer's random weights on the GPU, and calls of one number of rows."""

    def __init__(self, shape: Shape) -> None:
        def normal(*size: int, fan_in: int) -> torch.Tensor:
            return torch.empty(size, device=DEVICE, dtype=torch.bfloat16).normal_(0, fan_in**-0.5)

        torch.manual_seed(0)
        self.shape = shape
        self.gate_up = normal(shape.experts, 2 * shape.width, shape.hidden, fan_in=shape.hidden)
        self.down = normal(shape.experts, shape.hidden, shape.width, fan_in=shape.width)

    def routings(self, rows: int) -> list[Routing]:
        """Several calls; those of one row go round all experts."""
        shape = self.shape
        count = 10 if rows <= 8 else 4 if rows <= 256 else 1
        order = torch.randperm(shape.experts, device=DEVICE).repeat(2)
        found = []
        for call in range(count):
            scores = torch.rand(rows, shape.experts, device=DEVICE)
            if rows == 1:
                scores[0, order[call * shape.top_k : (call + 1) * shape.top_k]] += 1
            weights, chosen = scores.topk(shape.top_k, dim=-1)
            x = torch.randn(rows, shape.hidden, device=DEVICE).bfloat16()
            found.append(Routing(x, weights / shape.top_k, chosen, len(_experts(chosen))))
        return found

    def reference_act(self, routing: Routing) -> torch.Tensor:
        """[choices, width]"""
        act = routing.x.new_empty(*routing.chosen.shape, self.shape.width)
        for expert in _experts(routing.chosen):
            tokens, places = torch.where(routing.chosen == expert)
            act[tokens, places] = silu_and_mul(routing.x[tokens] @ self.gate_up[expert].T)
        return act.flatten(0, 1)


def _experts(chosen: torch.Tensor) -> list[int]:
    """Those that somebody chose."""
    experts: list[int] = torch.bincount(chosen.flatten()).nonzero().flatten().tolist()
    return experts


def live(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32, device=DEVICE)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Greatest error in units of the greatest expected value; infinite for anything that is no number."""
    worst = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
    return float(worst) if torch.isfinite(worst) else float("inf")


class Sweep:
    """Times tile variants of one stage at a time. `seconds` bounds all of it: what is left is then skipped."""

    def __init__(self, layer: Layer, seconds: float) -> None:
        self._layer, self._sms = layer, num_sms(DEVICE)
        self._deadline = time.monotonic() + seconds
        self.found: dict[tuple[Stage, int, int], list[tuple[float, GemmTile]]] = {}  # by stage, rows and block_m

    def stage(self, stage: Stage, rows: int, block_m: int, variants: list[GemmTile], routings: list[Routing]) -> None:
        shape = self._layer.shape
        schedules = [block_schedule(r.chosen, live(rows), shape.experts, block_m) for r in routings]
        call, check = self._gate_up(routings, schedules) if stage == "gate_up" else self._down(routings, schedules)
        touched = sum(routing.touched for routing in routings) / len(routings)
        results = self.found.setdefault((stage, rows, block_m), [])
        for tile in variants:
            if time.monotonic() > self._deadline:
                print(f"out of time: {stage} rows {rows} m{block_m} from {name(tile)} on is skipped", flush=True)
                break
            tiles = ExpertTiles(block_m, tile, tile, pdl=False)
            try:
                wrong = check(tiles)
                us = graph_us(lambda tiles=tiles: call(tiles), len(routings))  # type: ignore[misc]
            except Exception as problem:
                print(f"{stage:8} rows {rows:5} m{block_m:<3} {name(tile):30} {_short(problem)}", flush=True)
                continue
            gbps = touched * shape.bytes(stage) / us / 1e3
            print(
                f"{stage:8} rows {rows:5} m{block_m:<3} {name(tile):30} {us:8.1f} us {gbps:6.0f} GB/s err {wrong:.4f}"
            )
            if wrong < 0.02:
                results.append((us, tile))
        results.sort(key=lambda result: result[0])

    def _gate_up(
        self, routings: list[Routing], schedules: list[BlockSchedule]
    ) -> tuple[Callable[[ExpertTiles], object], Callable[[ExpertTiles], float]]:
        layer, expected = self._layer, self._layer.reference_act(routings[0])
        choice = _live_slots(schedules[0])

        def run(at: int, tiles: ExpertTiles) -> torch.Tensor:
            top_k = layer.shape.top_k
            return moe_experts._gate_up(routings[at].x, layer.gate_up, schedules[at], top_k, tiles, self._sms)

        def check(tiles: ExpertTiles) -> float:
            act = run(0, tiles)[: len(choice)]
            return error(act[choice >= 0], expected[choice[choice >= 0]])

        return lambda tiles: [run(at, tiles) for at in range(len(routings))], check

    def _down(
        self, routings: list[Routing], schedules: list[BlockSchedule]
    ) -> tuple[Callable[[ExpertTiles], object], Callable[[ExpertTiles], float]]:
        layer, chosen = self._layer, routings[0].chosen.flatten()
        choice, acts = _live_slots(schedules[0]), self._layer.reference_act(routings[0])
        act = acts.new_zeros(schedules[0].slots.numel(), acts.shape[1])
        act[: len(choice)][choice >= 0] = acts[choice[choice >= 0]]
        expected = acts.new_empty(len(chosen), layer.shape.hidden)
        for expert in _experts(chosen):
            expected[chosen == expert] = acts[chosen == expert] @ layer.down[expert].T

        def run(at: int, tiles: ExpertTiles) -> torch.Tensor:
            return moe_experts._down(act, layer.down, schedules[at], len(chosen), tiles, self._sms)

        def check(tiles: ExpertTiles) -> float:
            return error(run(0, tiles), expected)

        return lambda tiles: [run(at, tiles) for at in range(len(routings))], check

    def best(self, rows: int, pdl: bool) -> ExpertTiles | None:
        """The block size whose two best GEMMs take the least time, with those."""
        sums = []
        for block_m in {block_m for _, at, block_m in self.found if at == rows}:
            stages = [self.found.get((stage, rows, block_m)) for stage in get_args(Stage)]
            if stages[0] and stages[1]:
                (gate_us, gate_up), (down_us, down) = stages[0][0], stages[1][0]
                sums.append((gate_us + down_us, ExpertTiles(block_m, gate_up, down, pdl)))
        return min(sums, key=lambda choice: choice[0])[1] if sums else None

    def variants(self, stage: Stage, rows: int, block_m: int, every: bool) -> list[GemmTile]:
        listed = (PREFILL if block_m == 128 else DECODE)[stage]
        known = list(dict.fromkeys(tile for known in listed if (tile := fitted(stage, block_m, known))))
        if every:
            return known
        best = [found[:FINALISTS] for (which, _, m), found in self.found.items() if (which, m) == (stage, block_m)]
        finalists = {tile for results in best for _, tile in results}
        return [tile for tile in known if tile in finalists] or known[:FINALISTS]


def _live_slots(schedule: BlockSchedule) -> torch.Tensor:
    """[live blocks * block_m]"""
    return schedule.slots[: int(schedule.num_blocks) * schedule.block_m].long()


def _short(problem: Exception) -> str:
    lines = str(problem).strip().splitlines() or [""]
    return f"{type(problem).__name__}: {lines[0][:100]} ... {lines[-1][-100:]}"


def layer_us(layer: Layer, routings: list[Routing], rows: int, tiles: ExpertTiles) -> tuple[float, float]:
    """Time of the whole layer, and its error; `rows` of the routings' rows are live."""
    count = live(rows)

    def call() -> list[torch.Tensor]:
        return [
            routed_experts(r.x, r.weights, r.chosen, layer.gate_up, layer.down, count, tiles=tiles) for r in routings
        ]

    first = routings[0]
    expected = routed_experts_reference(first.x, first.weights, first.chosen, layer.gate_up, layer.down, rows)
    wrong = error(call()[0][:rows], expected[:rows])
    return graph_us(call, len(routings), replays=15), wrong


def ceilings() -> float:
    """GB/s of a copy, read + write; prints it beside reading alone and the product of large matrices."""
    source = torch.ones(1 << 29, device=DEVICE, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    wide_target, wide_source = target.view(torch.float32), source.view(torch.float32)
    copied = 2 * source.nbytes / graph_us(lambda: wide_target.copy_(wide_source)) / 1e3
    wide = source.view(torch.int32)
    read = source.nbytes / graph_us(lambda: wide.max()) / 1e3
    a, b = source[: 1 << 26].view(8192, 8192).normal_(), target[: 1 << 26].view(8192, 8192).normal_()
    tflops = 2 * 8192**3 / graph_us(lambda: a @ b) / 1e6
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy {copied:.0f} GB/s (read + write), read alone {read:.0f} GB/s, bf16 product {tflops:.0f} TFLOP/s")
    return copied


def overheads(layer: Layer, rows: int, routing: Routing) -> str:
    """What schedule and combine take alone."""
    shape, count = layer.shape, live(rows)
    block_m = expert_tiles(rows, shape.top_k, shape.experts).block_m
    parts = routing.x.new_ones(rows * shape.top_k, shape.hidden)

    def schedule() -> None:
        for _ in range(20):
            block_schedule(routing.chosen, count, shape.experts, block_m)

    def combine() -> None:
        for _ in range(20):
            moe_experts._combine(parts, routing.weights, routing.chosen, count, 0, shape.experts, False)

    return f"rows {rows:5}: schedule {graph_us(schedule, 20):.1f} us, combine {graph_us(combine, 20):.1f} us"


def layer_lines(layer: Layer, sweep: Sweep, rows: int, copied: float, routings: list[Routing]) -> Iterator[str]:
    """The layer with the defaults, and with the sweep's best tiles with and without overlapping starts."""
    shape = layer.shape
    chosen = {"default": expert_tiles(rows, shape.top_k, shape.experts)}
    if (best := sweep.best(rows, pdl=True)) is not None:
        chosen |= {"best": replace(best, pdl=False), "best pdl": best}
    touched = sum(routing.touched for routing in routings) / len(routings)
    weight_bytes = touched * (shape.bytes("gate_up") + shape.bytes("down"))
    for label, tiles in chosen.items():
        try:
            us, wrong = layer_us(layer, routings, rows, tiles)
        except Exception as problem:
            yield f"{rows:5} {label:8} {_short(problem)}"
            continue
        gbps, peer = weight_bytes / us / 1e3, shape.peer_us.get(rows, 0.0)
        if label == "default" and rows <= 256:
            case = f"routed experts hidden={shape.hidden} experts={shape.experts} rows={rows}"
            write([Row("kernels", case, "bandwidth", "GB/s", Figure.of([gbps]), "copy", copied, "higher")])
        tflops = rows * shape.top_k * 3 * (shape.bytes("down")) / us / 1e6
        yield (
            f"{rows:5} {label:8} {touched:5.1f} {us:8.1f} {gbps:6.0f} {gbps / copied:6.3f} {tflops:6.0f} {wrong:7.4f} "
            f"{peer:7.0f}  m{tiles.block_m} | {name(tiles.gate_up)} | {name(tiles.down)}"
        )


def capacity_lines(layer: Layer, sweep: Sweep, capacity: int, copied: float) -> Iterator[str]:
    """A capacity's best tiles with fewer live rows."""
    shape = layer.shape
    tiles = sweep.best(capacity, pdl=True) or expert_tiles(capacity, shape.top_k, shape.experts)
    routings = layer.routings(capacity)
    for rows in (count for count in (1, 8, 32, 64, 128, 256) if count <= capacity):
        touched = sum(len(_experts(routing.chosen[:rows])) for routing in routings) / len(routings)
        try:
            us, wrong = layer_us(layer, routings, rows, tiles)
        except Exception as problem:
            yield f"live {rows:4} of {capacity}: {_short(problem)}"
            continue
        gbps = touched * (shape.bytes("gate_up") + shape.bytes("down")) / us / 1e3
        speed = f"{us:8.1f} us {gbps:6.0f} GB/s {gbps / copied:.3f} of copy, error {wrong:.4f}"
        yield f"live {rows:4} of {capacity}: {touched:5.1f} experts {speed}"


def run(shape: Shape, all_rows: list[int], seconds: float) -> None:
    start = time.monotonic()
    copied = ceilings()
    layer = Layer(shape)
    sweep = Sweep(layer, seconds)
    summary: list[str] = []
    for rows in all_rows:
        try:
            routings = layer.routings(rows)
            every = rows in ROWS[:4] or not sweep.found
            for block_m in block_sizes(shape, rows):
                for stage in get_args(Stage):
                    sweep.stage(stage, rows, block_m, sweep.variants(stage, rows, block_m, every), routings)
            summary += layer_lines(layer, sweep, rows, copied, routings)
            summary.append("      " + overheads(layer, rows, routings[0]))
        except Exception as problem:
            summary.append(f"{rows:5} {_short(problem)}")
    print("\n rows tiles    experts     us   GB/s  /copy  TFLOP/s  error  vLLM us  block_m | gate_up | down")
    print("\n".join(summary))
    for capacity in (32, 256):
        if capacity in all_rows:
            print("\n".join(capacity_lines(layer, sweep, capacity, copied)))
    print(f"{time.monotonic() - start:.0f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="v2-lite")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--seconds", type=float, default=80.0, help="for trying variants; what is left is skipped")
    arguments = parser.parse_args()
    run(SHAPES[arguments.shape], arguments.rows, arguments.seconds)


if __name__ == "__main__":
    main()
