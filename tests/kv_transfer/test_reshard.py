from __future__ import annotations

from collections import Counter
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.layout import KvLayout
from splitserve.kernels.kv_pack import KvRegion
from splitserve.kv_transfer.checksum import weighted_sum
from splitserve.kv_transfer.mover import HostMover
from splitserve.kv_transfer.packing import bytes_per_layer_token
from splitserve.kv_transfer.reshard import Piece, reshard
from tests.kv_transfer.ranks import (
    assert_same,
    dense_kv,
    expected_cache,
    layout,
    poisoned_cache,
    shuffled_pages,
    write,
)

NUM_PAGES = 24


@st.composite
def layout_pairs(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    planes: Literal[1, 2] = draw(st.sampled_from([1, 2]))
    heads = draw(st.sampled_from([1, 2, 3, 4, 6]))
    degrees = [tp for tp in range(1, 9) if planes == 1 or heads % tp == 0 or tp % heads == 0]
    return tuple(  # type: ignore[return-value]
        layout(
            draw(st.sampled_from(degrees)),
            heads=heads,
            planes=planes,
            page_size=draw(st.sampled_from([1, 2, 3, 4, 8])),
            layers=2,
        )
        for _ in range(2)
    )


@settings(max_examples=150, deadline=None)
@given(layouts=layout_pairs(), start=st.integers(0, 20), length=st.integers(0, 20), seed=st.integers(0, 99))
def test_pieces_rebuild_every_target_exactly_once(
    layouts: tuple[KvLayout, KvLayout], start: int, length: int, seed: int
) -> None:
    source, target = layouts
    stop = start + length
    dense = dense_kv(source, stop)
    num_pages = max(NUM_PAGES, stop)
    source_pages = shuffled_pages(source, stop, num_pages, seed)
    target_pages = shuffled_pages(target, stop, num_pages, seed + 1)
    caches = [poisoned_cache(source, num_pages) for _ in range(source.tp)]
    for rank, cache in enumerate(caches):
        write(cache, rank, source_pages, dense, range(stop))
    results = [poisoned_cache(target, num_pages) for _ in range(target.tp)]

    plan = reshard(source, target, start, stop)
    for piece in plan:
        payload = torch.empty(piece_bytes(source, piece), dtype=torch.uint8)
        tokens, layers = (piece.start_token, piece.stop_token), (0, source.num_layers)
        cache, result = caches[piece.source_rank], results[piece.target_rank]
        leaving = KvRegion(layers, piece.source_heads, tokens)
        arriving = KvRegion(layers, piece.target_heads, tokens)
        sender, receiver = HostMover(cache), HostMover(result)
        packed = sender.pack(sender.table(source_pages, stop), leaving, payload)
        unpacked = receiver.unpack(receiver.table(target_pages, stop), arriving, payload, None)
        assert packed == unpacked

    for rank, result in enumerate(results):
        assert_same(result, expected_cache(target, rank, num_pages, target_pages, dense, range(start, stop)))
    written = Counter(
        (piece.target_rank, head, token)
        for piece in plan
        for head in range(*piece.target_heads)
        for token in range(piece.start_token, piece.stop_token)
    )
    assert len(written) == target.tp * target.heads_per_rank * length
    assert set(written.values()) <= {1}
    assert len({(piece.source_rank, piece.target_rank) for piece in plan}) == len(plan)


def piece_bytes(source: KvLayout, piece: Piece) -> int:
    tokens = piece.stop_token - piece.start_token
    return bytes_per_layer_token(source, piece.source_heads) * tokens * source.num_layers


def test_replicas_share_the_work() -> None:
    plan = reshard(layout(8, heads=2), layout(8, heads=2), 0, 10)
    assert Counter(piece.source_rank for piece in plan) == dict.fromkeys(range(8), 1)


def test_one_latent_is_sent_by_all_source_ranks() -> None:
    plan = reshard(layout(4, planes=1), layout(2, planes=1), 3, 13)
    assert [(p.source_rank, p.start_token, p.stop_token) for p in plan if p.target_rank == 1] == [
        (0, 3, 6),
        (1, 6, 9),
        (2, 9, 12),
        (3, 12, 13),
    ]


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "planes"])
def test_layouts_of_different_models_are_refused(field: str) -> None:
    other = {
        "num_layers": layout(layers=5),
        "num_kv_heads": layout(heads=8),
        "planes": layout(planes=1),
    }[field]
    with pytest.raises(TransferFailed, match=f"KvLayout.{field}: the source has"):
        reshard(layout(), other, 0, 4)


def test_a_range_that_is_none_is_refused() -> None:
    with pytest.raises(TransferFailed, match=r"tokens: found \[5, 4\)"):
        reshard(layout(), layout(), 5, 4)


@pytest.mark.parametrize(
    ("pages", "match"), [([0, 1], "need 3"), ([0, 1, 1], "repeat"), ([0, 1, 99], "outside"), ([0, 1, -1], "outside")]
)
def test_pages_that_cannot_be_right_are_refused(pages: list[int], match: str) -> None:
    with pytest.raises(TransferFailed, match=match):
        HostMover(poisoned_cache(layout(), 8)).table(pages, 9)


def test_bfloat16_travels_bit_for_bit() -> None:
    of = KvLayout(tp=1, num_layers=1, planes=2, num_kv_heads=1, head_dim=4, page_size=2, dtype="bfloat16")
    source, target = poisoned_cache(of, 4), poisoned_cache(of, 4)
    source.layers[0].view(torch.int16).copy_(torch.arange(source.layers[0].numel()).view_as(source.layers[0]) * 997)
    payload = torch.empty(2 * 4 * 4 * 2, dtype=torch.uint8)
    sender, receiver, region = HostMover(source), HostMover(target), KvRegion((0, 1), (0, 1), (0, 4))
    sender.pack(sender.table([3, 1], 4), region, payload)
    receiver.unpack(receiver.table([0, 2], 4), region, payload, None)
    for source_page, target_page in ((3, 0), (1, 2)):
        left, right = source.layers[0][:, source_page], target.layers[0][:, target_page]
        assert torch.equal(left.view(torch.int16), right.view(torch.int16))


def test_the_sum_is_of_what_the_pages_hold_whoever_else_writes_the_payload(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that was given up for dead may wake up and write into shared memory that another one has by now."""
    with torch.inference_mode():  # as where a segment is attached while a model runs
        payload = torch.empty(4 * layout().bytes_per_token, dtype=torch.uint8)
    mover, region = HostMover(poisoned_cache(layout(), 4)), KvRegion((0, layout().num_layers), (0, 4), (0, 4))
    undisturbed = mover.pack(mover.table([3, 1], 4), region, payload)
    assert undisturbed.total() == weighted_sum(payload)

    def late_write(packed: torch.Tensor) -> int:
        payload.numpy().fill(0x55)
        return weighted_sum(packed)

    monkeypatch.setattr("splitserve.kv_transfer.mover.weighted_sum", late_write)
    assert mover.pack(mover.table([3, 1], 4), region, payload) == undisturbed


def test_heads_that_fill_no_whole_words_are_refused() -> None:
    of = KvLayout(tp=1, num_layers=1, planes=2, num_kv_heads=1, head_dim=3, page_size=2, dtype="float32")
    with pytest.raises(TransferFailed, match=r"KvLayout\.head_dim: found 3 of float32"):
        bytes_per_layer_token(of, (0, 1))
