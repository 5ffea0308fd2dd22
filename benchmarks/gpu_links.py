"""What a link between two GPUs takes, by its channels: memory, time to set up, and speed of the prefill beside it.

The sender's GPU computes prompts of 2048 tokens of DeepSeek-V2-Lite's shapes: quiet, while it sends their KV as fast as
it makes it, and while it sends all that the link carries. The copy engines, which carry KV within a host, come last.

    python -m benchmarks.gpu_links
"""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Barrier, Event

import torch

from benchmarks.gpu_prefill import RUNS, batch, load
from benchmarks.rows import Figure, Row, write
from splitserve.engine.group import host_store, join_store
from splitserve.kv_transfer.cuda_driver import copy_async
from splitserve.kv_transfer.cuda_ipc import CudaMapping, CudaSegment
from splitserve.kv_transfer.links import Pair
from splitserve.kv_transfer.nccl import RECEIVER, SENDER, meet
from splitserve.models.resolve import load_model_config

CHANNELS = (1, 2, 4, 8, 16, 32)
PAYLOAD_BYTES, AHEAD = 64 << 20, 16
PROMPT_TOKENS, PROMPTS, ALONE_S = 2048, 4, 0.5  # that graphs hold: the host has little to do for them
FIRST = "a process's first link"
STARTUP_S, POLL_S = 60.0, 0.0003
Carry = Callable[[torch.Tensor], Callable[[], bool]]  # begins to carry a payload; then tells whether it is across


def main() -> None:
    if torch.cuda.device_count() < 2:
        raise SystemExit("this benchmark needs two GPUs")
    context = multiprocessing.get_context("spawn")
    store, endpoint = host_store("127.0.0.1", STARTUP_S)
    barrier, done, segments = context.Barrier(2), context.Event(), context.SimpleQueue()
    ranks = [context.Process(target=run, args=(endpoint, barrier, done, segments)) for run in (send, receive)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    del store  # kept until here: its server ends with it


def send(endpoint: str, barrier: Barrier, done: Event, segments: SimpleQueue[str]) -> None:
    device = torch.device("cuda:0")
    torch.cuda.set_device(device)
    prefill = Prefill(device)
    linked(endpoint, FIRST, CHANNELS[0], SENDER, device, barrier)
    for channels in CHANNELS:
        case = f"link of {channels} channels"
        pair = linked(endpoint, case, channels, SENDER, device, barrier)
        prefill.beside(case, partial(by_link, pair))
        done.set()
        barrier.wait()
        done.clear()
        pair.abort()
    mapping, stream = CudaMapping(segments.get(), device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    prefill.beside("copy engines", partial(by_copy, mapping.bytes, stream))
    mapping.close()
    barrier.wait()


def receive(endpoint: str, barrier: Barrier, done: Event, segments: SimpleQueue[str]) -> None:
    device = torch.device("cuda:1")
    torch.cuda.set_device(device)
    segment = CudaSegment(PAYLOAD_BYTES, device)
    linked(endpoint, FIRST, CHANNELS[0], RECEIVER, device, barrier)
    for channels in CHANNELS:
        pair = linked(endpoint, f"link of {channels} channels", channels, RECEIVER, device, barrier)
        posted = deque([pair.receive(segment.bytes) for _ in range(2 * AHEAD)])
        while not done.is_set():
            if posted[0].is_completed():
                posted.popleft()
                posted.append(pair.receive(segment.bytes))
        pair.abort()
        barrier.wait()
    segments.put(segment.name)
    barrier.wait()
    segment.close()


def by_link(pair: Pair, payload: torch.Tensor) -> Callable[[], bool]:
    return pair.send(payload).is_completed


def by_copy(target: torch.Tensor, stream: torch.cuda.Stream, payload: torch.Tensor) -> Callable[[], bool]:
    copy_async(target.data_ptr(), payload.data_ptr(), payload.numel(), stream)
    across: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    across.record(stream)
    return across.query


def linked(endpoint: str, case: str, channels: int, rank: int, device: torch.device, barrier: Barrier) -> Pair:
    """This end of a new pair. The sender's writes rows of what it took."""
    barrier.wait()
    free, began = torch.cuda.mem_get_info(device)[0], time.perf_counter()
    pair = meet(join_store(endpoint, STARTUP_S), case, rank, device, channels)
    seconds = time.perf_counter() - began
    taken = (free - torch.cuda.mem_get_info(device)[0]) / 2**20
    if rank == SENDER:
        write(
            [
                Row("kv", f"v2lite, {case}", "set-up", "s", Figure.of([seconds]), "none", None, "lower"),
                Row("kv", f"v2lite, {case}", "memory", "MiB", Figure.of([taken]), "none", None, "lower"),
            ]
        )
    return pair


class Prefill:
    """One GPU's prefill, and how fast it is beside something else."""

    def __init__(self, device: torch.device) -> None:
        self._runner, self._batches = load(), [batch(PROMPT_TOKENS, 1) for _ in range(PROMPTS)]
        self._payload = torch.zeros(PAYLOAD_BYTES, dtype=torch.uint8, device=device)
        self._quiet = self._rate().value
        kv = load_model_config("deepseek-v2-lite").kv_layout(1, 64, "bfloat16")
        self._kv_bytes_per_s = self._quiet * kv.bytes_per_token

    def beside(self, case: str, carry: Carry) -> None:
        with Flow(carry, self._payload, 0.0) as flow:
            time.sleep(ALONE_S)
        alone = flow.rate / 1e9
        paces = {"its own KV": PAYLOAD_BYTES / self._kv_bytes_per_s, "all it can": 0.0}
        for pace, interval_s in paces.items():
            with Flow(carry, self._payload, interval_s) as flow:
                beside = self._rate()
            sent = Figure.of([flow.rate / 1e9])
            name = f"v2lite, {case}, prefill sends {pace}"
            write(
                [
                    Row("kv", name, "prefill", "tokens/s", beside, "quiet", self._quiet, "higher"),
                    Row("kv", name, "throughput", "GB/s", sent, "without prefill", alone, "higher"),
                ]
            )

    def _rate(self) -> Figure:
        """Looks now and then whether a run has ended: to wait for it would keep the interpreter from all else."""
        done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        rates = []
        for _ in range(RUNS):
            began = time.perf_counter()
            for each in self._batches:
                self._runner.run(each)
            done.record()
            while not done.query():  # type: ignore[no-untyped-call]
                time.sleep(POLL_S)
            rates.append(PROMPT_TOKENS * PROMPTS / (time.perf_counter() - began))
        return Figure.of(rates[2:])


class Flow:
    """Carries `payload` again and again, in a thread: one every `interval_s`, or AHEAD at once where that is 0."""

    def __init__(self, carry: Carry, payload: torch.Tensor, interval_s: float) -> None:
        self._carry, self._payload, self._interval_s = carry, payload, interval_s
        self._stop, self.rate = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        torch.cuda.set_device(self._payload.device)
        under_way: deque[Callable[[], bool]] = deque()
        began, begun, across = time.perf_counter(), 0, 0
        while not self._stop.is_set() or under_way:
            late = time.perf_counter() - began >= begun * self._interval_s
            if late and len(under_way) < AHEAD and not self._stop.is_set():
                under_way.append(self._carry(self._payload))
                begun += 1
            elif under_way and under_way[0]():
                under_way.popleft()
                across += 1
            else:
                time.sleep(POLL_S)
        self.rate = across * PAYLOAD_BYTES / (time.perf_counter() - began)


if __name__ == "__main__":
    main()
