"""Routed experts: the block schedule, the sum against plain formulas, padding rows, and bits without neighbours."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.moe_experts import Experts, routed_experts, routed_experts_reference
from splitserve.kernels.moe_schedule import BlockSchedule, block_schedule, block_schedule_reference, max_blocks
from splitserve.kernels.moe_tiles import ExpertTiles, GemmTile, expert_tiles

DEVICE = "cpu" if INTERPRETING else "cuda"
SMALL = GemmTile(block_n=32, block_k=32, warps=4, stages=2, programs_per_sm=1)
TILES = ExpertTiles(block_m=16, gate_up=SMALL, down=SMALL, pdl=False)

Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor, Experts]


def live(rows: int) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.int32, device=DEVICE)


def routing(rows: int, top_k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    scores, chosen = torch.rand(rows, experts, generator=generator).topk(top_k, dim=-1)
    return scores.to(DEVICE), chosen.to(DEVICE)


def layer(
    rows: int, top_k: int, experts: int, hidden: int, width: int, dtype: torch.dtype, device: str = "cpu"
) -> Case:
    """x, weights, chosen, experts, of a scale that gives outputs of about 1."""
    generator = torch.Generator(DEVICE).manual_seed(experts)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=DEVICE, dtype=dtype)

    weights, chosen = routing(rows, top_k, experts)
    gate_up = normal(experts, 2 * width, hidden).mul_(hidden**-0.5)
    down = normal(experts, hidden, width).mul_(width**-0.5)
    return normal(rows, hidden), weights, chosen, Experts(gate_up, down)


def live_blocks(schedule: BlockSchedule) -> list[tuple[int, list[int]]]:
    count = int(schedule.num_blocks)
    assert count <= schedule.max_blocks
    slots = schedule.slots.view(-1, schedule.block_m)[:count]
    return list(zip(schedule.experts[:count].tolist(), slots.tolist(), strict=True))


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = 1e-4 if actual.dtype == torch.float32 else 2**-5
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize(
    ("rows", "top_k", "experts", "count"), [(1, 2, 8, 1), (7, 3, 8, 5), (40, 6, 7, 40), (9, 2, 8, 0), (70, 2, 3, 64)]
)
def test_schedule(rows: int, top_k: int, experts: int, count: int, dtype: torch.dtype) -> None:
    chosen = routing(rows, top_k, experts)[1].to(dtype)
    schedule = block_schedule(chosen, live(count), experts, 16)
    assert live_blocks(schedule) == block_schedule_reference(chosen, count, experts, 16)


def test_schedule_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("splitserve.kernels.moe_schedule.CHUNK", 64)
    chosen = routing(90, 4, 6)[1]
    for count in (0, 3, 47, 90):
        schedule = block_schedule(chosen, live(count), 3, 16, first_expert=2)
        assert live_blocks(schedule) == block_schedule_reference(chosen, count, 3, 16, first_expert=2)


def test_no_schedule_needs_more_than_max_blocks() -> None:
    assert [max_blocks(choices, 64, 16) for choices in (1, 6, 64, 65, 1536)] == [1, 6, 64, 64, 156]
    spread = torch.tensor([[0, 1], [0, 1], [2, 3]]).repeat(11, 1)[:32]  # 22, 22, 10, 10 choices
    blocks = len(block_schedule_reference(spread, 32, 4, 16))
    assert blocks <= max_blocks(64, 4, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("swap", [True, False])
def test_sum_of_experts(dtype: torch.dtype, swap: bool) -> None:
    x, weights, chosen, experts = layer(11, 2, 5, 80, 48, dtype)  # neither is a multiple of its tile
    tile = replace(SMALL, swap=swap)
    tiles = replace(TILES, gate_up=tile, down=tile)
    actual = routed_experts(x, weights, chosen, experts, live(11), tiles=tiles)
    assert actual.dtype == dtype
    close(actual, routed_experts_reference(x, weights, chosen, experts, 11))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [45, 20, 0])
def test_tokens_gathered_first(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int) -> None:
    monkeypatch.setattr("splitserve.kernels.moe_experts.GATHER_HIDDEN", 16)
    x, weights, chosen, experts = layer(45, 2, 3, 80, 48, dtype)
    actual = routed_experts(x, weights, chosen, experts, live(count), tiles=replace(TILES, gather=True), sms=3)
    close(actual, routed_experts_reference(x, weights, chosen, experts, count))


def test_against_the_formula_in_float64() -> None:
    x, weights, chosen, experts = layer(6, 3, 4, 32, 16, torch.float32)
    expected = torch.zeros(6, 32, dtype=torch.float64, device=DEVICE)
    for token, place in ((token, place) for token in range(6) for place in range(3)):
        expert = int(chosen[token, place])
        gate, up = (experts.gate_up[expert].double() @ x[token].double()).chunk(2)
        part = experts.down[expert].double() @ (gate / (1 + (-gate).exp()) * up)
        expected[token] += weights[token, place].double() * part
    close(routed_experts(x, weights, chosen, experts, live(6), tiles=TILES), expected.float())
    close(routed_experts_reference(x, weights, chosen, experts, 6), expected.float())


@pytest.mark.parametrize("swap", [True, False])
@pytest.mark.parametrize(("rows", "count", "shared_m"), [(11, 11, 16), (45, 40, 32), (45, 7, 16), (3, 0, 16)])
def test_shared_experts_take_rows_as_they_come(swap: bool, rows: int, count: int, shared_m: int) -> None:
    """As if they were experts that every token happens to choose."""
    x, weights, chosen, experts = layer(rows, 4, 6, 80, 48, torch.float32)
    chosen[:, :2] %= 4
    chosen[:, 2:] = torch.arange(4, 6, device=DEVICE)
    tile = replace(SMALL, swap=swap, shared_stages=2)
    tiles = replace(TILES, gate_up=tile, down=tile, shared_m=shared_m)
    expected = routed_experts_reference(x, weights, chosen, experts, count)
    experts = replace(experts, shared=2)
    for shared_tiles in (tiles, replace(tiles, shared_m=0)):
        actual = routed_experts(x, weights, chosen, experts, live(count), tiles=shared_tiles, sms=3)
        close(actual, expected)


def test_more_slots_than_a_block_and_more_tiles_than_programs() -> None:
    x, weights, chosen, experts = layer(45, 2, 3, 64, 64, torch.float32)
    actual = routed_experts(x, weights, chosen, experts, live(45), tiles=TILES, sms=3)
    close(actual, routed_experts_reference(x, weights, chosen, experts, 45))


@pytest.mark.parametrize("rows", [3, 40])
def test_default_tiles(rows: int) -> None:
    x, weights, chosen, experts = layer(rows, 2, 4, 128, 128, torch.bfloat16)
    actual = routed_experts(x, weights, chosen, experts, live(rows))
    close(actual, routed_experts_reference(x, weights, chosen, experts, rows))


def test_padding_rows_are_zero_and_change_nothing() -> None:
    x, weights, chosen, experts = layer(12, 2, 4, 32, 32, torch.float32)
    full = routed_experts(x, weights, chosen, experts, live(12), tiles=TILES)
    x[5:], weights[5:], chosen[5:] = float("nan"), float("nan"), 10**9
    actual = routed_experts(x, weights, chosen, experts, live(5), tiles=TILES)
    assert torch.equal(actual[:5], full[:5])
    assert not actual[5:].any()
    assert not routed_experts(x, weights, chosen, experts, live(0), tiles=TILES).any()


def test_ranks_add_up_to_the_layer() -> None:
    x, weights, chosen, experts = layer(10, 3, 6, 32, 32, torch.float32)
    ranks = [Experts(experts.gate_up[at : at + 2], experts.down[at : at + 2], first=at) for at in (0, 2, 4)]
    parts = [routed_experts(x, weights, chosen, rank, live(9), tiles=TILES) for rank in ranks]
    close(torch.stack(parts).sum(0), routed_experts_reference(x, weights, chosen, experts, 9))


def test_bad_tensors_are_refused() -> None:
    x, weights, chosen, experts = layer(4, 2, 3, 32, 16, torch.float32)
    with pytest.raises(ValueError, match="fit together"):
        routed_experts(x, weights, chosen, replace(experts, down=experts.down[:2]), live(4))
    with pytest.raises(ValueError, match="dtype"):
        routed_experts(x.bfloat16(), weights, chosen, experts, live(4))
    with pytest.raises(ValueError, match="contiguous"):
        routed_experts(x.T.contiguous().T, weights, chosen, experts, live(4))


@pytest.mark.parametrize("rows", [1, 8, 32, 64, 128, 256, 512, 8192])
def test_tiles_fit_shared_memory(rows: int) -> None:
    for top_k, experts in ((6, 64), (8, 256)):
        tiles = expert_tiles(rows, top_k, experts)
        for tile, weight_rows in ((tiles.gate_up, 2 * tiles.gate_up.block_n), (tiles.down, tiles.down.block_n)):
            for tokens, stages in ((tiles.block_m, tile.stages), (tiles.shared_m, tile.shared_stages)):
                stage = (weight_rows + tokens) * tile.block_k * 2
                assert stage * stages * tile.programs_per_sm <= 227 * 1024


@pytest.mark.parametrize(("top_k", "experts"), [(6, 64), (8, 256), (2, 6)])
def test_tiles_change_at_powers_of_two_alone(top_k: int, experts: int) -> None:
    """Prefill compiles kernels at powers of two before it is ready."""
    for rows in range(1, 2048):
        assert expert_tiles(rows, top_k, experts) == expert_tiles(1 << (rows - 1).bit_length(), top_k, experts)


@pytest.fixture(scope="module")
def v2_lite() -> Experts:
    """Weights of a DeepSeek-V2-Lite layer on the GPU."""
    return layer(1, 6, 64, 2048, 1408, torch.bfloat16)[3]


def v2_lite_rows(rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 2048, generator=torch.Generator().manual_seed(rows)).bfloat16().to(DEVICE)
    return (x, *routing(rows, 6, 64))


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 32, 128, 256, 512, 2048, 8192])
def test_v2_lite(v2_lite: Experts, rows: int) -> None:
    for count in (rows, rows // 2 + 1):
        x, weights, chosen = v2_lite_rows(rows)
        actual = routed_experts(x, weights, chosen, v2_lite, live(count))
        close(actual, routed_experts_reference(x, weights, chosen, v2_lite, count))
        schedule = block_schedule(chosen, live(count), 64, 16)
        assert live_blocks(schedule) == block_schedule_reference(chosen, count, 64, 16)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 8, 64, 128, 256])
def test_shared_experts_are_to_the_bit_what_routed_ones_would_be(rows: int) -> None:
    x, weights, chosen, experts = layer(rows, 8, 66, 2048, 1408, torch.bfloat16)
    chosen = torch.cat((chosen[:, :6] % 64, torch.arange(64, 66, device=DEVICE).expand(rows, 2)), 1).contiguous()
    for count in (rows, rows // 2 + 1):
        actual = routed_experts(x, weights, chosen, replace(experts, shared=2), live(count))
        assert actual[:count].std() > 0.5
        assert torch.equal(actual, routed_experts(x, weights, chosen, experts, live(count)))


@pytest.mark.gpu
@pytest.mark.parametrize("capacity", [8, 64, 256, 1024])
def test_bits_do_not_depend_on_neighbours(v2_lite: Experts, capacity: int) -> None:
    x, weights, chosen = v2_lite_rows(capacity)
    full = routed_experts(x, weights, chosen, v2_lite, live(capacity))
    for seed in range(3):
        order = torch.randperm(capacity, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        count = capacity // (seed + 1)
        actual = routed_experts(x[order], weights[order], chosen[order], v2_lite, live(count))
        assert torch.equal(actual[:count], full[order[:count]])


@pytest.mark.gpu
def test_one_graph_serves_any_number_of_live_rows(v2_lite: Experts) -> None:
    x, weights, chosen = v2_lite_rows(64)
    count = live(64)
    full = routed_experts(x, weights, chosen, v2_lite, count)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = routed_experts(x, weights, chosen, v2_lite, count)
    for rows in (64, 1, 0, 33):
        count.fill_(rows)
        graph.replay()
        assert torch.equal(out[:rows], full[:rows])
        assert not out[rows:].any()


@pytest.mark.gpu
def test_deterministic_tiles_give_a_row_the_same_bits_among_any_number() -> None:
    x, weights, chosen, experts = layer(2000, 6, 16, 512, 256, torch.bfloat16)
    tiles = expert_tiles(2000, 6, 16, deterministic=True)
    expected = routed_experts(x, weights, chosen, experts, live(2000), tiles=tiles)
    for first, rows in ((0, 1), (3, 16), (50, 64), (700, 256)):
        part = slice(first, first + rows)
        tiles = expert_tiles(rows, 6, 16, deterministic=True)
        found = routed_experts(x[part], weights[part], chosen[part], experts, live(rows), tiles=tiles)
        assert torch.equal(found, expected[part])
