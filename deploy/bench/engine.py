"""One engine alone in this process: no router, no sockets, prompts and answers over one set of pages."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch

from splitserve.cluster.errors import InvalidRequest, SplitserveError
from splitserve.cluster.messages import Cancel, Failed, FirstToken, Granted, Prefill, Reserve, StepTokens
from splitserve.cluster.rank_spec import RankSpec
from splitserve.cluster.sampling import SamplingParams
from splitserve.cluster.topology import Topology
from splitserve.cluster.topology_sections import DEFAULT_CHUNK_TOKENS
from splitserve.decode_worker.device_loop import DecodeLoop
from splitserve.deploy.assembly import Leader, build_engine, rank_parts
from splitserve.deploy.loading import load_weights
from splitserve.engine.ranks import Rank, Ranks
from splitserve.models.layers import SingleRank

ROUTER = b"bench"
DEADLINE_S = 3600.0
SETTLING_STEPS = 4


class EngineAlone:
    """The decode pool's engine of `topology`, colocated, whatever the topology says of a split.

    Raises InvalidRequest for an engine of several ranks, and what loading raises.
    """

    def __init__(self, topology: Topology) -> None:
        if topology.decode.layout.ranks > 1:
            raise InvalidRequest("decode.layout", topology.decode.layout.ranks, "one engine alone has one rank: use 1")
        began = time.perf_counter()
        spec = self._spec(topology)
        loaded = load_weights(spec, SingleRank()).with_pages(spec)
        self._synchronize: Callable[[], None] = torch.cuda.synchronize if spec.device != "cpu" else lambda: None
        self._synchronize()
        self.load_s = time.perf_counter() - began
        parts = rank_parts(spec, loaded)
        self.loop = next((service for service in parts.services if isinstance(service, DecodeLoop)), None)
        ranks = Ranks(Rank(loaded.runner, *parts.services))
        self.runner = loaded.runner
        self._layout, self._vocab = loaded.runner.cache.layout, loaded.config.vocab_size
        self._engine = build_engine(Leader(spec, loaded, ranks, [], self._hear))
        self.ready_s = time.perf_counter() - began
        self._dice = random.Random(0)
        self._prompts: dict[str, list[int]] = {}
        self._asked = 0
        self._started = self._ended = 0
        self._steps: list[tuple[float, int]] = []

    def prefill_s(self, prompts: int, tokens: int) -> float:
        """Seconds until `prompts` new prompts of `tokens` tokens, sent at once, have their first tokens."""
        return self.serve_s(prompts, tokens, 1)

    def serve_s(self, prompts: int, tokens: int, answers: int) -> float:
        """Seconds until `prompts` new prompts of `tokens` tokens, sent at once, have `answers` tokens each."""
        began = time.perf_counter()
        with self._asking(prompts, tokens, SamplingParams(max_tokens=answers, ignore_eos=True)):
            self._step_until(lambda: self._ended == prompts)
            return time.perf_counter() - began

    def decode_s(self, batch: int, context: int, steps: int) -> list[float]:
        """Seconds of each of `steps` decode steps of `batch` sequences, which start at `context` tokens."""
        with self.decoding(batch, context, steps):
            self._step_until(lambda: len(self._steps) > steps)
            return [later - earlier for (earlier, _), (later, _) in pairwise(self._steps[: steps + 1])]

    @contextmanager
    def decoding(self, batch: int, context: int, steps: int) -> Iterator[None]:
        """`batch` sequences of `context` tokens that decode steadily, for at least `steps` steps more."""
        lasting = SamplingParams(max_tokens=batch + steps + 64, ignore_eos=True)
        with self._asking(batch, context, lasting):
            self._step_until(lambda: self._started == batch and self._full_steps(batch) > SETTLING_STEPS)
            self._steps.clear()
            if self.loop is not None:
                self.loop.times.clear()
            yield

    def step(self) -> None:
        self._engine.step()

    def _full_steps(self, batch: int) -> int:
        return sum(tokens == batch for _, tokens in self._steps)

    @contextmanager
    def _asking(self, count: int, tokens: int, params: SamplingParams) -> Iterator[None]:
        self._started = self._ended = 0
        self._steps.clear()
        self._prompts.clear()
        for _ in range(count):
            self._asked += 1
            name = str(self._asked)
            self._prompts[name] = self._dice.choices(range(self._vocab), k=tokens)
            self._params = params
            self._engine.handle(ROUTER, Reserve(name, 0, self._prompts[name], params, self._layout, DEADLINE_S))
        yield
        for name in self._prompts:
            self._engine.handle(ROUTER, Cancel(name, 0, None))
        while self._engine.step():
            pass
        self._synchronize()

    def _step_until(self, done: Callable[[], bool]) -> None:
        while not done():
            if not self._engine.step():
                raise InvalidRequest("batch", len(self._prompts), "it does not fit: raise max_sequences or kv_memory")

    def _hear(self, router: bytes, item: object) -> None:
        match item:
            case Granted(request_id=name):
                self._engine.handle(ROUTER, Prefill(name, 0, self._prompts[name], self._params, DEADLINE_S))
            case FirstToken(tokens=tokens):
                self._started += 1
                self._ended += sum(token.finish_reason is not None for token in tokens)
            case StepTokens(tokens=tokens):
                self._steps.append((time.perf_counter(), len(tokens)))
                self._ended += sum(token.finish_reason is not None for token in tokens)
            case Failed(message=message):
                raise SplitserveError(message)

    @staticmethod
    def _spec(topology: Topology) -> RankSpec:
        chunk_tokens = topology.decode.chunk_tokens or (topology.prefill or topology.decode).chunk_tokens
        decode = topology.decode.model_copy(update={"chunk_tokens": chunk_tokens or DEFAULT_CHUNK_TOKENS})
        colocated = topology.model_copy(update={"colocated": True, "prefill": None, "decode": decode})
        device = "cpu" if decode.device == "cpu" else "cuda:0"
        return RankSpec(colocated, "colocated", 0, 0, 0, device, "127.0.0.1", "bench")
