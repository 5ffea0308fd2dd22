"""Requests that go on while a test changes the cluster under them, each compared with what it gets undisturbed."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Self

from splitserve.client import Client, Sampling, SplitserveClientError

STREAMS = 4
TIMEOUT_S = 90.0
PAUSE_S = 1.0  # of a client between two requests: workers that start, and commands, must get most of the two cores
PROMPTS = [random.Random(seed).choices(range(5, 200), k=20 + 9 * seed) for seed in range(4)]
KINDS: list[Sampling] = [{"max_tokens": 30}, {"max_tokens": 150}, {"max_tokens": 60, "temperature": 0.9, "seed": 3}]
CASES = [(prompt, Sampling(**kind, ignore_eos=True)) for prompt in PROMPTS for kind in KINDS]


class Load:
    """A context: STREAMS clients ask one request after another, of all routers in `endpoints`, until it ends.

    On the way out every request that was begun must have ended, with the tokens of an undisturbed one.
    """

    def __init__(self, endpoints: Sequence[str]) -> None:
        self._endpoints = endpoints
        with Client(endpoints) as client, ThreadPoolExecutor(len(CASES)) as pool:
            self._expected = list(pool.map(partial(self._answer, client), range(len(CASES))))
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(seed,), daemon=True) for seed in range(STREAMS)]
        self.faults: list[str] = []
        self.answers = 0
        self.placements: Counter[str] = Counter()

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.pass_by(STREAMS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(TIMEOUT_S + 10)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads)
            assert self.faults == []

    def pass_by(self, count: int = 2 * STREAMS) -> None:
        """Return when so many more requests have been answered."""
        goal, deadline = self.answers + count, time.monotonic() + TIMEOUT_S
        while self.answers < goal:
            assert not self.faults, self.faults
            assert time.monotonic() < deadline, f"{goal - self.answers} of {count} answers are missing"
            time.sleep(0.02)

    def _ask(self, seed: int) -> None:
        dice = random.Random(seed)
        with Client(self._endpoints) as client:
            while not self._over.is_set():
                case = dice.randrange(len(CASES))
                try:
                    if self._answer(client, case) != self._expected[case]:
                        self.faults.append(f"other tokens for case {case}")
                except SplitserveClientError as error:
                    self.faults.append(str(error))
                self.answers += 1
                self._over.wait(PAUSE_S)

    def _answer(self, client: Client, case: int) -> tuple[int, ...]:
        prompt, sampling = CASES[case]
        answer = client.generate(prompt, timeout_s=TIMEOUT_S, **sampling).result()
        return answer.samples[0].token_ids
