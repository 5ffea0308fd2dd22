"""A whole cluster's engines in one thread, without sockets: for tests of what they answer."""

from __future__ import annotations

import random
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from splitserve.cluster.messages import (
    Busy,
    Cached,
    Cancel,
    Failed,
    FetchPrefix,
    FirstToken,
    Granted,
    Joined,
    Prefill,
    RankEndpoint,
    Reserve,
    SampleToken,
    SendPrefix,
    SendTo,
    StepTokens,
    TokenLogprobs,
)
from splitserve.cluster.sampling import SamplingParams
from splitserve.decode_worker.device_loop import DecodeLoop
from splitserve.decode_worker.engine import DecodeEngine, DecodeLimits
from splitserve.decode_worker.steps import GraphSteps, Steps, StepwiseSteps
from splitserve.deploy.colocated import ColocatedEngine, LocalInlet, LocalOutlet
from splitserve.engine.block_manager import BlockManager
from splitserve.engine.device_sampler import DeviceSampler, HostSampler, TokenChooser
from splitserve.engine.grammar import Grammars
from splitserve.engine.kv_cache import TORCH_DTYPES, KvCache
from splitserve.engine.ranks import Rank, Ranks, RankService
from splitserve.engine.runner import ModelRunner
from splitserve.engine.sequence import ModelLimits
from splitserve.kv_transfer.inlet import ReceiveInlet, ReceiveService
from splitserve.kv_transfer.memory import Faults, MemoryNetwork, MemoryReceiver, MemorySender
from splitserve.kv_transfer.outlet import SendOutlet, SendService
from splitserve.kv_transfer.receiver import KvReceiver
from splitserve.kv_transfer.sender import KvSender
from splitserve.kv_transfer.staging import WindowAllocator
from splitserve.models.config import Dtype
from splitserve.models.grammar import GrammarCompiler
from splitserve.models.layers import SingleRank
from splitserve.models.resolve import load_model_config
from splitserve.models.weights import load_model
from splitserve.prefill_worker.engine import PrefillEngine, PrefillLimits
from splitserve.prefill_worker.runner import PrefillRunner
from tests.kv_transfer.ranks import SlowDevice, SlowMover

ROUTER = b"router"
STAGING_BYTES = 1 << 20


@dataclass(frozen=True)
class Settings:
    split: bool = True
    prefills: int = 1  # more than one fetch prefixes from each other
    chunk_tokens: int = 64
    page_size: int = 16
    pages: int = 256
    slots: int = 16
    max_sequences: int = 64
    context: int = 512
    prefix_cache: bool = True
    host_tier: int = 1 << 30
    faults: Faults = field(default_factory=Faults)
    copies_take_s: float = 0.0  # of KV, at most
    seed: int = 0
    lease_s: float = 20.0
    late_tickets: int = 0  # steps, at most, between a prompt and the ticket of its KV
    capacities: tuple[int, ...] = ()  # of decode graphs; without them decode runs step by step
    device: str = "cpu"
    graph_tokens: tuple[int, ...] = ()  # of prefill graphs; without them prefill runs torch operations
    dtype: Dtype = "float32"


