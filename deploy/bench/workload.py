"""What `bench` and `explain` send: requests of a made or a recorded load, and when."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path

from splitserve.client import Model
from splitserve.cluster.errors import InvalidRequest
from splitserve.deploy.bench.load import LENGTHS, LoadRequest, LoadShape, make_requests, poisson_arrivals
from splitserve.deploy.bench.trace import read_requests, read_trace

REQUESTS, MAX_REQUESTS, MAX_SEED = 64, 1_000_000, 2**63 - 1


@dataclass(frozen=True)
class Load:
    """Requests to send. `arrivals`: when, in seconds from the start; None keeps as many under way as is asked.

    `left_out`: requests of a trace that are too long for the model.
    """

    warmup: tuple[LoadRequest, ...]
    requests: Iterable[LoadRequest]
    count: int
    arrivals: tuple[float, ...] | None
    left_out: int = 0


@dataclass(frozen=True)
class Workload:
    """`trace`, a file, is replayed `speed` times as fast; without one, `shape` makes the requests.

    `rate`, in requests a second, makes them come at random (Poisson); None keeps `concurrency` of them under way.
    `requests`: how many are measured; None all of a trace, else REQUESTS.
    """

    shape: LoadShape
    requests: int | None = None
    warmup: int = 4
    concurrency: int = 8
    rate: float | None = None
    trace: str | None = None
    speed: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("requests", 1, MAX_REQUESTS),
            ("concurrency", 1, MAX_REQUESTS),
            ("warmup", 0, MAX_REQUESTS),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InvalidRequest(name, value, f"give a number from {least} to {most}")
        for name, unit in (("rate", "requests a second"), ("speed", "times the recorded speed")):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise InvalidRequest(name, value, f"give more than 0 {unit}")

    def load(self, model: Model) -> Load:
        """The requests for `model`. Equal workloads and models make equal ones. Raises what `read_trace` does."""
        count = self.requests or REQUESTS
        made = make_requests(self.shape, model.vocab_size, self.warmup + count, self.seed)
        warmup, requests = tuple(made[: self.warmup]), made[self.warmup :]
        if self.trace is None:
            arrivals = None if self.rate is None else tuple(islice(poisson_arrivals(self.rate, self.seed), count))
            return Load(warmup, requests, count, arrivals)
        trace = read_trace(self.trace, model.context, self.requests)
        arrivals = tuple(trace.arrivals(self.speed))
        return Load(warmup, trace.prompts(model.vocab_size, self.seed), len(arrivals), arrivals, trace.left_out)


DEFAULTS = {field.name: field.default for field in fields(Workload)}


def add_workload(parser: argparse.ArgumentParser) -> None:
    """All arguments of `workload_of` but those of arrivals."""
    parser.add_argument("--requests", type=int, help=f"how many are measured (default: {REQUESTS}, or all of a trace)")
    parser.add_argument(
        "--warmup", type=int, default=DEFAULTS["warmup"], help="sent before, not measured (default: %(default)s)"
    )
    for name, default in (("prompt", "128"), ("output", "64")):
        parser.add_argument(
            f"--{name}-tokens", default=default, metavar="LENGTHS", help=f"{LENGTHS} (default: %(default)s)"
        )
    parser.add_argument("--prefix-share", type=float, default=0.0, help="share of each prompt that all have in common")
    parser.add_argument(
        "--speed", type=float, default=1.0, help="of a trace: how much faster than recorded (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of lengths, prompts and arrivals (default: %(default)s)")


def workload_of(arguments: argparse.Namespace, rate: float | None, concurrency: int = 1) -> Workload:
    """The workload that a command was given. Raises InvalidRequest naming the argument that is odd."""
    workload = Workload(
        shape=LoadShape(arguments.prompt_tokens, arguments.output_tokens, arguments.prefix_share),
        requests=arguments.requests,
        warmup=arguments.warmup,
        concurrency=concurrency,
        rate=rate,
        trace=arguments.trace,
        speed=arguments.speed,
        seed=arguments.seed,
    )
    if workload.trace is not None:
        read_requests(Path(workload.trace), workload.requests)  # its faults are told now, not once a model is known
    return workload
