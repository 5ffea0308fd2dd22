"""Requests on a real CPU cluster while its workers die: how many are lost, and whether all answer what they would have.

    python -m benchmarks.chaos [PLAN ...] [--requests N] [--seed S] [--check]

A cluster of two routers, two prefill and two decode workers runs the tiny mixture of experts, in a network of its own.
Requests come one after another, 16 at a time, greedy and sampled; in the middle of them the plan strikes, at a random
moment. Each answer is compared with what the same request gets undisturbed. The peer's figures are another system's,
published, for 800 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import yaml

from benchmarks import network
from benchmarks.gpu_serve import splitserve
from benchmarks.rows import Figure, Row, show, write
from splitserve.client import AsyncClient, SplitserveClientError

NAME, PORT = "bench-chaos", 50095
MODEL = Path(__file__).parent.parent / "examples" / "tiny_moe" / "model"
ROUTERS = [f"127.0.0.1:{PORT + index}" for index in range(2)]
AT_ONCE, TOKENS, TIMEOUT_S = 16, 48, 60.0
AWAY_S = 6.0  # how long a frozen worker stands still, and what is cut stays so
SPLITSERVE = [sys.executable, "-m", "splitserve"]
Fate = Literal["killed", "frozen", "cut off", "KV cut off"]
PLANS: dict[str, dict[str, Fate]] = {
    "a prefill killed": {"prefill/0/0": "killed"},
    "a decode killed": {"decode/0/0": "killed"},
    "both decodes killed": {f"decode/{index}/0": "killed" for index in range(2)},
    "a prefill and a decode frozen": {"prefill/0/0": "frozen", "decode/0/0": "frozen"},
    "the KV links of a decode cut": {"decode/0/0": "KV cut off"},
    "a decode cut off": {"decode/0/0": "cut off"},
    "a router killed": {"router/0": "killed"},
    "all workers killed": {f"{pool}/{index}/0": "killed" for pool in ("prefill", "decode") for index in range(2)},
}
PUBLISHED = {"a prefill killed": 2.0, "both decodes killed": 600.0, "a router killed": 136.0}


@dataclass
class Answer:
    """Tokens as they came, or the error. `arrivals` are seconds of `perf_counter`; `losses`: of engines under it."""

    tokens: list[int] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)
    losses: int = 0
    error: str = ""

    def gap_s(self, moment: float) -> float | None:
        """How long no token came around `moment`; None when it was not being answered then."""
        return next((after - before for before, after in pairwise(self.arrivals) if before <= moment < after), None)


@dataclass
class Target:
    """A worker's process and what becomes of it. `ports`: those of its own that are cut; `closed`: all that now are."""

    pid: int
    fate: Fate
    ports: frozenset[int] = frozenset()
    closed: set[int] = field(default_factory=set)

    def strike(self) -> None:
        if self.ports:
            self.closed = network.cut(self.pid, self.ports)
        else:
            os.kill(self.pid, signal.SIGKILL if self.fate == "killed" else signal.SIGSTOP)

    def mend(self) -> None:
        network.mend(self.closed)
        if self.fate == "frozen":
            os.kill(self.pid, signal.SIGCONT)


@dataclass
class Strike:
    """What happens to `targets`, `after` so many requests have come and `pause_s` later. `at`: when that was."""

    targets: list[Target]
    after: int
    pause_s: float
    at: float = 0.0

    async def come(self) -> None:
        await asyncio.sleep(self.pause_s)
        self.at = time.perf_counter()
        for target in self.targets:
            target.strike()

    async def pass_by(self) -> None:
        await asyncio.sleep(self.at + AWAY_S - time.perf_counter())
        for target in self.targets:
            target.mend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plans", nargs="*", metavar="PLAN", help=f"of {', '.join(PLANS)} (default: all)")
    parser.add_argument("--requests", type=int, default=800, help="of each plan (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and moments")
    parser.add_argument("--check", action="store_true", help="write no rows: only tell what was lost")
    options = parser.parse_args()
    plans = options.plans or list(PLANS)
    if not set(plans) <= set(PLANS):
        parser.error(f"plans: found {', '.join(plans)}; expected some of {', '.join(PLANS)}")
    network.enter()
    failed = False
    with cluster():
        expected = asyncio.run(ask_all(options.requests, options.seed))
        assert not any(answer.error for answer in expected)
        for number, plan in enumerate(plans):
            strike = new_strike(plan, options.requests, random.Random(f"{options.seed}, plan {number}"))
            answers = asyncio.run(ask_all(options.requests, options.seed, strike))
            found = rows(plan, strike, answers, expected)
            failed |= any(row.figure.value for row in found if row.unit == "requests")
            show(found) if options.check else write(found)
            for reason, count in Counter(answer.error for answer in answers if answer.error).items():
                print(f"{plan}: {count} x {reason}", flush=True)
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
    targets = [new_target(name, found[name]["workers"][0]["pid"], fate) for name, fate in PLANS[plan].items()]
    return Strike(targets, requests // 2 + dice.randrange(AT_ONCE), dice.uniform(0.0, 2.0))


def new_target(name: str, pid: int, fate: Fate) -> Target:
    if fate in ("killed", "frozen"):
        return Target(pid, fate)
    lines = subprocess.run([*SPLITSERVE, "logs", name], check=True, capture_output=True, text=True).stdout
    routers_port = int(re.findall(rf"{name} serves at tcp://127.0.0.1:(\d+)", lines)[-1])
    kv_ports = network.listening(pid) - {routers_port}
    assert kv_ports
    return Target(pid, fate, frozenset(kv_ports if fate == "KV cut off" else {routers_port, *kv_ports}))


async def ask_all(requests: int, seed: int, strike: Strike | None = None) -> list[Answer]:
    answers = [Answer() for _ in range(requests)]
    numbers = iter(range(requests))

    async def take_turns(client: AsyncClient) -> None:
        for number in numbers:
            if strike is not None and number == strike.after:
                await strike.come()
                group.create_task(strike.pass_by())
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
        answer.losses = (await stream.result()).summary.losses
    except SplitserveClientError as error:
        answer.error = str(error)


def rows(plan: str, strike: Strike, answers: Sequence[Answer], expected: Sequence[Answer]) -> list[Row]:
    """How long streams stood still is that of those that had to go on elsewhere; where none had to, of all."""
    lost = sum(bool(answer.error) for answer in answers)
    other = sum(mine.tokens != theirs.tokens for mine, theirs in zip(answers, expected, strict=True) if not mine.error)
    went_on = [answer for answer in answers if answer.losses] or answers
    gaps = [gap for answer in went_on if (gap := answer.gap_s(strike.at)) is not None]
    case, peer = f"tiny-moe, {len(answers)} requests, {plan}", PUBLISHED.get(plan)
    published = "published" if peer else "none"
    return [
        Row("chaos", case, "lost", "requests", Figure.of([lost]), published, peer, "lower"),
        Row("chaos", case, "other tokens", "requests", Figure.of([other]), "none", None, "lower"),
        *([Row("chaos", case, "without tokens", "s", Figure.of(gaps), "none", None, "lower")] if gaps else []),
    ]


def units() -> dict[str, Any]:
    command = [*SPLITSERVE, "status", NAME, "--json"]
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