@dataclass
class Answer:
    """What a router has heard about one request."""

    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    logprobs: dict[int, list[TokenLogprobs | None]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[int, str] = field(default_factory=dict)
    first: FirstToken | None = None
    joined: bool = False
    failed: Failed | None = None


class InProcessCluster:
    """Prefill engines and one decode engine (or one colocated), driven step by step by a minimal router."""

    def __init__(self, folder: Path, settings: Settings = Settings()) -> None:
        self.settings = settings
        self._config = load_model_config(str(folder))
        self._folder = folder
        self._model = load_model(
            folder,
            self._config,
            dtype=TORCH_DTYPES[settings.dtype],
            device=torch.device(settings.device),
            tp=SingleRank(),
            load_format="auto",
            max_positions=settings.context,
        )
        self.layout = self._config.kv_layout(1, settings.page_size, settings.dtype)
        self.answers: dict[str, Answer] = {}
        self._asked: dict[str, tuple[list[int], SamplingParams]] = {}
        self._goes_on: dict[str, tuple[int, int]] = {}
        self._retry: list[str] = []
        self._prefills: dict[str, int] = {}
        self._holders: dict[str, tuple[int, int] | None] = {}
        self._dice, self._tickets = random.Random(settings.seed), list[tuple[int, SendTo]]()
        self._limits = ModelLimits(settings.context, self._config.vocab_size, frozenset(self._config.eos_token_ids))
        self.grammars = Grammars(lambda: GrammarCompiler(folder, self._limits.vocab_size, self._limits.eos_token_ids))
        self.devices: list[SlowDevice] = []
        self.engines: list[Any] = self._split() if settings.split else self._colocated()

    def ask(
        self,
        name: str,
        token_ids: list[int],
        params: SamplingParams,
        first_sample: int = 0,
        output_tokens: int = 0,
        *,
        prefill: int = 0,
        holder: tuple[int, int] | None = None,
    ) -> None:
        """`prefill` is the number of its prefill engine, `holder` that of one that has so many tokens cached."""
        self.answers[name] = Answer()
        self._prefills[name], self._holders[name] = prefill, holder
        self._asked[name] = (token_ids, params)
        self._goes_on[name] = (first_sample, output_tokens)
        self._reserve(name)

    def run(self, patience_s: float = 60.0) -> dict[str, Answer]:
        """Step until every request has its outcome; the next token is at most `patience_s` away."""
        known, deadline = 0, time.monotonic() + patience_s
        while not all(self._is_over(name) for name in self.answers):
            self.step()
            tokens = sum(len(each) for answer in self.answers.values() for each in answer.tokens.values())
            if tokens > known:
                known, deadline = tokens, time.monotonic() + patience_s
            assert time.monotonic() < deadline, f"no outcome: {self.answers}"
        return self.answers

    def settle(self) -> None:
        """Step until nothing is under way any more, late transfers and granted windows included."""
        deadline = time.monotonic() + 4 * self.settings.lease_s
        busy = True
        while busy:
            self.step()
            busy = any(engine.stats().waiting or engine.stats().running for engine in self.engines)
            busy = busy or any(engine.stats().staging.used for engine in self.engines)
            assert time.monotonic() < deadline, "transfers did not end"
        self.step()

    def step(self) -> None:
        self._hand_out_tickets(1)
        retry, self._retry = self._retry, []
        for name in retry:
            self._reserve(name)
        for device in self.devices:
            device.tick()
        for engine in self.engines:
            engine.step()

    def cancel(self, name: str, sample: int | None = None) -> None:
        for engine in self.engines:
            engine.handle(ROUTER, Cancel(name, 0, sample))

    def free_pages(self) -> list[int]:
        return [blocks.free_pages for blocks in self.blocks]

    def _runner(self) -> ModelRunner:
        settings, device = self.settings, torch.device(self.settings.device)
        cache = KvCache(self.layout, settings.pages, device)
        if settings.graph_tokens:
            return PrefillRunner(self._model, cache, device, settings.chunk_tokens, settings.graph_tokens)
        return ModelRunner(self._model, cache, device)

    def _split(self) -> list[Any]:
        settings, clock = self.settings, time.monotonic
        network = MemoryNetwork(clock, settings.seed, settings.faults)
        self.blocks, self.staging = [], WindowAllocator(STAGING_BYTES)
        self.senders: list[KvSender] = []
        prefills = [self._prefill(network, number) for number in range(settings.prefills)]
        runner = self._runner()
        mover = self._mover(runner, settings.prefills)
        receiver = self._receiver(network, "decode", mover)
        services: list[RankService] = [ReceiveService(receiver)]
        services.append(self._send_service(network, "decode, prefixes", runner, mover))
        ranks = Ranks(Rank(runner, *self._decode_services(runner), *services))
        self.blocks.append(blocks := self._block_manager(ranks))
        inlet, lender = self._inlet(ranks, "decode", self.staging), SendOutlet(ranks, blocks)
        return [*prefills, self._decode_engine(ranks, blocks, inlet, lender)]

    def _send_service(self, network: MemoryNetwork, name: str, runner: ModelRunner, mover: SlowMover) -> SendService:
        self.senders.append(KvSender(mover, 0, MemorySender(network, name), time.monotonic))
        return SendService(runner, self.senders[-1])

    def _prefill(self, network: MemoryNetwork, number: int) -> PrefillEngine:
        runner = self._runner()
        mover, name = self._mover(runner, number), f"prefill {number}"
        receiver = self._receiver(network, f"{name}, prefixes", mover)
        ranks = Ranks(Rank(runner, self._send_service(network, name, runner, mover), ReceiveService(receiver)))
        self.blocks.append(blocks := self._block_manager(ranks))
        prefixes = self._inlet(ranks, f"{name}, prefixes", WindowAllocator(STAGING_BYTES))
        return self._prefill_engine(ranks, blocks, SendOutlet(ranks, blocks), prefixes)

    def _mover(self, runner: ModelRunner, number: int) -> SlowMover:
        device = SlowDevice(time.monotonic, self.settings.copies_take_s, self.settings.seed + number)
        self.devices.append(device)
        return SlowMover(runner.cache, device)

    def _receiver(self, network: MemoryNetwork, address: str, mover: SlowMover) -> KvReceiver:
        return KvReceiver(mover, 0, STAGING_BYTES, MemoryReceiver(network, address, STAGING_BYTES), time.monotonic)

    def _inlet(self, ranks: Ranks, address: str, staging: WindowAllocator) -> ReceiveInlet:
        endpoint = RankEndpoint(address, "memory", "", "", 0, 0)
        return ReceiveInlet(ranks, self.layout, [endpoint], staging, self.settings.lease_s)

    def _colocated(self) -> list[Any]:
        runner = self._runner()
        ranks = Ranks(Rank(runner, *self._decode_services(runner)))
        self.blocks = [self._block_manager(ranks)]
        local = LocalInlet(self.layout, self.settings.lease_s)
        prefill = self._prefill_engine(ranks, self.blocks[0], LocalOutlet(local))
        return [ColocatedEngine(prefill, self._decode_engine(ranks, self.blocks[0], local))]

    def _decode_services(self, runner: ModelRunner) -> list[RankService]:
        settings = self.settings
        services: list[RankService] = []
        if settings.capacities:
            self.loop = DecodeLoop(runner.model, self._config, runner.cache, settings.capacities, settings.context)
            services.append(self.loop)
        return services

    def _steps(self, ranks: Ranks) -> Steps:
        capacities = self.settings.capacities
        if not capacities:
            return StepwiseSteps(ranks)
        return GraphSteps(ranks, self.loop.layout, capacities, self.settings.page_size)

    def _block_manager(self, ranks: Ranks) -> BlockManager:
        host = ranks.host_pages(self.layout, self.settings.host_tier)
        return BlockManager(self.settings.pages, self.settings.page_size, self.settings.prefix_cache, host)

    def _prefill_engine(
        self, ranks: Ranks, blocks: BlockManager, outlet: Any, prefixes: ReceiveInlet | None = None
    ) -> PrefillEngine:
        limits = PrefillLimits(self.settings.chunk_tokens, self.settings.max_sequences, self._limits)
        chooser: TokenChooser = HostSampler()
        if self.settings.capacities:
            chooser = DeviceSampler(self._config.vocab_size, torch.device(self.settings.device))
        return PrefillEngine(
            f"prefill/{len(self.blocks) - 1}/0",
            "1",
            ranks,
            blocks,
            self.layout,
            outlet,
            chooser,
            limits,
            self.grammars,
            self._hear,
            prefixes=prefixes,
        )

    def _decode_engine(
        self, ranks: Ranks, blocks: BlockManager, inlet: Any, lender: SendOutlet | None = None
    ) -> DecodeEngine:
        limits = DecodeLimits(self.settings.slots, self.settings.max_sequences, self._limits)
        steps = self._steps(ranks)
        return DecodeEngine(
            "decode/0/0",
            "1",
            ranks,
            steps,
            blocks,
            self.layout,
            inlet,
            limits,
            self.grammars,
            self._hear,
            lender=lender,
        )

    def _reserve(self, name: str) -> None:
        token_ids, params = self._asked[name]
        item = Reserve(name, 0, token_ids, params, self.layout, 60.0, (), *self._goes_on[name])
        self.engines[-1].handle(ROUTER, item)

    def _hand_out_tickets(self, steps: int) -> None:
        waiting, self._tickets = [(left - steps, ticket) for left, ticket in self._tickets], []
        self._tickets = [(left, ticket) for left, ticket in waiting if left > 0]
        for ticket in [ticket for left, ticket in waiting if left <= 0]:
            self.engines[self._prefills[ticket.request_id]].handle(ROUTER, ticket)

    def _hear(self, router: bytes, item: object) -> None:
        match item:
            case Granted(request_id=name, ticket=ticket):
                token_ids, params = self._asked[name]
                holder = self._holders[name]
                cached = Cached(self.layout, holder[1]) if holder else None
                prefill = Prefill(name, 0, token_ids, params, 60.0, (), *self._goes_on[name], cached)
                self.engines[self._prefills[name]].handle(ROUTER, prefill)
                steps = self._dice.randint(0, self.settings.late_tickets)
                self._tickets.append((steps, SendTo(name, 0, ticket)))
                self._hand_out_tickets(0)
            case FetchPrefix(request_id=name, ticket=ticket):
                if (holder := self._holders[name]) is not None and holder[0] < len(self.engines):
                    prefix = SendPrefix(self._asked[name][0][: ticket.num_tokens + 1], (), ticket)
                    self.engines[holder[0]].handle(ROUTER, prefix)
            case Busy(request_id=name):
                self._retry.append(name)
            case FirstToken(request_id=name):
                self.answers[name].first = item
                for token in item.tokens:
                    self._take(token)
            case Joined(request_id=name):
                self.answers[name].joined = True
            case StepTokens(tokens=tokens):
                for token in tokens:
                    self._take(token)
            case Failed(request_id=name):
                self.answers[name].failed = self.answers[name].failed or item

    def _take(self, token: SampleToken) -> None:
        answer = self.answers[token.request_id]
        prompt = len(self._asked[token.request_id][0])
        assert token.position == prompt + len(answer.tokens[token.sample]), "a token was lost or repeated"
        assert token.sample not in answer.reasons, "a token came after the end"
        answer.tokens[token.sample].append(token.token_id)
        answer.logprobs[token.sample].append(token.logprobs)
        if token.finish_reason is not None:
            answer.reasons[token.sample] = token.finish_reason

    def _is_over(self, name: str) -> bool:
        answer = self.answers[name]
        return answer.failed is not None or len(answer.reasons) == self._asked[name][1].n
