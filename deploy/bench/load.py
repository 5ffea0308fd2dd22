"""What a load looks like: lengths, prompts and arrival times. Pure functions of their arguments and a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from splitserve.cluster.errors import InvalidRequest

Draw = Callable[[random.Random], int]
LENGTHS = "expected N, fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA"
MAX_TOKENS, MAX_SIGMA = 1_000_000, 10
LIMITS = f"1 to {MAX_TOKENS} tokens, LOW at most HIGH, and a SIGMA from 0 to {MAX_SIGMA}"


@dataclass(frozen=True)
class LoadRequest:
    """One request: its prompt's token ids, and how many tokens it asks for."""

    prompt: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class LoadShape:
    """How requests look. `prefix_share`: the share of each prompt, from its front, that all of them have in common."""

    prompt_tokens: str
    output_tokens: str
    prefix_share: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.prefix_share <= 1:
            raise InvalidRequest("prefix-share", self.prefix_share, "give a value from 0 to 1")
        self.draws()

    def draws(self) -> tuple[Draw, Draw]:
        """Lengths of prompts and of answers."""
        return parse_lengths("prompt-tokens", self.prompt_tokens), parse_lengths("output-tokens", self.output_tokens)


def parse_lengths(option: str, text: str) -> Draw:
    """A distribution of lengths from 1 to MAX_TOKENS. Raises InvalidRequest for anything but LENGTHS."""
    kind, _, rest = text.partition(":")
    if not rest:
        kind, rest = "fixed", text
    try:
        match kind, [float(part) for part in rest.split(":")]:
            case "fixed", [count] if 1 <= count <= MAX_TOKENS:
                return lambda random: int(count)
            case "uniform", [low, high] if 1 <= low <= high <= MAX_TOKENS:
                return lambda random: random.randint(int(low), int(high))
            case "lognormal", [median, sigma] if 1 <= median <= MAX_TOKENS and 0 <= sigma <= MAX_SIGMA:
                mu = math.log(median)
                return lambda random: min(MAX_TOKENS, max(1, round(random.lognormvariate(mu, sigma))))
    except ValueError:
        pass
    raise InvalidRequest(option, text, f"{LENGTHS}, with {LIMITS}")


def make_requests(shape: LoadShape, vocab_size: int, count: int, seed: int) -> list[LoadRequest]:
    """`count` requests of random tokens. Equal arguments make equal requests."""
    draw_prompt, draw_output = shape.draws()
    random_lengths, random_tokens = random.Random(f"lengths {seed}"), random.Random(f"tokens {seed}")
    lengths = [(draw_prompt(random_lengths), draw_output(random_lengths)) for _ in range(count)]
    longest = max((prompt for prompt, _ in lengths), default=0)
    common = random_tokens.choices(range(vocab_size), k=longest)
    requests = []
    for prompt_tokens, output_tokens in lengths:
        shared = round(prompt_tokens * shape.prefix_share)
        own = random_tokens.choices(range(vocab_size), k=prompt_tokens - shared)
        requests.append(LoadRequest((*common[:shared], *own), output_tokens))
    return requests


def poisson_arrivals(rate: float, seed: int) -> Iterator[float]:
    """Endless arrival times, in seconds from the start, of a Poisson process with `rate` arrivals a second."""
    source, time = random.Random(f"arrivals {seed}"), 0.0
    while True:
        time += source.expovariate(rate)
        yield time
