"""KV pages on a device and in host memory."""

from __future__ import annotations

import random

import pytest
import torch

from splitserve.cluster.layout import KvLayout
from splitserve.engine.kv_cache import KvCache, pages_for_budget
from splitserve.engine.parking import HostTier

CPU = torch.device("cpu")
LAYOUTS = [
    KvLayout(tp=1, num_layers=3, planes=2, num_kv_heads=2, head_dim=4, page_size=8, dtype="float32"),
    KvLayout(tp=4, num_layers=2, planes=2, num_kv_heads=2, head_dim=8, page_size=4, dtype="bfloat16"),
    KvLayout(tp=2, num_layers=2, planes=1, num_kv_heads=1, head_dim=12, page_size=16, dtype="float16"),
]
layouts = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.dtype)


def random_cache(layout: KvLayout, num_pages: int, seed: int) -> KvCache:
    cache = KvCache(layout, num_pages, CPU)
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


@layouts
@pytest.mark.parametrize("seed", range(10))
def test_parked_pages_come_back_elsewhere(layout: KvLayout, seed: int) -> None:
    rng = random.Random(seed)
    cache = random_cache(layout, 12, seed)
    tier = HostTier(8 * layout.bytes_per_page)
    source, target = rng.sample(range(12), 5), rng.sample(range(12), 5)
    saved = [layer[:, source].clone() for layer in cache.layers]
    assert tier.park("a", cache, source)
    for layer in cache.layers:
        layer.zero_()
    untouched = [page for page in range(12) if page not in target]
    tier.restore("a", cache, target)
    for layer, expected in zip(cache.layers, saved, strict=True):
        assert torch.equal(layer[:, target], expected)
        assert not layer[:, untouched].any()
    assert tier.used_bytes == 0


@layouts
def test_the_budget_is_exact(layout: KvLayout) -> None:
    cache = random_cache(layout, 12, seed=2)
    tier = HostTier(5 * layout.bytes_per_page)
    assert tier.park("a", cache, [1, 2, 3])
    assert tier.used_bytes == 3 * layout.bytes_per_page
    assert not tier.park("b", cache, [4, 5, 6])
    assert tier.used_bytes == 3 * layout.bytes_per_page
    assert tier.park("b", cache, [4, 5])
    assert tier.used_bytes == 5 * layout.bytes_per_page
    tier.drop("a")
    assert tier.used_bytes == 2 * layout.bytes_per_page
    tier.restore("b", cache, [0, 1])
    assert tier.used_bytes == 0


def test_misuse_is_refused() -> None:
    cache = random_cache(LAYOUTS[0], 4, seed=3)
    tier = HostTier(4 * LAYOUTS[0].bytes_per_page)
    assert tier.park("a", cache, [0, 1])
    with pytest.raises(ValueError, match="'a' is parked already"):
        tier.park("a", cache, [2])
    with pytest.raises(ValueError, match="found 1; 'a' was parked with 2"):
        tier.restore("a", cache, [3])
    with pytest.raises(KeyError):
        tier.restore("b", cache, [0])
    with pytest.raises(KeyError):
        tier.drop("b")
    with pytest.raises(ValueError, match="num_pages"):
        KvCache(LAYOUTS[0], 0, CPU)
