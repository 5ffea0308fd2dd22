"""Attention of prefill chunks on one GPU, checked and timed in CUDA graphs, beside torch's cuDNN and flash attention.

    python -m benchmarks.kernels.prefill_attention [--tiles]

The peers attend to prompts of one length without a prefix, which is all that they can; figures are TFLOP/s of the
causal half. `--tiles` tries other tiles, too.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.timing import graph_us
from benchmarks.rows import Figure, Row, write
from splitserve.kernels.prefill_attention import (
    KEY_TILE,
    PrefillTiles,
    prefill_attention,
    prefill_attention_reference,
    prefill_tiles,
    query_tiles,
)

CALLS, SAMPLES = 4, 5
VARIANTS = [PrefillTiles(128, 8, 2), PrefillTiles(64, 8, 3), PrefillTiles(64, 8, 4), PrefillTiles(64, 8, 2)]


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    dim: int
    rest: int
    value_dim: int


MLA, LLAMA = Shape(16, 16, 128, 64, 128), Shape(32, 8, 128, 0, 128)
CASES = {
    "mla 16 heads, 2048x1": (MLA, [(0, 2048)]),
    "mla 16 heads, 2048x4": (MLA, [(0, 2048)] * 4),
    "mla 16 heads, 256x32": (MLA, [(0, 256)] * 32),
    "mla 16 heads, 8192x1": (MLA, [(0, 8192)]),
    "mla 16 heads, 8192 after 24576": (MLA, [(24576, 8192)]),
    "gqa 32/8 heads, 2048x4": (LLAMA, [(0, 2048)] * 4),
    "gqa 32/8 heads, 8192x1": (LLAMA, [(0, 8192)]),
}


class Case:
    """Random chunks (start, queries) of as many sequences."""

    def __init__(self, shape: Shape, chunks: list[tuple[int, int]]) -> None:
        self.shape, self.chunks = shape, chunks
        padded = [-(-(start + count) // KEY_TILE) * KEY_TILE for start, count in chunks]
        starts, lens = [start for start, _ in chunks], [count for _, count in chunks]
        rows = [sum(padded[:index]) for index in range(len(padded))]
        self.tiles = torch.from_numpy(query_tiles(lens, starts, rows)).cuda()
        self.q = random_rows(sum(lens), shape.heads, shape.dim + shape.rest)
        both = random_rows(sum(padded), shape.kv_heads, shape.dim + shape.value_dim)
        self.keys, self.values = torch.split(both, [shape.dim, shape.value_dim], dim=-1)
        self.rope_keys = random_rows(sum(padded), 1, 512 + shape.rest)[:, 0, 512:] if shape.rest else None
        self.scale = float((shape.dim + shape.rest) ** -0.5)

    @property
    def flops(self) -> float:
        width = self.shape.dim + self.shape.rest + self.shape.value_dim
        return sum(2 * self.shape.heads * width * count * (start + (count + 1) / 2) for start, count in self.chunks)

    def run(self, tiles: PrefillTiles | None = None) -> torch.Tensor:
        return prefill_attention(
            self.q, self.keys, self.values, self.tiles, self.scale, rope_keys=self.rope_keys, config=tiles
        )

    def error(self, tiles: PrefillTiles | None = None) -> float:
        """Relative distance of the first tiles' rows from float64."""
        some = self.tiles[:2]
        rows = torch.cat([torch.arange(first, first + count) for first, count, _, _ in some.tolist()])
        expected = prefill_attention_reference(self.q, self.keys, self.values, some, self.scale, self.rope_keys)[rows]
        return float((self.run(tiles)[rows] - expected).norm() / expected.norm())

    def peer(self, backend: SDPBackend) -> float | None:
        """TFLOP/s of torch's attention, None where it cannot do this."""
        (start, count), shape = self.chunks[0], self.shape
        if start:
            return None
        q = random_rows(len(self.chunks), count, shape.heads, shape.dim + shape.rest)
        k = random_rows(len(self.chunks), count, shape.kv_heads, shape.dim + shape.rest)
        v = random_rows(len(self.chunks), count, shape.kv_heads, shape.value_dim)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        grouped = shape.heads != shape.kv_heads
        if backend is SDPBackend.FLASH_ATTENTION and shape.rest:
            return None
        with sdpa_kernel(backend):
            return self.rate(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped))

    def rate(self, call: Callable[[], object]) -> float:
        return self.flops / graph_us(lambda: [call() for _ in range(CALLS)], CALLS) / 1e6


def random_rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda").bfloat16()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", action="store_true", help="try other tiles, too")
    options = parser.parse_args()
    for name, (shape, chunks) in CASES.items():
        case = Case(shape, chunks)
        if (error := case.error()) > 5e-3:
            raise SystemExit(f"{name}: off by {error:.1e}")
        figure = Figure.of([case.rate(case.run) for _ in range(SAMPLES)])
        rows = [
            Row("prefill_attention", name, "rate", "TFLOP/s", figure, backend.name.lower(), rate, "higher")
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)
            if (rate := case.peer(backend)) is not None
        ]
        none = Row("prefill_attention", name, "rate", "TFLOP/s", figure, "none", None, "higher")
        write(rows or [none])
        for tiles in VARIANTS if options.tiles else []:
            rate, error = case.rate(partial(case.run, tiles)), case.error(tiles)
            print(f"  {tiles}: {rate:.0f}, off by {error:.1e}" + " *" * (tiles == prefill_tiles(torch.bfloat16)))


if __name__ == "__main__":
    main()
