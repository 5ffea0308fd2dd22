"""How the routed experts' grouped GEMMs are cut, by how many slots an expert can expect."""

from __future__ import annotations

from dataclasses import dataclass, replace

import triton


@dataclass(frozen=True)
class GemmTile:
    """How one grouped GEMM is cut. A program computes `block_n` columns of one block of slots at a time.

    `swap` makes the weights the M operand of the MMA and the tokens the N operand: with few tokens that allows wgmma,
    whose M is at least 64. `shared_stages` are the stages of tiles of shared experts, which hold more tokens.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    programs_per_sm: int
    swap: bool = False
    shared_stages: int = 0

    def for_width(self, k: int) -> GemmTile:
        """The tile for products over `k`: where one `block_k` would do, Triton keeps two loops' buffers at once."""
        return self if k > self.block_k else replace(self, block_k=self.block_k // 2)


@dataclass(frozen=True)
class ExpertTiles:
    """Tiles of a layer's experts: `block_m` slots a block, both GEMMs, and whether kernels overlap their starts.

    Tiles of shared experts hold `shared_m` tokens; 0 gives them blocks like any other expert's. `gather` copies tokens
    into slots before the first GEMM (`kernels.moe_gathered`); same bits.
    """

    block_m: int
    gate_up: GemmTile
    down: GemmTile
    shared_m: int = 0
    pdl: bool = True
    gather: bool = False


def expert_tiles(rows: int, top_k: int, num_experts: int, deterministic: bool = False) -> ExpertTiles:
    """Tiles for a capacity of `rows`, by the slots that an expert can expect: rows * top_k / num_experts.

    Measured on an H100; docs/LOG.md has the runners-up. Numbers of rows up to the same power of two share their tiles,
    so that prefill has few kernels to compile. `deterministic` tiles are the same for any capacity.
    """
    rows = triton.next_power_of_2(rows)
    expected = 48 if deterministic else rows * top_k / num_experts
    if expected <= 16:
        gate_up = GemmTile(64, 128, warps=4, stages=5, programs_per_sm=1, swap=True, shared_stages=4)
        down = GemmTile(64, 128, warps=4, stages=4, programs_per_sm=2, swap=True, shared_stages=3)
        return ExpertTiles(16, gate_up, down, shared_m=min(64, max(16, rows)))
    if expected <= 32:
        gate_up = GemmTile(128, 128, warps=8, stages=3, programs_per_sm=1, swap=True, shared_stages=2)
        down = GemmTile(64, 128, warps=4, stages=4, programs_per_sm=2, swap=True, shared_stages=2)
        return ExpertTiles(32, gate_up, down, shared_m=128)
    if expected <= 48:
        gate_up = GemmTile(64, 128, warps=4, stages=3, programs_per_sm=1, swap=True, shared_stages=4)
        down = GemmTile(64, 128, warps=4, stages=3, programs_per_sm=2, swap=True, shared_stages=3)
        return ExpertTiles(64, gate_up, down, shared_m=64)
    gate_up = GemmTile(128, 64, warps=8, stages=4, programs_per_sm=1)
    down = GemmTile(256, 64, warps=8, stages=4, programs_per_sm=1)
    return ExpertTiles(128, gate_up, down, pdl=False, gather=True)
