"""Decode attention on one GPU, checked against float64 and timed beside a copy, and the plan of a step.

    python -m benchmarks.kernels.decode_attention

Times come from CUDA graphs of several layers' calls, whose caches are together larger than L2. Bandwidth counts the
bytes of keys and values that the contexts hold. The plan is made once for all layers of a step and timed by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.kernels.timing import copy_gb, graph_us
from benchmarks.rows import Figure, Row, write
from splitserve.kernels.decode_attention import decode_attention, decode_attention_reference
from splitserve.kernels.decode_plan import (
    DecodeShape,
    choose_tiles,
    new_decode_plan,
    new_decode_scratch,
    plan_decode,
)
from splitserve.kernels.launch import num_sms

DEVICE = torch.device("cuda")
POOL_BYTES, LAYER_BYTES = 6_000_000_000, 150_000_000
SAMPLES, CALLS, PLANS = 5, 12, 20
LARGEST_ERROR = 0.02
CHECKED = [1, 0, 1025, 64, 333, 2500]
SHAPES = {
    "mla 16 heads": DecodeShape(16, 1, 576, 512, 64),
    "mla 128 heads": DecodeShape(128, 1, 576, 512, 64),
    "gqa 32/8 heads": DecodeShape(32, 8, 128, 128, 64),
}
SIZES = ((1, 1024), (8, 1024), (32, 1024), (64, 1024), (128, 1024), (256, 1024), (64, 4096), (128, 4096), (256, 4096))


@dataclass(frozen=True)
class Contexts:
    """Lengths of a decode step's contexts, and the pages that hold them in each of `layers`."""

    shape: DecodeShape
    lengths: torch.Tensor
    table: torch.Tensor
    layers: list[torch.Tensor]

    @classmethod
    def new(cls, shape: DecodeShape, lengths: list[int], pool: torch.Tensor) -> Contexts:
        width = -(-max(lengths) // shape.page_size)
        sizes = (1 if shape.latent else 2, len(lengths) * width, shape.kv_heads, shape.page_size, shape.dim)
        numbers = torch.Size(sizes).numel()
        count = max(1, min(pool.numel() // numbers, CALLS, -(-LAYER_BYTES // (2 * numbers))))
        table = torch.randperm(len(lengths) * width, device=DEVICE).int().view(len(lengths), width)
        layers = [pool[layer * numbers : (layer + 1) * numbers].view(sizes) for layer in range(count)]
        return cls(shape, torch.tensor(lengths, dtype=torch.int32, device=DEVICE), table, layers)

    @property
    def kv_bytes(self) -> int:
        """Of one layer's keys and values."""
        planes = 1 if self.shape.latent else 2
        return 2 * planes * self.shape.kv_heads * self.shape.dim * int(self.lengths.sum())

    def queries(self) -> torch.Tensor:
        size = (len(self.lengths), self.shape.q_len, self.shape.heads, self.shape.dim)
        return torch.randn(size, device=DEVICE, dtype=torch.bfloat16)

    def attention(self) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        """attend(q, layer), with the tiles that a decode graph of this many slots has."""
        slots, shape = len(self.lengths), self.shape
        tiles = choose_tiles(shape, slots)
        plan = new_decode_plan(slots, tiles.wave(shape, num_sms(DEVICE)), tiles.splits, DEVICE)
        scratch = new_decode_scratch(shape, tiles, slots, int(self.lengths.sum()), DEVICE)
        plan_decode(self.lengths, plan)
        value_dim = shape.value_dim if shape.latent else None
        return lambda q, layer: decode_attention(
            q, layer, self.table, self.lengths, shape.dim**-0.5, plan, scratch, tiles, value_dim=value_dim
        )

    def error(self) -> float:
        """The largest, against float64."""
        q, layer, value_dim = self.queries(), self.layers[0], self.shape.value_dim if self.shape.latent else None
        expected = decode_attention_reference(q, layer, self.table, self.lengths, self.shape.dim**-0.5, value_dim)
        return float((self.attention()(q, layer).double() - expected).abs().max())

    def microseconds(self) -> list[float]:
        """Of one layer, SAMPLES times."""
        q, attend = self.queries(), self.attention()
        layers = (self.layers * CALLS)[: max(CALLS, len(self.layers))]

        def step() -> None:
            for layer in layers:
                attend(q, layer)

        return [graph_us(step, len(layers)) for _ in range(SAMPLES)]


def plan_us(slots: int) -> list[float]:
    shape = SHAPES["mla 16 heads"]
    tiles = choose_tiles(shape, slots)
    plan = new_decode_plan(slots, tiles.wave(shape, num_sms(DEVICE)), tiles.splits, DEVICE)
    lengths = torch.randint(1, 8192, (slots,), dtype=torch.int32, device=DEVICE)

    def plans() -> None:
        for _ in range(PLANS):
            plan_decode(lengths, plan)

    return [graph_us(plans, PLANS) for _ in range(SAMPLES)]


def main() -> None:
    torch.manual_seed(0)
    copied = copy_gb()
    pool = torch.randn(POOL_BYTES // 2, device=DEVICE, dtype=torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, copy {copied:.0f} GB/s (read + write)")
    for name, shape in SHAPES.items():
        error = Contexts.new(shape, CHECKED, pool).error()
        assert error < LARGEST_ERROR, f"{name}: error {error}"
        for slots, length in SIZES:
            contexts = Contexts.new(shape, [length] * slots, pool)
            rates = [contexts.kv_bytes / us / 1e3 for us in contexts.microseconds()]
            case = f"decode attention {name} {slots}x{length}"
            write([Row("kernels", case, "bandwidth", "GB/s", Figure.of(rates), "copy", copied, "higher")])
    for slots in (16, 64, 256):
        figure = Figure.of(plan_us(slots))
        write([Row("kernels", f"plan of decode attention, {slots} slots", "time", "us", figure, "none", None, "lower")])


if __name__ == "__main__":
    main()
