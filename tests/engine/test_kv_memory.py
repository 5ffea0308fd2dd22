"""KV pages on a device and in host memory."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from splitserve.cluster.layout import KvLayout
from splitserve.engine.host_tier import CHUNK_BYTES, HostTier
from splitserve.engine.kv_cache import KvCache, pages_for_budget

CPU = torch.device("cpu")
LAYOUTS = [
    KvLayout(tp=1, num_layers=3, planes=2, num_kv_heads=2, head_dim=4, page_size=8, dtype="float32"),
    KvLayout(tp=4, num_layers=2, planes=2, num_kv_heads=2, head_dim=8, page_size=4, dtype="bfloat16"),
    KvLayout(tp=2, num_layers=2, planes=1, num_kv_heads=1, head_dim=12, page_size=16, dtype="float16"),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)


def random_cache(layout: KvLayout, num_pages: int, seed: int, device: torch.device = CPU) -> KvCache:
    cache = KvCache(layout, num_pages, device)
    generator = torch.Generator().manual_seed(seed)
    for layer in cache.layers:
        layer.copy_(torch.randn(layer.shape, generator=generator))
    return cache


@layouts
def test_shape_and_size(layout: KvLayout) -> None:
    cache = KvCache(layout, 5, CPU)
    expected = (layout.planes, 5, layout.heads_per_rank, layout.page_size, layout.head_dim)
    assert [tuple(layer.shape) for layer in cache.layers] == [expected] * layout.num_layers
    assert sum(layer.nbytes for layer in cache.layers) == 5 * layout.bytes_per_page
    assert all(not layer.any() for layer in cache.layers)
    assert pages_for_budget(layout, 5 * layout.bytes_per_page) == 5
    assert pages_for_budget(layout, 5 * layout.bytes_per_page - 1) == 4


@layouts
def test_copy_pages_copies_them_and_nothing_else(layout: KvLayout) -> None:
    cache = random_cache(layout, 9, seed=1)
    before = [layer.clone() for layer in cache.layers]
    cache.copy_pages([])
    cache.copy_pages([(0, 3), (7, 1), (0, 8)])
    for layer, old in zip(cache.layers, before, strict=True):
        expected = old[:, [0, 7, 2, 0, 4, 5, 6, 7, 0]]
        assert torch.equal(layer, expected)


def check_host_tier(layout: KvLayout, seed: int, device: torch.device) -> None:
    """Random moves against a plain model: what lies at each place, and what each page holds."""
    rng, cache = random.Random(seed), random_cache(layout, 12, seed, device)
    tier, places = HostTier(cache), dict[int, list[torch.Tensor]]()
    expected = [layer.clone() for layer in cache.layers]
    for _ in range(12):
        saves = [(rng.randrange(12), rng.randrange(40)) for _ in range(rng.randint(0, 5))]
        known = sorted({*places, *(place for _, place in saves)})
        pages = rng.sample(range(12), rng.randint(0, min(5, len(known))))
        loads = [(rng.choice(known), page) for page in pages]
        for page, place in saves:
            places[place] = [layer[:, page].clone() for layer in expected]
        for place, page in loads:
            for layer, copy in zip(expected, places[place], strict=True):
                layer[:, page] = copy
        tier.move(saves, loads)
        overwritten = rng.randrange(12)  # at once: what was saved must have been read
        for layer, other in zip(cache.layers, expected, strict=True):
            layer[:, overwritten] += 1
            other[:, overwritten] += 1
    for layer, other in zip(cache.layers, expected, strict=True):
        assert torch.equal(layer, other)


@layouts
@pytest.mark.parametrize("seed", range(10))
def test_pages_go_to_the_host_and_come_back(layout: KvLayout, seed: int) -> None:
    check_host_tier(layout, seed, CPU)


@pytest.mark.gpu
@layouts
@pytest.mark.parametrize("seed", range(10))
def test_pages_go_to_the_host_and_come_back_on_a_gpu(layout: KvLayout, seed: int) -> None:
    check_host_tier(layout, seed, torch.device("cuda"))


def test_host_memory_is_taken_as_places_are_used() -> None:
    layout = replace(LAYOUTS[0], page_size=1 << 12)
    cache = KvCache(layout, 3, CPU)
    tier = HostTier(cache)
    assert tier._chunks == {}
    tier.move([(0, 10**9)], ())
    assert sum(chunk.nbytes for chunk in tier._chunks.values()) <= max(CHUNK_BYTES, layout.bytes_per_page)


def test_a_cache_has_pages() -> None:
    with pytest.raises(ValueError, match="num_pages"):
        KvCache(LAYOUTS[0], 0, CPU)
