"""Properties of page ownership, checked against a plain model of it."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from splitserve.engine.block_manager import BlockManager, BlockTable
from splitserve.engine.host_pages import HostPages, Pairs

NUM_PAGES, PLACES = 12, 9
PAGE_SIZE = 4
# Two token values and few lengths, so that prefixes collide often.
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=22)
keys = st.sampled_from([(), ("adapter",), ("adapter", "image")])


class Owner:
    """A live table with the tokens that it holds and how many of them have KV."""

    def __init__(self, table: BlockTable, tokens: list[int], keys: tuple[str, ...], computed: int) -> None:
        self.table, self.tokens, self.keys, self.computed = table, tokens, keys, computed


class BlockManagerMachine(RuleBasedStateMachine):
    """`contents` is what is really written: (keys, tokens up to the page's end) of each page, or None.

    `places` is the same of host memory, where sequences are parked, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host = HostPages(PLACES, self.move)
        self.manager = BlockManager(NUM_PAGES, PAGE_SIZE, host=self.host)
        self.places: dict[int, tuple[tuple[str, ...], tuple[int, ...]] | None] = {}
        self.parked: list[tuple[Owner, list[int]]] = []
        self.owners: list[Owner] = []
        self.contents: list[tuple[tuple[str, ...], tuple[int, ...]] | None] = [None] * NUM_PAGES

    def move(self, saves: Pairs, loads: Pairs) -> None:
        assert all(0 <= place < PLACES for _, place in saves)
        taken = {place for _, places in self.parked for place in places}
        for page, place in saves:
            assert place not in taken, "a parked page is overwritten"
            self.places[place] = self.contents[page]
        for place, page in loads:
            self.contents[page] = self.places[place]

    def owner(self, data: st.DataObject) -> Owner:
        return data.draw(st.sampled_from(self.owners))

    def pages_in_use(self) -> set[int]:
        return {page for owner in self.owners for page in owner.table.pages}

    @rule(tokens=prompts, extra=keys)
    def allocate(self, tokens: list[int], extra: tuple[str, ...]) -> None:
        free, used = self.manager.free_pages, self.pages_in_use()
        table = self.manager.allocate(tokens, extra)
        if table is None:
            assert self.manager.free_pages == free < self.manager.pages_for(len(tokens))
            return
        hits = table.cached_tokens // PAGE_SIZE
        assert table.cached_tokens % PAGE_SIZE == 0
        assert table.cached_tokens < len(tokens) <= len(table.pages) * PAGE_SIZE < len(tokens) + PAGE_SIZE
        for index, page in enumerate(table.pages[:hits]):
            assert self.contents[page] == (extra, tuple(tokens[: (index + 1) * PAGE_SIZE]))
        assert not used & set(table.pages[hits:]), "a page that was not found by its hash has another owner"
        for page in table.pages[hits:]:
            self.contents[page] = None
        self.owners.append(Owner(table, list(tokens), extra, table.cached_tokens))

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), step=st.integers(1, 9))
    def compute(self, data: st.DataObject, step: int) -> None:
        """Write KV as a worker does: whole pages get content, and only then are published."""
        owner = self.owner(data)
        before, owner.computed = owner.computed, min(len(owner.tokens), owner.computed + step)
        for index in range(before // PAGE_SIZE, owner.computed // PAGE_SIZE):
            self.contents[owner.table.pages[index]] = (owner.keys, tuple(owner.tokens[: (index + 1) * PAGE_SIZE]))
        self.manager.publish(owner.table, owner.tokens, owner.computed)

    @precondition(lambda self: self.owners)
    @rule(data=st.data(), tokens=prompts)
    def append(self, data: st.DataObject, tokens: list[int]) -> None:
        owner, free = self.owner(data), self.manager.free_pages
        used, old_pages = self.pages_in_use(), list(owner.table.pages)
        if self.manager.append(owner.table, len(owner.tokens) + len(tokens)):
            owner.tokens.extend(tokens)
            new_pages = owner.table.pages[len(old_pages) :]
            assert owner.table.pages[: len(old_pages)] == old_pages
            assert not used & set(new_pages)
            for page in new_pages:
                self.contents[page] = None
        else:
            assert self.manager.free_pages == free
            assert owner.table.pages == old_pages

    @precondition(lambda self: any(owner.computed == len(owner.tokens) for owner in self.owners))
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        parent = data.draw(st.sampled_from([owner for owner in self.owners if owner.computed == len(owner.tokens)]))
        used = self.pages_in_use()
        forked = self.manager.fork(parent.table, len(parent.tokens))
        if forked is None:
            assert self.manager.free_pages == 0
            assert len(parent.tokens) % PAGE_SIZE
            return
        table, copies = forked
        full = len(parent.tokens) // PAGE_SIZE
        assert table.pages[:full] == parent.table.pages[:full]
        assert len(copies) == len(table.pages) - full == bool(len(parent.tokens) % PAGE_SIZE)
        for source, destination in copies:
            assert (source, destination) == (parent.table.pages[full], table.pages[full])
            assert destination not in used
            self.contents[destination] = None
        self.owners.append(Owner(table, list(parent.tokens), parent.keys, parent.computed))

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        owner = self.owner(data)
        room = PLACES - sum(len(places) for _, places in self.parked)
        places = self.host.park(owner.table.pages)
        assert (places is None) == (len(owner.table.pages) > room)
        if places is not None:
            self.parked.append((owner, places))
            self.owners.remove(owner)
            self.manager.free(owner.table)

    @precondition(lambda self: self.parked)
    @rule(data=st.data(), wanted=st.booleans())
    def unpark(self, data: st.DataObject, wanted: bool) -> None:
        """Bring a parked sequence back, where there is room, or drop it."""
        index = data.draw(st.integers(0, len(self.parked) - 1))
        owner, places = self.parked[index]
        if wanted:
            table = self.manager.allocate(owner.tokens, owner.keys, max_cached_tokens=0)
            if table is None:
                return
            self.host.unpark(places, table.pages[: len(places)])
            for page in range(owner.computed // PAGE_SIZE):
                assert self.contents[table.pages[page]] == (owner.keys, tuple(owner.tokens[: (page + 1) * PAGE_SIZE]))
            self.owners.append(Owner(table, owner.tokens, owner.keys, owner.computed))
        else:
            self.host.drop(places)
        del self.parked[index]

    @precondition(lambda self: self.owners)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        owner = self.owner(data)
        self.owners.remove(owner)
        self.manager.free(owner.table)
        with pytest.raises(ValueError, match="freed before"):
            self.manager.free(owner.table)

    @invariant()
    def refcounts_are_exact_and_nothing_leaks(self) -> None:
        counts = [0] * NUM_PAGES
        for owner in self.owners:
            assert len(set(owner.table.pages)) == len(owner.table.pages)
            for page in owner.table.pages:
                counts[page] += 1
        assert self.manager._refcounts == counts
        assert self.manager.free_pages == counts.count(0)
        assert set(self.manager._blank) | set(self.manager._idle) == {p for p in range(NUM_PAGES) if not counts[p]}

    @invariant()
    def host_memory_is_accounted_for(self) -> None:
        parked = [place for _, places in self.parked for place in places]
        cached = list(self.host._place_of.values())
        assert sorted(parked + cached + self.host._free) == list(range(PLACES))
        assert self.host.cached == len(cached)

    @invariant()
    def a_shared_page_means_the_same_to_all_owners(self) -> None:
        meaning: dict[int, tuple[tuple[str, ...], tuple[int, ...]]] = {}
        for owner in self.owners:
            for index, page in enumerate(owner.table.pages):
                tokens = tuple(owner.tokens[: (index + 1) * PAGE_SIZE])
                assert meaning.setdefault(page, (owner.keys, tokens)) == (owner.keys, tokens)

    def teardown(self) -> None:
        for owner in self.owners:
            self.manager.free(owner.table)
        assert self.manager.free_pages == NUM_PAGES


BlockManagerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestBlockManager = BlockManagerMachine.TestCase


def filled(manager: BlockManager, tokens: list[int], extra: tuple[str, ...] = ()) -> BlockTable:
    table = manager.allocate(tokens, extra)
    assert table is not None
    manager.publish(table, tokens, len(tokens))
    return table


def test_only_published_pages_are_found() -> None:
    manager = BlockManager(8, 4)
    tokens = list(range(9))
    first = manager.allocate(tokens)
    assert first is not None
    for computed, expected in ((0, 0), (3, 0), (4, 4), (7, 4), (8, 8)):
        manager.publish(first, tokens, computed)
        second = manager.allocate(tokens)
        assert second is not None
        assert second.cached_tokens == expected
        manager.free(second)


def test_at_least_one_token_is_left_to_compute() -> None:
    manager = BlockManager(8, 4)
    manager.free(filled(manager, list(range(8))))
    again = manager.allocate(list(range(8)))
    assert again is not None
    assert again.cached_tokens == 4


@pytest.mark.parametrize(("limit", "expected"), [(0, 0), (3, 0), (4, 4), (11, 8), (100, 12)])
def test_max_cached_tokens_limits_reuse(limit: int, expected: int) -> None:
    manager = BlockManager(8, 4)
    tokens = list(range(15))
    manager.free(filled(manager, tokens))
    table = manager.allocate(tokens, max_cached_tokens=limit)
    assert table is not None
    assert table.cached_tokens == expected


@pytest.mark.parametrize("other", [("image",), ("adapter", "image"), ("ad", "apter"), ("adapterx",)])
def test_extra_keys_separate_equal_tokens(other: tuple[str, ...]) -> None:
    manager = BlockManager(8, 4)
    tokens = list(range(9))
    manager.free(filled(manager, tokens, ("adapter",)))
    same, different = manager.allocate(tokens, ("adapter",)), manager.allocate(tokens, other)
    assert same is not None
    assert different is not None
    assert (same.cached_tokens, different.cached_tokens) == (8, 0)


def test_least_recently_freed_prefix_is_evicted_first_and_its_tail_before_its_head() -> None:
    manager = BlockManager(6, 4)
    old, new = [1] * 9, [2] * 9
    tables = [filled(manager, old), filled(manager, new)]
    for table in tables:
        manager.free(table)
    # Two blank partial pages and four cached ones: three pages take one cached page, the tail of `old`.
    taken = manager.allocate([3] * 12)
    assert taken is not None
    manager.free(taken)
    cached = [table.cached_tokens for table in (manager.allocate(new), manager.allocate(old)) if table is not None]
    assert cached == [8, 4]


def test_a_hit_makes_a_prefix_recent_again() -> None:
    manager = BlockManager(4, 4)
    for tokens in ([1] * 5, [2] * 5):
        manager.free(filled(manager, tokens))
    refreshed = manager.allocate([1] * 5)
    assert refreshed is not None
    assert refreshed.cached_tokens == 4
    manager.free(refreshed)
    taken = manager.allocate([3] * 12)
    assert taken is not None
    manager.free(taken)
    survivor, evicted = manager.allocate([1] * 5), manager.allocate([2] * 5)
    assert survivor is not None
    assert evicted is not None
    assert (survivor.cached_tokens, evicted.cached_tokens) == (4, 0)


def test_without_prefix_cache_nothing_is_shared() -> None:
    manager = BlockManager(8, 4, prefix_cache=False)
    first, second = filled(manager, [1] * 9), filled(manager, [1] * 9)
    assert second.cached_tokens == 0
    assert not set(first.pages) & set(second.pages)


@pytest.mark.parametrize("seed", range(20))
def test_long_random_traffic_ends_with_every_page_free(seed: int) -> None:
    rng = random.Random(seed)
    manager = BlockManager(64, 8)
    live: list[BlockTable] = []
    hits = 0
    for _ in range(300):
        if live and rng.random() < 0.45:
            manager.free(live.pop(rng.randrange(len(live))))
            continue
        tokens = [rng.randrange(2) if i % 8 == 0 else 7 for i in range(rng.randrange(1, 100))]
        table = manager.allocate(tokens)
        if table is not None:
            hits += table.cached_tokens
            manager.publish(table, tokens, len(tokens))
            live.append(table)
    for table in live:
        manager.free(table)
    assert manager.free_pages == 64
    assert hits


def test_misuse_is_refused() -> None:
    manager = BlockManager(4, 4)
    with pytest.raises(ValueError, match="token_ids"):
        manager.allocate([])
    table = filled(manager, [1] * 5)
    with pytest.raises(ValueError, match="computed_tokens"):
        manager.publish(table, [1] * 5, 6)
    with pytest.raises(ValueError, match="num_tokens"):
        manager.fork(table, 9)
    manager.free(table)
    for use in (lambda: manager.append(table, 6), lambda: manager.fork(table, 1), lambda: manager.free(table)):
        with pytest.raises(ValueError, match="freed before"):
            use()
    with pytest.raises(ValueError, match="at least one page"):
        BlockManager(0, 4)


class Moves:
    """What a block manager had moved."""

    def __init__(self) -> None:
        self.saves: list[tuple[int, int]] = []
        self.loads: list[tuple[int, int]] = []

    def __call__(self, saves: Pairs, loads: Pairs) -> None:
        self.saves += saves
        self.loads += loads


def test_an_evicted_prefix_comes_back_from_the_host() -> None:
    moves = Moves()
    manager = BlockManager(4, 4, host=HostPages(8, moves))
    prompt, other = list(range(16)), list(range(100, 116))
    manager.free(filled(manager, prompt))
    manager.free(filled(manager, other))
    assert len(moves.saves) == 4
    assert manager.host.cached == 4
    table = manager.allocate([*prompt[:12], 7])
    assert table is not None
    assert table.cached_tokens == 12
    assert [page for _, page in moves.loads] == table.pages[:3]
    assert {place for place, _ in moves.loads} <= {place for _, place in moves.saves}
    again = manager.allocate([*prompt[:8], 9])
    assert again is None, "both first pages are shared, but the third one finds no room"
    manager.free(table)
    # What lies in host memory already is not saved again.
    before = len(moves.saves)
    manager.free(filled(manager, list(range(200, 216))))
    assert len(moves.saves) == before


def test_without_host_memory_what_is_evicted_is_gone() -> None:
    manager = BlockManager(4, 4)
    manager.free(filled(manager, list(range(16))))
    manager.free(filled(manager, list(range(100, 116))))
    table = manager.allocate([*range(12), 7])
    assert table is not None
    assert table.cached_tokens == 0


def test_loading_spares_what_it_loads() -> None:
    """With little host memory, pages that leave for a hit must not take the places of the hit."""
    moves = Moves()
    manager = BlockManager(4, 4, host=HostPages(3, moves))
    prompt = list(range(13))
    manager.free(filled(manager, prompt))
    manager.free(filled(manager, list(range(100, 116))))
    loaded = manager.allocate(prompt)
    assert loaded is not None
    hit = loaded.cached_tokens // 4
    assert hit == len(moves.loads) > 0
    assert len({place for place, _ in moves.loads}) == hit
