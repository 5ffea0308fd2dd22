"""Fake engines in a thread of their own, for tests and benchmarks: they can be killed and started anew."""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Sequence

import zmq

from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.messages import Member, SampleToken
from splitserve.router.fake_engine import IDLE_S, PROMPT, Behaviour, FakeEngine, Role


class FakeCluster:
    """Fake engines, as a context manager. `members` is what a router is told.

    `on_step(tokens)` sees all tokens just before they are sent, in that thread.
    """

    def __init__(
        self,
        prefills: int = 1,
        decodes: int = 1,
        behaviour: Behaviour = PROMPT,
        *,
        colocated: bool = False,
        keys: CurveKeys | None = None,
        on_step: Callable[[Sequence[SampleToken]], None] = lambda tokens: None,
    ) -> None:
        self.behaviour = behaviour
        self.on_step = on_step
        self.engines: dict[str, FakeEngine] = {}
        self._keys = keys
        self._incarnations = itertools.count(1)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_ids = itertools.count()
        self._stopping = False
        for index in range(0 if colocated else prefills):
            self._start("prefill", index, "prefill")
        for index in range(decodes):
            self._start("decode", index, "colocated" if colocated else "decode")
        self._thread = threading.Thread(target=self._run, name="fake-engines", daemon=True)

    def __enter__(self) -> FakeCluster:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopping = True
        self._thread.join()
        for engine in self.engines.values():
            engine.close()

    @property
    def members(self) -> list[Member]:
        return [engine.member for engine in self.engines.values()]

    def kill(self, name: str) -> None:
        """End an engine without a word."""
        self._do(lambda: self.engines.pop(name).close())

    def restart(self, name: str) -> None:
        """Replace an engine by a new incarnation, which knows of no request."""
        pool, index, _ = name.split("/")

        def replace() -> None:
            old = self.engines.pop(name)
            old.close()
            self._start(pool, int(index), old.member.role)

        self._do(replace)

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` in the engines' thread; for engines only."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._timer_ids), action))

    def join(self, decode: str, key: tuple[str, int]) -> None:
        """Move a request's KV to engine `decode`; for engines only."""
        if decode in self.engines:
            self.engines[decode].join(key)

    def _start(self, pool: str, index: int, role: Role) -> None:
        name = f"{pool}/{index}/0"
        self.engines[name] = FakeEngine(name, role, str(next(self._incarnations)), self, self._keys)

    def _do(self, action: Callable[[], object]) -> None:
        """Run `action` in the engines' thread and wait for it."""
        done = threading.Event()

        def command() -> None:
            action()
            done.set()

        self._commands.put(command)
        if not done.wait(5.0):
            raise RuntimeError("the fake engines' thread does not answer")

    def _run(self) -> None:
        while not self._stopping:
            while not self._commands.empty():
                self._commands.get()()
            engines = list(self.engines.values())
            for engine in engines:
                engine.receive()
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()
            due = min([engine.step(time.monotonic()) for engine in engines] + [timer[0] for timer in self._timers[:1]])
            self._wait(engines, due - time.monotonic())

    def _wait(self, engines: Sequence[FakeEngine], seconds: float) -> None:
        poller = zmq.Poller()
        for engine in engines:
            poller.register(engine.channel.socket, zmq.POLLIN)
        poller.poll(int(min(max(seconds, 0.0), IDLE_S) * 1000))
