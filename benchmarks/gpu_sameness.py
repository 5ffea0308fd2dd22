"""How far a request's bits depend on what runs beside it, by default and with `deterministic: true`; and its price.

    python -m benchmarks.gpu_sameness

DeepSeek-V2-Lite's shapes, random weights, random KV: one request decodes alone, and then in COMPOSITIONS others of
random capacity, slot and neighbours, and a prompt is cut and packed with others in PACKINGS ways. Counted are those in
which any of its bits, and any of its tokens, differ.
"""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu_decode import CONTEXT, TOPOLOGY, case
from benchmarks.rows import Figure, Row, write
from splitserve.cluster.topology import Topology
from splitserve.decode_worker.device_loop import DecodeLoop, LaunchStep
from splitserve.deploy.bench.engine import EngineAlone
from splitserve.engine.batch import Batch
from splitserve.engine.runner import ModelRunner
from splitserve.engine.slot_state import SlotUpdateBuilder

COMPOSITIONS, STEPS, LONGEST, PAGE_SIZE = 200, 6, 1500, 64
PACKINGS, PROMPT, CHUNK = 40, 700, 8192
PRICED = (1, 8, 64, 256)
Answer = tuple[tuple[int, float], ...]


def main() -> None:
    default, deterministic = (in_own_process(mode) for mode in (False, True))
    for batch in PRICED:
        times, peer = deterministic[batch], Figure.of(default[batch]).value
        name = case(batch).replace("v2lite-bf16", "v2lite-bf16 deterministic")
        write([Row("decode", name, "tpot", "ms", Figure.of(times), "not deterministic", peer, "lower")])


def in_own_process(deterministic: bool) -> dict[int, list[float]]:
    """`measure` where all memory is given back at the end: two of these models do not fit beside each other."""
    with multiprocessing.get_context("spawn").Pool(1) as own:
        return own.apply(measure, (deterministic,))


def measure(deterministic: bool) -> dict[int, list[float]]:
    """Write the counts; returns milliseconds a step by batch."""
    model = TOPOLOGY["model"] | {"deterministic": deterministic}  # type: ignore[operator]
    engine = EngineAlone(Topology.model_validate(TOPOLOGY | {"model": model}))
    assert engine.loop is not None
    times = {batch: [each * 1e3 for each in engine.decode_s(batch, CONTEXT, 60)] for batch in PRICED}
    name = "v2lite-bf16 deterministic" if deterministic else "v2lite-bf16"
    prefills = {"prefill": Counter({"other bits": other_prefills(engine.runner)})}
    for kind, differing in (count(Compositions(engine.loop)) | prefills).items():
        for metric, value in differing.items():
            figure = Figure(value, value, value, PACKINGS if kind == "prefill" else COMPOSITIONS)
            write([Row("sameness", f"{name} {kind}", metric, "compositions", figure, "none", None, "lower")])
    return times


@dataclass(frozen=True)
class Composition:
    """A step's capacity, and the slot of the request among those that are taken."""

    capacity: int
    slot: int
    taken: tuple[int, ...]
    seed: int


class Compositions:
    """Decode steps over KV that nobody computed: slot s has pages of its own, but for the request's, which move."""

    def __init__(self, loop: DecodeLoop) -> None:
        self._loop, self._slots = loop, loop.layout.slots
        self._updates = SlotUpdateBuilder(loop.layout)
        self._pages = -(-LONGEST // PAGE_SIZE) + 1
        for layer in loop.cache.layers:
            layer.normal_(generator=torch.Generator(layer.device).manual_seed(0))
        self._next = loop.next_step

    def run(self, composition: Composition) -> Answer:
        """The request's tokens and their log probabilities."""
        dice = random.Random(composition.seed)
        for slot in range(self._slots):
            self._updates.set(slot, {"length": 0})
        for slot in composition.taken:
            mine = slot == composition.slot
            self._admit(slot, 700 if mine else dice.randint(1, LONGEST), 5 if mine else dice.randrange(100_000), mine)
        answer = []
        for _ in range(STEPS):
            command = LaunchStep(self._next, composition.capacity, self._updates.take(), top=False)
            self._next += 1
            row = next(row for row in self._loop.launch(command).wait() if row.slot == composition.slot)
            answer.append((row.token_id, row.logprob))
        return tuple(answer)

    def _admit(self, slot: int, length: int, token: int, mine: bool) -> None:
        first = (self._slots if mine else slot) * self._pages
        state = {"length": length, "room": 2 * LONGEST, "last_token": token}
        self._updates.set(slot, state | {"top_p": 1, "repetition_penalty": 1, "logprobs": 0})
        self._updates.fill(slot, "block_table", range(first, first + self._pages))


def compositions() -> Iterator[tuple[str, Composition]]:
    """Kinds: the same row at the same capacity, another row, another capacity."""
    for seed in range(COMPOSITIONS):
        dice = random.Random(seed)
        for kind, capacity in (
            ("same row", 64),
            ("another row", 64),
            ("another capacity", dice.choice((16, 128, 256))),
        ):
            others = dice.sample(range(1, capacity), dice.randint(1, capacity - 1))
            slot = 0 if kind == "same row" else others[0]
            taken = {0, *others} if kind == "same row" else set(others)
            yield kind, Composition(capacity, slot, tuple(sorted(taken)), seed)


def count(run: Compositions) -> dict[str, Counter[str]]:
    alone = run.run(Composition(64, 0, (0,), 0))
    counts: dict[str, Counter[str]] = {}
    for kind, composition in compositions():
        found = run.run(composition)
        counter = counts.setdefault(kind, Counter({"other bits": 0, "other tokens": 0}))
        counter["other bits"] += found != alone
        counter["other tokens"] += tokens(found) != tokens(alone)
    return counts


def other_prefills(runner: ModelRunner) -> int:
    """In how many packings the prompt's logits have other bits than alone."""
    dice = random.Random(0)
    prompt = dice.choices(range(100_000), k=PROMPT)
    alone = runner.run(packed([(prompt, 0, PROMPT)], prompt))
    different = 0
    for _ in range(PACKINGS):
        cut = dice.choice((0, dice.randint(1, PROMPT - 1)))
        if cut:
            runner.run(packed([(prompt, 0, cut)], prompt))
        parts, room = [(prompt, cut, PROMPT)], CHUNK - PROMPT
        for _ in range(dice.randint(0, 12)):
            length = dice.randint(1, LONGEST)
            if length <= room:
                parts.append((dice.choices(range(100_000), k=length), 0, length))
                room -= length
        dice.shuffle(parts)
        logits = runner.run(packed(parts, prompt))
        different += not torch.equal(logits[[part[0] is prompt for part in parts].index(True)], alone[0])
    return different


def packed(parts: list[tuple[list[int], int, int]], fixed: list[int]) -> Batch:
    """Tokens `start` to `stop` of each prompt, on pages of its own; those of the prompt `fixed` never move."""
    batch = Batch([], [], [], [], [], [])
    first = -(-PROMPT // PAGE_SIZE)
    for prompt, start, stop in parts:
        pages = -(-len(prompt) // PAGE_SIZE)
        mine = prompt is fixed
        batch.token_ids.extend(prompt[start:stop])
        batch.query_lens.append(stop - start)
        batch.starts.append(start)
        batch.num_logits.append(1)
        batch.num_pages.append(pages)
        batch.pages.extend(range(pages) if mine else range(first, first + pages))
        first += 0 if mine else pages
    return batch


def tokens(answer: Iterable[tuple[int, float]]) -> list[int]:
    return [token for token, _ in answer]


if __name__ == "__main__":
    main()
