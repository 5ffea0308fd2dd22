"""What routers know of prefix caches, against what is in them."""

from __future__ import annotations

import random

from splitserve.cluster.messages import PrefixUpdate
from splitserve.cluster.prefix import page_digests
from splitserve.engine.block_manager import BlockManager
from splitserve.engine.host_pages import HostPages
from splitserve.engine.prefix_log import KEPT_CHANGES, PrefixLog
from splitserve.router.prefix_index import PrefixIndex

PAGE = 4


def conversation(number: int, tokens: int) -> list[int]:
    source = random.Random(f"conversation {number}")
    return [source.randrange(50) for _ in range(tokens)]


def manager(pages: int = 24, places: int = 0) -> BlockManager:
    return BlockManager(pages, PAGE, host=HostPages(places, lambda saves, loads: None))


def serve(blocks: BlockManager, token_ids: list[int]) -> int:
    """Cache a prompt as an engine does; how many of its tokens were there already."""
    table = blocks.allocate(token_ids)
    assert table is not None
    blocks.publish(table, token_ids, len(token_ids))
    blocks.free(table)
    return table.cached_tokens


def tell(index: PrefixIndex, engine: str, blocks: BlockManager) -> None:
    if (update := blocks.prefixes.update(engine, "1", index.version(engine))) is not None:
        index.update(update)


def test_an_index_that_is_told_knows_what_every_engine_would_find() -> None:
    """Random prompts with common beginnings, through two small caches with host memory below; some news is lost."""
    for seed in range(30):
        source, index = random.Random(seed), PrefixIndex()
        engines = {"prefill/0/0": manager(), "prefill/1/0": manager(places=9)}
        for name in engines:
            index.add(name, PAGE)
        for _ in range(80):
            prompt = conversation(source.randrange(6), source.randrange(1, 60))
            serve(engines[source.choice(list(engines))], prompt)
            for name, blocks in engines.items():
                lost = blocks.prefixes.update(name, "1", index.version(name))
                if source.random() < 0.5 or lost is None:
                    tell(index, name, blocks)
        for name, blocks in engines.items():
            tell(index, name, blocks)
        for number in range(6):
            prompt = conversation(number, 60)
            known = index.cached_tokens(prompt)
            for name, blocks in engines.items():
                assert known.get(name, 0) == blocks.cached_tokens(prompt)


def test_engines_of_other_page_sizes_are_walked_by_their_own() -> None:
    index, small, large = PrefixIndex(), manager(), BlockManager(8, 16)
    index.add("a", PAGE)
    index.add("b", 16)
    prompt = conversation(1, 40)
    for name, blocks in (("a", small), ("b", large)):
        serve(blocks, prompt)
        tell(index, name, blocks)
    assert index.cached_tokens(prompt) == {"a": 36, "b": 32}
    assert index.cached_tokens(prompt[:9]) == {"a": 8}
    assert index.cached_tokens([99, *prompt]) == {}


def test_news_that_does_not_follow_is_ignored_until_all_is_told() -> None:
    index, blocks = PrefixIndex(), manager()
    index.add("a", PAGE)
    serve(blocks, conversation(1, 20))
    tell(index, "a", blocks)
    version = index.version("a")
    serve(blocks, conversation(2, 20))
    late = blocks.prefixes.update("a", "1", version)
    assert late is not None
    tell(index, "a", blocks)
    index.update(late)
    assert index.version("a") == blocks.prefixes.version
    index.update(PrefixUpdate("nobody", "1", 0, 7, b"0" * 16, b""))
    assert index.cached_tokens(conversation(2, 20)) == {"a": 16}


def test_an_engine_that_is_gone_is_known_no_more_and_its_bit_serves_the_next_one() -> None:
    index, blocks = PrefixIndex(), manager()
    serve(blocks, conversation(1, 20))
    for name in ("a", "b"):
        index.add(name, PAGE)
        tell(index, name, blocks)
    index.remove("a")
    assert index.cached_tokens(conversation(1, 20)) == {"b": 16}
    index.add("c", PAGE)
    assert index.cached_tokens(conversation(1, 20)) == {"b": 16}, "nothing is known of it yet"
    tell(index, "c", blocks)
    assert index.cached_tokens(conversation(1, 20)) == {"b": 16, "c": 16}
    index.remove("b")
    index.remove("c")
    assert index.pages == 0


def test_prompts_with_other_keys_are_other_prompts() -> None:
    index, blocks, prompt = PrefixIndex(), manager(), conversation(1, 20)
    index.add("a", PAGE)
    table = blocks.allocate(prompt, ("salt",))
    assert table is not None
    blocks.publish(table, prompt, len(prompt))
    tell(index, "a", blocks)
    assert index.cached_tokens(prompt, ("salt",)) == {"a": 16}
    assert index.cached_tokens(prompt, ("pepper",)) == index.cached_tokens(prompt) == {}


def test_an_index_holds_no_more_than_it_may() -> None:
    index, blocks = PrefixIndex(most_pages=10), manager(pages=100)
    index.add("a", PAGE)
    for number in range(4):
        serve(blocks, conversation(number, 20))
        tell(index, "a", blocks)
        assert index.pages <= 10
    assert index.cached_tokens(conversation(3, 20)) == {"a": 16}


def test_a_router_that_missed_too_much_hears_of_everything() -> None:
    log, digests = PrefixLog(), [*page_digests(range(40), PAGE)]
    for digest in digests:
        log.add(digest)
    for _ in range(KEPT_CHANGES // 2):
        log.remove(digests[0])
        log.add(digests[0])
    short, whole = log.update("a", "1", log.version - 3), log.update("a", "1", 1)
    assert short is not None
    assert (short.since, short.stored) == (log.version - 3, digests[0])
    assert whole is not None
    assert (whole.since, len(whole.stored)) == (0, 16 * len(digests))
    assert log.update("a", "1", log.version) is None
    assert log.update("a", "1", log.version + 1) is not None, "it followed another incarnation"
