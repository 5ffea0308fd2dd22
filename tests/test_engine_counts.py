"""What engines say that they have done is what they did."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from splitserve.cluster.counts import BytesUsed, TransferCounts
from splitserve.cluster.sampling import SamplingParams
from splitserve.kv_transfer.traffic import total
from tests.engines import InProcessCluster, Settings

PARAMS = SamplingParams(max_tokens=10, ignore_eos=True)
PROMPT = list(range(3, 60))  # three full pages of 16, and 9 tokens more
CACHED = 48


def answer(cluster: InProcessCluster, name: str, params: SamplingParams = PARAMS) -> None:
    cluster.ask(name, PROMPT, params)
    cluster.run()
    cluster.settle()


def test_split_engines_count_their_own_caches_tokens_and_transfers(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, Settings())
    answer(cluster, "a")
    answer(cluster, "b")
    prefill, decode = (engine.stats() for engine in cluster.engines)
    for stats in (prefill, decode):
        assert (stats.counts.queried_tokens, stats.counts.cached_tokens) == (2 * len(PROMPT), CACHED)
    assert prefill.counts.prompt_tokens == 2 * len(PROMPT) - CACHED
    assert (prefill.counts.output_tokens, decode.counts.output_tokens) == (2, 18)
    assert decode.counts.decode_steps == 18
    assert (prefill.slots, decode.slots) == (0, cluster.settings.slots)
    (sent,) = prefill.transfers
    payload = (2 * len(PROMPT) - CACHED) * cluster.layout.bytes_per_token
    assert sent == TransferCounts("memory", started=2, completed=2, bytes=payload)
    assert decode.staging == BytesUsed(0, cluster.staging.capacity)


def test_a_colocated_engine_counts_its_one_cache_once(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=False))
    answer(cluster, "a")
    answer(cluster, "b")
    stats = cluster.engines[0].stats()
    assert (stats.counts.queried_tokens, stats.counts.cached_tokens) == (2 * len(PROMPT), CACHED)
    assert (stats.counts.output_tokens, stats.counts.decode_steps, stats.transfers) == (20, 18, ())


@pytest.mark.parametrize("split", [True, False], ids=["split", "colocated"])
def test_what_may_not_come_from_the_cache_is_not_looked_up(tiny_model: Path, split: bool) -> None:
    cluster = InProcessCluster(tiny_model, Settings(split=split))
    answer(cluster, "a", replace(PARAMS, prompt_logprobs=0))
    for engine in cluster.engines:
        assert engine.stats().counts.queried_tokens == 0


def test_a_cancelled_transfer_is_no_failure(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, Settings(chunk_tokens=16))
    cluster.ask("a", PROMPT, PARAMS)
    while not any(counts.started for counts in cluster.senders[0].traffic.counts()):
        cluster.step()
    cluster.cancel("a")
    cluster.settle()
    (sent,) = cluster.engines[0].stats().transfers
    assert (sent.started, sent.completed, sent.failed, sent.cancelled) == (1, 0, 0, 1)


def test_preempted_sequences_show_in_the_host_tier(tiny_model: Path) -> None:
    cluster = InProcessCluster(tiny_model, Settings(pages=12, slots=4, prefix_cache=False))
    for name in "abc":
        cluster.ask(name, PROMPT[:40], replace(PARAMS, max_tokens=40))
    used = 0
    while not all(cluster._is_over(name) for name in "abc"):
        cluster.step()
        used = max(used, cluster.engines[-1].stats().host_tier.used)
    assert used > 0
    assert used % cluster.layout.bytes_per_page == 0
    cluster.settle()
    host = cluster.engines[-1].stats().host_tier
    assert (host.used, host.total) == (0, (1 << 30) // cluster.layout.bytes_per_page * cluster.layout.bytes_per_page)


def test_ranks_are_added_up_by_transport() -> None:
    ranks = [TransferCounts("tcp", 2, 1, 1, 0, 10), TransferCounts("shm", 1), TransferCounts("tcp", 1, 0, 0, 1, 5)]
    assert total(ranks) == (TransferCounts("shm", 1), TransferCounts("tcp", 3, 1, 1, 1, 15))
