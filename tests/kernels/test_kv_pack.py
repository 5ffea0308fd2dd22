"""KV leaves pages and comes into pages as torch moves it, with the checksum that the host computes."""

from __future__ import annotations

import random

import pytest
import torch

from splitserve.cluster.layout import KvLayout
from splitserve.engine.kv_cache import KvCache
from splitserve.kernels.kv_pack import KvRegion, PagedLayers, pack_kv, unpack_kv
from splitserve.kernels.launch import INTERPRETING
from splitserve.kv_transfer.checksum import checksum, weighted_sum
from splitserve.kv_transfer.mover import HostMover
from splitserve.kv_transfer.packing import cache_rows

DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
PAGES = 12

pytestmark = [] if INTERPRETING else [pytest.mark.gpu]


def random_cache(layout: KvLayout, seed: int) -> KvCache:
    cache = KvCache(layout, PAGES, DEVICE)
    for number, layer in enumerate(cache.layers):
        generator = torch.Generator(DEVICE).manual_seed(seed * 100 + number)
        layer.view(torch.uint8).random_(0, 256, generator=generator)
    return cache


def random_region(dice: random.Random, cache: KvCache) -> KvRegion:
    def within(stop: int) -> tuple[int, int]:
        first = dice.randrange(stop)
        return first, dice.randint(first + 1, stop)

    layout = cache.layout
    tokens = within(dice.choice((3, PAGES * layout.page_size)))
    return KvRegion(within(layout.num_layers), within(layout.heads_per_rank), tokens)


LAYOUTS = {
    "latent": KvLayout(1, 3, 1, 1, 576, 16, "bfloat16"),
    "heads": KvLayout(1, 3, 2, 4, 128, 16, "bfloat16"),
    "float32": KvLayout(1, 2, 2, 2, 20, 8, "float32"),
    "narrow": KvLayout(1, 2, 2, 3, 4, 4, "bfloat16"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("seed", range(6))
def test_payload_and_sum_are_the_hosts(name: str, seed: int) -> None:
    dice = random.Random(f"{name}{seed}")
    cache = random_cache(LAYOUTS[name], seed)
    region = random_region(dice, cache)
    host = HostMover(cache)
    table = host.table(dice.sample(range(PAGES), PAGES), PAGES * cache.layout.page_size)
    rows = cache_rows(cache, table, region.heads, region.tokens)
    layers = PagedLayers.of(cache.layers)
    expected = torch.empty(region.rows(layers.planes) * layers.row_bytes, dtype=torch.uint8)
    expected_total = host.pack(table, region, expected).total()

    payload, total = torch.empty_like(expected, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    pack_kv(layers, table, region, payload, total, sms=dice.choice((0, 1)))
    assert torch.equal(payload.cpu(), expected)
    assert int(total) == expected_total

    other = random_cache(LAYOUTS[name], seed + 50)
    before = [layer.clone() for layer in other.layers]
    total.zero_()
    unpack_kv(PagedLayers.of(other.layers), table, region, payload, total)
    assert int(total) == expected_total
    for number, (layer, old) in enumerate(zip(other.layers, before, strict=True)):
        moved = old.view(-1, old.shape[-1]).clone()
        if region.layers[0] <= number < region.layers[1]:
            moved[rows] = cache.layers[number].view(-1, old.shape[-1])[rows]
        assert torch.equal(layer.view(torch.uint8).flatten(), moved.view(torch.uint8).flatten())


def test_payloads_of_several_blocks() -> None:
    layout = KvLayout(1, 4, 2, 2, 128, 16, "bfloat16")
    cache = random_cache(layout, 7)
    region = KvRegion((0, 4), (0, 2), (5, PAGES * 16 - 3))
    layers = PagedLayers.of(cache.layers)
    table = HostMover(cache).table(range(PAGES), PAGES * 16)
    payload = torch.empty(region.rows(2) * layers.row_bytes, dtype=torch.uint8, device=DEVICE)
    total = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    pack_kv(layers, table, region, payload, total, sms=1)
    assert payload.numel() > 10 * (4 << 14)
    assert int(total) == weighted_sum(payload.cpu())
    assert checksum(payload.cpu(), b"a") != checksum(payload.cpu(), b"b")


def test_what_does_not_fit_is_refused() -> None:
    cache = random_cache(LAYOUTS["heads"], 0)
    layers, table = PagedLayers.of(cache.layers), HostMover(cache).table([0], 16)
    total = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="payload: found 8 bytes for 2 rows of 256"):
        pack_kv(layers, table, KvRegion((0, 1), (0, 1), (0, 1)), torch.empty(8, dtype=torch.uint8), total)
    payload = torch.empty(2 * 17 * 256, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="1 pages of 16 do not reach token 17"):
        unpack_kv(layers, table, KvRegion((0, 1), (0, 1), (0, 17)), payload, total)
