from __future__ import annotations

import random

import pytest

from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.layout import KvLayout
from splitserve.cluster.messages import RankEndpoint, Ticket
from splitserve.kv_transfer.outgoing import Region, build_lanes, next_region
from splitserve.kv_transfer.staging import HOST_FRAMES, SLOTS, FrameSizes, Window, WindowAllocator, window_size
from tests.kv_transfer.ranks import layout

BIG = HOST_FRAMES.least


def test_a_frame_takes_all_layers_that_stand_alike_and_fit() -> None:
    assert next_region([0, 0, 0], [8, 8, 8], 4, 64, BIG) == Region((0, 2), (0, 8))
    assert next_region([8, 8, 0], [8, 8, 8], 4, 64, BIG) == Region((2, 3), (0, 8))


def test_a_long_chunk_is_cut_at_the_slot() -> None:
    assert next_region([0, 0], [100, 100], 4, 64, BIG) == Region((0, 1), (0, 15)), "in equal parts"


def test_a_long_prompt_fills_its_slots() -> None:
    cut, frames, ready, slot = [0] * 27, [], [32768] * 27, 64 << 20
    while region := next_region(cut, ready, 1152, slot, BIG):
        (first, last), (start, stop) = region.layers, region.tokens
        cut[first:last] = [stop] * (last - first)
        frames.append((last - first) * (stop - start) * 1152)
    assert len(frames) == 16
    assert min(frames) > 0.9 * slot


@pytest.mark.parametrize("tokens", [1500, 2048, 2049, 2051, 5000, 8191])
def test_a_prompt_takes_no_more_frames_than_its_window_has_slots(tokens: int) -> None:
    """Else the last one would wait until the receiver has taken the first."""
    lite, sizes = KvLayout(1, 27, 1, 1, 576, 64, "bfloat16"), FrameSizes(16 << 20, 64 << 20)
    endpoint = RankEndpoint("target/0", "memory", "host", "", 0, window_size(lite, tokens, 1, 256 << 20))
    (lane,) = build_lanes(Ticket("t/0", 1, lite, 0, tokens, 1.0, (endpoint,)), lite, 0, lambda target: sizes)
    assert lane.slot_bytes >= min(sizes.least, lite.bytes_per_token * tokens)
    while not lane.is_cut:
        assert lane.take([tokens] * 27) is not None
        lane.free_slots.pop()


def test_a_small_frame_waits_for_the_layer_that_comes_next() -> None:
    assert next_region([0, 0, 0], [8, 8, 0], 4, BIG, BIG) is None
    assert next_region([0, 0, 0], [8, 8, 8], 4, BIG, BIG) == Region((0, 3), (0, 8))


def test_a_big_frame_does_not_wait() -> None:
    assert next_region([0, 0], [8, 0], BIG // 8, 4 * BIG, BIG) == Region((0, 1), (0, 8))


def test_nothing_ready_is_nothing_to_send() -> None:
    assert next_region([4, 4], [4, 4], 4, 64, BIG) is None


@pytest.mark.parametrize("seed", range(100))
def test_cutting_covers_everything_once_and_never_stalls(seed: int) -> None:
    rng = random.Random(seed)
    layers, tokens, token_bytes = rng.randint(1, 6), rng.randint(1, 40), rng.choice([8, 100, BIG // 4])
    slot = token_bytes * rng.randint(1, 30)
    cut, ready, chunk = [0] * layers, [0] * layers, rng.randint(1, tokens)
    for stop in [*range(chunk, tokens, chunk), tokens]:
        for layer in range(layers):
            ready[layer] = stop
            while rng.random() < 0.7 and (region := next_region(cut, ready, token_bytes, slot, BIG)):
                (first, last), (start, end) = region.layers, region.tokens
                assert cut[first:last] == [start] * (last - first)
                assert start < end <= min(ready[first:last])
                assert (last - first) * (end - start) * token_bytes <= slot
                cut[first:last] = [end] * (last - first)
    while region := next_region(cut, ready, token_bytes, slot, BIG):
        cut[slice(*region.layers)] = [region.tokens[1]] * (region.layers[1] - region.layers[0])
    assert cut == [tokens] * layers


def ticket(window_bytes: int, endpoints: int = 1) -> Ticket:
    endpoint = RankEndpoint("target/0", "memory", "host", "", 0, window_bytes)
    return Ticket("t/0", 1, layout(1), 0, 8, 1.0, (endpoint,) * endpoints)


def test_a_window_without_room_for_a_token_is_refused() -> None:
    with pytest.raises(TransferFailed, match="share has 64 bytes; one token of a layer has 128"):
        build_lanes(ticket(64), layout(1), 0, lambda target: HOST_FRAMES)


def test_endpoints_must_match_the_layout() -> None:
    with pytest.raises(TransferFailed, match="endpoints: found 3"):
        build_lanes(ticket(4096, endpoints=3), layout(1), 0, lambda target: HOST_FRAMES)


@pytest.mark.parametrize("limit", [1, 1000, 1 << 20])
@pytest.mark.parametrize("source_tp", [1, 2, 4])
def test_a_window_of_the_advised_size_always_works(limit: int, source_tp: int) -> None:
    target, source = layout(1), layout(source_tp)
    size = window_size(target, 8, source_tp, limit)
    for rank in range(source_tp):
        (lane,) = build_lanes(ticket(size), source, rank, lambda target: FrameSizes(0, 4 << 20))
        assert lane.slot_bytes >= lane.token_bytes
        assert limit < 1 << 20 or len(lane.free_slots) >= SLOTS


@pytest.mark.parametrize(
    ("least", "most", "slots"),
    [(0, 1 << 20, 4), (512, 1 << 20, 4), (1500, 1 << 20, 2), (1 << 20, 1 << 20, 1), (0, 300, 12)],
)
def test_slots_follow_the_sizes_of_frames(least: int, most: int, slots: int) -> None:
    (lane,) = build_lanes(ticket(3072), layout(1), 0, lambda target: FrameSizes(least, most))
    assert len(lane.free_slots) == slots


@pytest.mark.parametrize("seed", range(30))
def test_windows_never_overlap_and_come_back(seed: int) -> None:
    rng, allocator = random.Random(seed), WindowAllocator(10_000)
    granted: list[Window] = []
    for _ in range(200):
        if granted and rng.random() < 0.5:
            allocator.release(granted.pop(rng.randrange(len(granted))))
        elif window := allocator.allocate(rng.randint(1, 3000)):
            assert window.end <= 10_000
            assert not any(window.overlaps(other) for other in granted)
            granted.append(window)
        assert allocator.granted_bytes == sum(window.size for window in granted)
    for window in granted:
        allocator.release(window)
    assert allocator.allocate(9_984) is not None
    with pytest.raises(ValueError, match="not granted"):
        allocator.release(Window(0, 64))
