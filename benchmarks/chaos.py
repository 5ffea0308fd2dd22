"""Requests on a real CPU cluster while its workers die: how many are lost, and whether all answer what they would have.

    python -m benchmarks.chaos [PLAN ...] [--requests N] [--seed S]

A cluster of two routers, two prefill and two decode workers runs the tiny mixture of experts. Requests come one after
another, 16 at a time, greedy and sampled; in the middle of them the plan strikes, at a random moment. Each answer is
compared with what the same request gets undisturbed. The peer's figures are another system's, published, for 800
requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from benchmarks.gpu_serve import splitserve
from benchmarks.rows import Figure, Row, write
from splitserve.client import AsyncClient, SplitserveClientError

NAME, PORT = "bench-chaos", 50095
MODEL = Path(__file__).parent.parent / "examples" / "tiny_moe" / "model"
ROUTERS = [f"127.0.0.1:{PORT + index}" for index in range(2)]
AT_ONCE, TOKENS, TIMEOUT_S = 16, 48, 60.0
FREEZE_S = 6.0
PLANS: dict[str, dict[str, bool]] = {
    "a prefill killed": {"prefill/0/0": True},
    "a decode killed": {"decode/0/0": True},
    "both decodes killed": {f"decode/{index}/0": True for index in range(2)},
    "a prefill and a decode frozen": {"prefill/0/0": False, "decode/0/0": False},
    "a router killed": {"router/0": True},
    "all workers killed": {f"{pool}/{index}/0": True for pool in ("prefill", "decode") for index in range(2)},
}
PUBLISHED = {"a prefill killed": 2.0, "both decodes killed": 600.0, "a router killed": 136.0}


@dataclass
class Answer:
    """Tokens as they came, or the error. `arrivals` are seconds of `perf_counter`."""

    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    error: str = ""

    def gap_s(self, moment: float) -> float | None:
        """How long no token came around `moment`; None when it was not being answered then."""
        return next((after - before for before, after in pairwise(self.arrivals) if before <= moment < after), None)


@dataclass
class Strike:
    """Processes to kill (True) or to freeze for a while, `after` so many requests have come. `at`: when it was done."""

    targets: list[tuple[int, bool]]
    after: int
    pause_s: float
    at: float = 0.0

    async def come(self) -> None:
        await asyncio.sleep(self.pause_s)
        self.at = time.perf_counter()
        for pid, kill in self.targets:
            os.kill(pid, signal.SIGKILL if kill else signal.SIGSTOP)
        asyncio.get_running_loop().call_later(FREEZE_S, self._thaw)

    def _thaw(self) -> None:
        for pid, kill in self.targets:
            if not kill:
                os.kill(pid, signal.SIGCONT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", metavar="PLAN", help=f"of {', '.join(PLANS)} (default: all)")
    parser.add_argument("--requests", type=int, default=800, help="of each plan (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and moments")
    options = parser.parse_args()
    plans = options.plans or list(PLANS)
    if not set(plans) <= set(PLANS):
        parser.error(f"plans: found {', '.join(plans)}; expected some of {', '.join(PLANS)}")
    failed = False
    with cluster():
        expected = asyncio.run(ask_all(options.requests, options.seed))
        assert not any(answer.error for answer in expected)
        for number, plan in enumerate(plans):
            strike = new_strike(plan, options.requests, random.Random(f"{options.seed}, plan {number}"))
            answers = asyncio.run(ask_all(options.requests, options.seed, strike))
            failed |= report(plan, strike, answers, expected)
            wait_until_ready()
    raise SystemExit(failed)


@contextmanager
def cluster() -> Iterator[None]:
    settings = {
        "name": NAME,
        "model": {"path": str(MODEL), "name": "tiny-moe", "context": 512},
        "router": {"grpc": ROUTERS[0], "replicas": 2, "worker_timeout_s": 2.0},
        "prefill": {"replicas": 2, "kv_memory": "32MiB"},
        "decode": {"replicas": 2, "kv_memory": "32MiB"},
        "kv_transfer": {"lease_s": 3.0, "staging": "16MiB"},
    }
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "topology.yaml"
        file.write_text(yaml.safe_dump(settings))
        splitserve("up", str(file))
    try:
        yield
    finally:
        splitserve("down", NAME)


def new_strike(plan: str, requests: int, dice: random.Random) -> Strike:
    """When about half of the requests have come, at a random moment of some request."""
    found = units()
    targets = [(found[name]["workers"][0]["pid"], kill) for name, kill in PLANS[plan].items()]
    return Strike(targets, requests // 2 + dice.randrange(AT_ONCE), dice.uniform(0.0, 0.1))


async def ask_all(requests: int, seed: int, strike: Strike | None = None) -> list[Answer]:
    answers = [Answer() for _ in range(requests)]
    numbers = iter(range(requests))

    async def take_turns(client: AsyncClient) -> None:
        for number in numbers:
            if strike is not None and number == strike.after:
                await strike.come()
            await ask(client, number, seed, answers[number])

    async with AsyncClient(ROUTERS) as client, asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(take_turns(client))
    return answers


async def ask(client: AsyncClient, number: int, seed: int, answer: Answer) -> None:
    dice = random.Random(f"{seed}/{number}")
    prompt = dice.choices(range(3, 1000), k=dice.randint(4, 100))
    stream = client.generate(
        prompt,
        max_tokens=TOKENS,
        ignore_eos=True,
        temperature=dice.choice([0.0, 0.8]),
        seed=number,
        timeout_s=TIMEOUT_S,
    )
    try:
        async for delta in stream:
            answer.tokens += delta.token_ids
            answer.arrivals.append(time.perf_counter())
    except SplitserveClientError as error:
        answer.error = str(error)


def report(plan: str, strike: Strike, answers: Sequence[Answer], expected: Sequence[Answer]) -> bool:
    """Rows; whether a request was lost or answered something else."""
    lost = [answer.error for answer in answers if answer.error]
    other = sum(mine.tokens != theirs.tokens for mine, theirs in zip(answers, expected, strict=True) if not mine.error)
    gaps = [gap for answer in answers if (gap := answer.gap_s(strike.at)) is not None]
    case, peer = f"tiny-moe, {len(answers)} requests, {plan}", PUBLISHED.get(plan)
    write(
        [
            Row(
                "chaos",
                case,
                "lost",
                "requests",
                Figure.of([len(lost)]),
                "published" if peer else "none",
                peer,
                "lower",
            ),
            Row("chaos", case, "other tokens", "requests", Figure.of([other]), "none", None, "lower"),
            Row("chaos", case, "without tokens", "s", Figure.of(gaps), "none", None, "lower"),
        ]
    )
    for reason in sorted(set(lost)):
        print(f"{plan}: {lost.count(reason)} x {reason}", flush=True)
    return bool(lost or other)


def units() -> dict[str, Any]:
    command = [sys.executable, "-m", "splitserve", "status", NAME, "--json"]
    status = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {unit["name"]: unit for unit in status["units"]}


def wait_until_ready() -> None:
    deadline = time.monotonic() + 90
    while not all(unit["state"] == "ready" for unit in units().values()):
        if time.monotonic() > deadline:
            raise SystemExit("not all workers came back")
        time.sleep(0.5)


if __name__ == "__main__":
    main()
