"""KV between GPUs' pages: copies that are under way, and staging that another process writes into."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection

import pytest
import torch

from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.layout import KvLayout
from splitserve.engine.kv_cache import KvCache
from splitserve.kernels.kv_pack import KvRegion
from splitserve.kv_transfer import device_mover
from splitserve.kv_transfer.checksum import weighted_sum
from splitserve.kv_transfer.cuda_ipc import CudaMapping, CudaSegment
from splitserve.kv_transfer.device_mover import DeviceMove, DeviceMover
from splitserve.kv_transfer.mover import HostMover

pytestmark = pytest.mark.gpu

LAYOUT = KvLayout(1, 4, 1, 1, 576, 64, "bfloat16")
REGION = KvRegion((1, 4), (0, 1), (70, 500))
PAGES = [5, 0, 11, 7, 2, 9, 1, 3]
SIZE = REGION.rows(1) * 576 * 2


def filled_cache(seed: int, device: str = "cuda") -> KvCache:
    cache = KvCache(LAYOUT, 12, torch.device(device))
    for number, layer in enumerate(cache.layers):
        layer.copy_(torch.randn(layer.shape, generator=torch.Generator().manual_seed(seed * 10 + number)))
    return cache


def expected_payload(seed: int) -> tuple[torch.Tensor, int]:
    host, payload = HostMover(filled_cache(seed, "cpu")), torch.empty(SIZE, dtype=torch.uint8)
    return payload, host.pack(host.table(PAGES, 500), REGION, payload).total()


def total_of(mover: DeviceMover, move: DeviceMove) -> int:
    mover.launch()
    deadline = time.monotonic() + 20
    while (total := move.total()) is None:
        assert time.monotonic() < deadline
    return total


@pytest.mark.parametrize("where", ["cpu", "pinned", "cuda"])
def test_payloads_are_those_of_the_host(where: str) -> None:
    payload, expected = expected_payload(1)
    mover = DeviceMover(filled_cache(1))
    with torch.inference_mode():  # as a payload is that is made between two layers of a model
        device = "cuda" if where == "cuda" else "cpu"
        found = torch.empty(SIZE, dtype=torch.uint8, device=device, pin_memory=where == "pinned")
    assert total_of(mover, mover.pack(mover.table(PAGES, 500), REGION, found)) == expected
    assert torch.equal(found.cpu(), payload)

    target = DeviceMover(filled_cache(2))
    assert (
        total_of(target, target.unpack(target.table(PAGES, 500), REGION, payload.to(device), target.mark())) == expected
    )
    back = torch.empty(SIZE, dtype=torch.uint8)
    assert total_of(target, target.pack(target.table(PAGES, 500), REGION, back)) == expected
    for left, right in zip(target.cache.layers, filled_cache(2).layers, strict=True):
        untouched = [page for page in range(12) if page not in PAGES]
        assert torch.equal(left[:, untouched], right[:, untouched])


def test_payloads_pass_through_memory_that_others_had_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_mover, "BOUNCE_BYTES", SIZE * 5 // 2)
    monkeypatch.setattr(device_mover, "BATCH_BYTES", SIZE * 5 // 16)
    source, target = DeviceMover(filled_cache(1)), DeviceMover(filled_cache(2))
    table, filled = source.table(PAGES, 500), target.table(PAGES, 500)
    regions = [KvRegion((0, 4), (0, 1), (start, min(start + 7 + start % 90, 500))) for start in range(0, 500, 5)]
    payloads = [torch.empty(region.rows(1) * 576 * 2, dtype=torch.uint8, pin_memory=True) for region in regions]
    packs = [source.pack(table, region, payload) for region, payload in zip(regions, payloads, strict=True)]
    totals = [total_of(source, move) for move in packs]
    unpacks = [target.unpack(filled, region, payload, None) for region, payload in zip(regions, payloads, strict=True)]
    assert [total_of(target, move) for move in unpacks] == totals
    whole = KvRegion((0, 4), (0, 1), (0, 500))
    there, here = (torch.empty(whole.rows(1) * 576 * 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    total_of(source, source.pack(table, whole, there)), total_of(target, target.pack(filled, whole, here))
    assert torch.equal(there, here)


@pytest.mark.parametrize("where", ["pinned", "cuda"])
def test_small_copies_end_together_and_each_has_its_own_sum(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_mover, "ROWS", 2)
    batches: list[int] = []
    launch = device_mover._Batch.launch

    def counted(batch: device_mover._Batch, *streams: torch.cuda.Stream) -> None:
        batches.append(len(batch.moves))
        launch(batch, *streams)

    monkeypatch.setattr(device_mover._Batch, "launch", counted)
    source, target = DeviceMover(filled_cache(1)), DeviceMover(filled_cache(2))
    tables = [(source.table([page], 64), target.table([page], 64)) for page in range(12)]
    region, device = KvRegion((0, 4), (0, 1), (0, 64)), "cuda" if where == "cuda" else "cpu"
    size = region.rows(1) * 576 * 2
    for _ in range(3):  # words are taken again
        payloads = [torch.empty(size, dtype=torch.uint8, device=device, pin_memory=where == "pinned") for _ in tables]
        packs = [source.pack(table, region, payload) for (table, _), payload in zip(tables, payloads, strict=True)]
        assert not any(move.total() for move in packs), "none is told of yet"
        totals = [total_of(source, move) for move in packs]
        assert totals == [weighted_sum(payload.cpu()) for payload in payloads]
        pairs = zip(tables, payloads, strict=True)
        unpacks = [target.unpack(table, region, payload, target.mark()) for (_, table), payload in pairs]
        assert [total_of(target, move) for move in unpacks] == totals
    assert batches == [12] * 6
    for left, right in zip(source.cache.layers, target.cache.layers, strict=True):
        assert torch.equal(left, right)


def test_marks_pass_in_time_and_the_engine_waits_for_settled_copies() -> None:
    mover, payload = DeviceMover(filled_cache(1)), torch.empty(SIZE, dtype=torch.uint8, device="cuda")
    table, (_, other), source = mover.table(PAGES, 500), expected_payload(3), filled_cache(3)
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    for layer, values in zip(mover.cache.layers, source.layers, strict=True):
        layer.copy_(values)
    mark = mover.mark()
    assert not mover.passed(mark)
    torch.cuda.synchronize()
    assert mover.passed(mark)
    move = mover.pack(table, REGION, payload)
    mover.launch()
    move.settle()
    mover.cache.layers[1].zero_()
    assert total_of(mover, move) == other


def test_a_table_may_be_newer_than_the_mark_that_it_is_used_with() -> None:
    """A transfer may begin when its KV is written already, and other work is queued."""
    payload, expected = expected_payload(1)
    mover = DeviceMover(filled_cache(1))
    mark = mover.mark()
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    table = mover.table(PAGES, 500)
    while not mover.passed(mark):
        pass
    found = torch.empty(SIZE, dtype=torch.uint8, device="cuda")
    move = mover.pack(table, REGION, found)
    assert total_of(mover, move) == expected
    assert not torch.cuda.current_stream().query(), "it waited for all that was queued"
    torch.cuda.synchronize()
    assert torch.equal(found.cpu(), payload)


def test_what_comes_in_waits_for_its_mark() -> None:
    mover, (payload, expected) = DeviceMover(filled_cache(1)), expected_payload(3)
    table, packed = mover.table(PAGES, 500), payload.cuda()
    torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
    mover.cache.layers[1].zero_()
    move = mover.unpack(table, REGION, packed, mover.mark())
    mover.launch()
    assert move.total() is None
    assert total_of(mover, move) == expected
    back = torch.empty_like(packed)
    assert total_of(mover, mover.pack(table, REGION, back)) == expected


def fill(connection: Connection, name: str, device: str) -> None:
    mapping = CudaMapping(name, torch.device(device))
    mover = DeviceMover(filled_cache(4, device))
    total = total_of(mover, mover.pack(mover.table(PAGES, 500), REGION, mapping.bytes[4096 : 4096 + SIZE]))
    connection.send((mapping.bytes.numel(), total))
    connection.recv()
    mapping.close()


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_another_process_writes_into_the_segment(device: str) -> None:
    if int(device[-1]) >= torch.cuda.device_count():
        pytest.skip("one GPU only")
    payload, expected = expected_payload(4)
    segment = CudaSegment(1 << 22, torch.device("cuda:0"))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=fill, args=(theirs, segment.name, device))
    process.start()
    size, total = ours.recv()
    assert size >= 1 << 22
    assert total == expected
    assert torch.equal(segment.bytes[4096 : 4096 + SIZE].cpu(), payload)
    ours.send("done")
    process.join(20)
    assert process.exitcode == 0
    free = torch.cuda.mem_get_info()[0]
    segment.close()
    assert torch.cuda.mem_get_info()[0] - free >= 1 << 22


@pytest.mark.parametrize("name", ["splitserve-x-1-00000000", f"cuda-{'0' * 128}", "cuda-12"])
def test_a_segment_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(TransferFailed, match="segment: "):
        CudaMapping(name, torch.device("cuda"))
