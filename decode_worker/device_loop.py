"""One rank's device-resident decode loop: numbered steps in, their results one step later.

    host      launch n+1 | read n   | launch n+2 | read n+1 |
    device    ---- step n ----|---- step n+1 ----|---- step n+2 ----

A launch copies the step's update record to the device, applies it, replays the graph and copies the results into a
pinned ring, all on one stream and without waiting. So the record of step n takes effect before step n and after step
n - 1, and a page that a record takes away is written by nobody behind it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from splitserve.cluster.channel import Pollable
from splitserve.cluster.codec import message
from splitserve.cluster.errors import ProtocolError
from splitserve.cluster.units import format_bytes
from splitserve.decode_worker.graph import DecodeGraph
from splitserve.engine.kv_cache import KvCache
from splitserve.engine.ranks import Handlers
from splitserve.engine.slot_state import SlotLayout, SlotState, SlotUpdates
from splitserve.kernels.sampling_scratch import new_sampler_scratch
from splitserve.models.config import ModelConfig
from splitserve.models.decoder import Decoder

log = logging.getLogger(__name__)

RING = 4  # more than the two steps that can be under way


@message
@dataclass(frozen=True)
class LaunchStep:
    """Apply `updates`, then run step number `step` on the graph of `capacity` rows. The result is a `PendingStep`.

    `top`: whether somebody wants the likeliest tokens besides the chosen ones.
    """

    step: int
    capacity: int
    updates: SlotUpdates
    top: bool


@dataclass(frozen=True, slots=True)
class RowResult:
    """What came in a slot; `top` are the likeliest tokens with their log probabilities, the likeliest first."""

    slot: int
    token_id: int
    finite: bool
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class StepTime:
    """Seconds: what a launch took the host, what the step took the device, and how long that had idled before."""

    host: float
    device: float
    idle: float


class _Clock:
    """The device's time, where there is a device."""

    def __init__(self, device: torch.device) -> None:
        timed = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._event: torch.cuda.Event | None = timed

    def record(self) -> None:
        if self._event is not None:
            self._event.record()

    @property
    def passed(self) -> bool:
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def since(self, other: _Clock) -> float:
        """Seconds from when the device passed `other` to when it passed this."""
        if self._event is None or other._event is None:
            return 0.0
        return float(other._event.elapsed_time(self._event)) / 1e3


class _ResultBuffer:
    """Host memory for the results of one step, and when it began and ended."""

    def __init__(self, graph: DecodeGraph) -> None:
        self._on_device = (graph.results, graph.sampled.top_ids, graph.sampled.top_logprobs)
        device = graph.results.device
        self.on_host = [
            torch.empty(each.shape, dtype=each.dtype, pin_memory=device.type == "cuda") for each in self._on_device
        ]
        self.begun, self.done = _Clock(device), _Clock(device)

    def copy(self, top: bool) -> None:
        for device, host in list(zip(self._on_device, self.on_host, strict=True))[: None if top else 1]:
            host.copy_(device, non_blocking=True)
        self.done.record()


class PendingStep:
    """A step under way. To be read before three more are launched."""

    def __init__(self, buffer: _ResultBuffer, top: bool, note: Callable[[], None]) -> None:
        self._buffer, self._top, self._note = buffer, top, note

    @property
    def ready(self) -> bool:
        """Whether the device is done with it."""
        return self._buffer.done.passed

    def wait(self) -> list[RowResult]:
        """The results of the rows that ran, once the device is done."""
        self._buffer.done.wait()
        self._note()
        results, top_ids, top_logprobs = (each.numpy() for each in self._buffer.on_host)
        live = int((results[:, 0] >= 0).sum())
        logprobs = results[:live, 3].view(np.float32).tolist()
        tops: list[tuple[tuple[int, float], ...]] = [()] * live
        if self._top:
            pairs = zip(top_ids[:live].tolist(), top_logprobs[:live].tolist(), strict=True)
            tops = [tuple(zip(ids, values, strict=True)) for ids, values in pairs]
        rows = zip(results[:live, :3].tolist(), logprobs, tops, strict=True)
        return [RowResult(slot, token, bool(finite), logprob, top) for (slot, token, finite), logprob, top in rows]


class DecodeLoop:
    """A rank service. Captures a graph for each of `capacities`, the last of which is the number of slots."""

    sockets: ClassVar[list[Pollable]] = []
    busy: ClassVar[bool] = False  # its engine waits for steps itself

    def __init__(
        self, model: Decoder, config: ModelConfig, cache: KvCache, capacities: Sequence[int], context: int
    ) -> None:
        device, page_size = cache.layers[0].device, cache.layout.page_size
        began, free = time.monotonic(), _free_memory(device)
        self.layout, self.cache = slot_layout(config, capacities, context, page_size), cache
        self._state = SlotState(self.layout, device)
        # Pages that slots share count for each of them: twice the cache is more than any load has asked for.
        max_tokens = 2 * cache.num_pages * page_size + context
        pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
        scratch = new_sampler_scratch(self.layout.slots, config.vocab_size, device)
        largest_first = sorted(capacities, reverse=True)
        self._graphs = {
            capacity: DecodeGraph(model, config, cache, self._state, capacity, max_tokens, scratch, pool)
            for capacity in largest_first
        }
        self._ring = {capacity: [_ResultBuffer(graph) for _ in range(RING)] for capacity, graph in self._graphs.items()}
        self._last: _ResultBuffer | None = None
        self.times: deque[StepTime] = deque(maxlen=1024)
        self.next_step = 0
        self.handlers: Handlers = {LaunchStep: self.launch}
        self.capture_s, self.memory_bytes = time.monotonic() - began, free - _free_memory(device)
        log.info(
            "captured decode graphs of %s rows in %.1f s, %s",
            capacities,
            self.capture_s,
            format_bytes(self.memory_bytes),
        )

    def poll(self) -> list[object]:
        return []

    def graph(self, rows: int) -> DecodeGraph:
        """The smallest graph that holds `rows` rows."""
        return self._graphs[min(capacity for capacity in self._graphs if capacity >= rows)]

    @torch.inference_mode()
    def launch(self, command: LaunchStep) -> PendingStep:
        """Enqueue a step. Raises ProtocolError when it is not the next one."""
        if command.step != self.next_step:
            raise ProtocolError(f"step {command.step} came where {self.next_step} was due")
        self.next_step += 1
        began = time.perf_counter()
        buffer, last = self._ring[command.capacity][command.step % RING], self._last
        buffer.begun.record()
        self._state.apply(command.updates)
        self._graphs[command.capacity].replay()
        buffer.copy(command.top)
        self._last, host_s = buffer, time.perf_counter() - began

        def note() -> None:
            idle = buffer.begun.since(last.done) if last else 0.0
            self.times.append(StepTime(host_s, buffer.done.since(buffer.begun), idle))

        return PendingStep(buffer, command.top, note)


def slot_layout(config: ModelConfig, capacities: Sequence[int], context: int, page_size: int) -> SlotLayout:
    """The slot state of every rank of an engine."""
    return SlotLayout(max(capacities), -(-context // page_size), config.vocab_size)


def _free_memory(device: torch.device) -> int:
    """What is free once torch has given back what it only keeps."""
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]
