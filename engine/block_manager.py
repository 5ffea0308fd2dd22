"""Who owns which KV page. Pure bookkeeping: no tensor is touched here.

    blank --allocate/append/fork--> owned (refcount >= 1) --publish--> owned, found by its hash
      ^                                 |                                   |        ^
      +------------ free ---------------+                                  free      | prefix hit
      +------------ evicted, least recently used first ------------- idle <-+--------+
                             `--> host memory, where there is room, and back on a hit

Pages are found by the digests of `cluster/prefix.py`. Only full pages have one, and only after their KV is written.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from splitserve.cluster.counts import BytesUsed
from splitserve.cluster.prefix import page_digest, page_digests, root_digest
from splitserve.engine.host_pages import HostPages
from splitserve.engine.prefix_log import PrefixLog


@dataclass(eq=False)
class BlockTable:
    """The pages of one sequence in order of position. Position p lies in `pages[p // page_size]`.

    `cached_tokens`: leading tokens whose KV was found in the cache at allocation, a multiple of the page size.
    """

    pages: list[int]
    cached_tokens: int
    digests: list[bytes]
    root: bytes
    freed: bool = False


class BlockManager:
    """Hands out `num_pages` pages of `page_size` tokens, shares full ones by refcount, and reuses cached prefixes.

    Cached pages that are handed out for something else are saved to `host` before, and loaded from there on a hit.
    `prefixes` tells what is cached, here or there.
    """

    def __init__(
        self, num_pages: int, page_size: int, prefix_cache: bool = True, host: HostPages | None = None
    ) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"need at least one page of one token, found {num_pages} pages of {page_size}")
        self.num_pages = num_pages
        self.page_size = page_size
        self.host = host or HostPages(0, lambda saves, loads: None)
        self.prefixes: PrefixLog = self.host.prefixes
        self._prefix_cache = prefix_cache
        self._refcounts = [0] * num_pages
        self._blank = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}

    @property
    def free_pages(self) -> int:
        """Pages that can be handed out now: blank ones and idle cached ones."""
        return len(self._blank) + len(self._idle)

    def host_bytes(self, bytes_per_page: int) -> BytesUsed:
        """What host memory holds on every rank, with pages of so many bytes."""
        return BytesUsed(self.host.used * bytes_per_page, self.host.capacity * bytes_per_page)

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def can_allocate(self, num_tokens: int) -> bool:
        """Whether `num_tokens` tokens fit even when no prefix is found."""
        return self.pages_for(num_tokens) <= self.free_pages

    def allocate(
        self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = (), *, max_cached_tokens: int | None = None
    ) -> BlockTable | None:
        """Pages for `token_ids`, the longest cached prefix shared; None when there is no room (nothing changes then).

        At least one token is left to compute, and no more than `max_cached_tokens` are taken from the cache.
        """
        if not token_ids:
            raise ValueError("token_ids: found none; a sequence has at least one token")
        limit = len(token_ids) - 1 if max_cached_tokens is None else min(max_cached_tokens, len(token_ids) - 1)
        table = BlockTable([], 0, [], root_digest(extra_keys))
        hits = self._match(table, token_ids, limit // self.page_size) if self._prefix_cache else []
        shared = [page for page, _ in hits if page is not None]
        missing = self.pages_for(len(token_ids)) - len(shared)
        if missing > self.free_pages - sum(self._refcounts[page] == 0 for page in shared):
            return None
        for page in shared:
            self._share(page)
        taken = iter(self._take(missing, spared={place for _, place in hits if place is not None}))
        table.pages = [next(taken) if page is None else page for page, _ in hits]
        self._load([(place, index) for index, (_, place) in enumerate(hits) if place is not None], table)
        table.pages += taken
        table.cached_tokens = len(hits) * self.page_size
        return table

    def cached_tokens(self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> int:
        """How many leading tokens `allocate` would find in the cache now."""
        if not self._prefix_cache:
            return 0
        digests = page_digests(token_ids, self.page_size, extra_keys)
        found = itertools.takewhile(lambda digest: digest in self._page_of or digest in self.host, digests)
        return sum(1 for _ in found) * self.page_size

    def append(self, table: BlockTable, num_tokens: int) -> bool:
        """Grow `table` to hold `num_tokens` tokens in all; False when there is no room (nothing changes then)."""
        self._check_live(table)
        missing = self.pages_for(num_tokens) - len(table.pages)
        if missing > self.free_pages:
            return False
        table.pages += self._take(missing)
        return True

    def publish(self, table: BlockTable, token_ids: Sequence[int], computed_tokens: int) -> None:
        """Make the full pages among the first `computed_tokens` findable. Their KV must have been written already."""
        self._check_live(table)
        if computed_tokens > min(len(token_ids), len(table.pages) * self.page_size):
            raise ValueError(f"computed_tokens: found {computed_tokens}; there are {len(token_ids)} tokens")
        if not self._prefix_cache:
            return
        for index in range(len(table.digests), computed_tokens // self.page_size):
            digest = self._page_digest(table, token_ids, index)
            table.digests.append(digest)
            page = table.pages[index]
            if digest not in self._page_of:
                self._name(page, digest)

    def fork(self, table: BlockTable, num_tokens: int) -> tuple[BlockTable, list[tuple[int, int]]] | None:
        """A second owner of the first `num_tokens` tokens; None when there is no room.

        Full pages are shared. A partly filled last page gets a page of its own, and the (source, destination) pair
        to copy before either owner writes on.
        """
        self._check_live(table)
        if num_tokens > len(table.pages) * self.page_size:
            raise ValueError(f"num_tokens: found {num_tokens}; the table holds {len(table.pages) * self.page_size}")
        full, partial = divmod(num_tokens, self.page_size)
        if partial and not self.free_pages:
            return None
        child = BlockTable(table.pages[:full], full * self.page_size, table.digests[:full], table.root)
        for page in child.pages:
            self._share(page)
        if not partial:
            return child, []
        child.pages += self._take(1)
        return child, [(table.pages[full], child.pages[full])]

    def free(self, table: BlockTable) -> None:
        """Give up all pages of `table`. Raises ValueError when that was done before."""
        self._check_live(table)
        table.freed = True
        # Last page first: a prefix must outlive what continues it, or the continuation could never be found again.
        for page in reversed(table.pages):
            self._refcounts[page] -= 1
            if self._refcounts[page]:
                continue
            if page in self._digest_of:
                self._idle[page] = None
            else:
                self._blank.append(page)
        table.pages = []

    def _match(
        self, table: BlockTable, token_ids: Sequence[int], max_pages: int
    ) -> list[tuple[int | None, int | None]]:
        """The leading pages that are cached: each one's number, or else its place in host memory."""
        hits: list[tuple[int | None, int | None]] = []
        for index in range(max_pages):
            digest = self._page_digest(table, token_ids, index)
            page = self._page_of.get(digest)
            place = self.host.find(digest) if page is None else None
            if page is None and place is None:
                break
            table.digests.append(digest)
            hits.append((page, place))
        return hits

    def _load(self, found: list[tuple[int, int]], table: BlockTable) -> None:
        """Fill pages of `table` from host memory: for each (place, index) the page of that index."""
        for _, index in found:
            self._name(table.pages[index], table.digests[index])
        if found:
            self.host.move((), [(place, table.pages[index]) for place, index in found])

    def _name(self, page: int, digest: bytes) -> None:
        self._page_of[digest] = page
        self._digest_of[page] = digest
        self.prefixes.add(digest)

    def _page_digest(self, table: BlockTable, token_ids: Sequence[int], index: int) -> bytes:
        parent = table.digests[index - 1] if index else table.root
        return page_digest(parent, token_ids[index * self.page_size : (index + 1) * self.page_size])

    def _share(self, page: int) -> None:
        self._idle.pop(page, None)
        self._refcounts[page] += 1

    def _take(self, count: int, spared: Collection[int] = ()) -> list[int]:
        """`count` pages for a first owner. Cached ones among them go to host memory, but not to the places `spared`."""
        pages, saves = [], []
        for _ in range(count):
            if self._blank:
                page = self._blank.pop()
            else:
                page, _ = self._idle.popitem(last=False)
                digest = self._digest_of.pop(page)
                del self._page_of[digest]
                if (place := self.host.keep(digest, spared)) is not None:
                    saves.append((page, place))
                self.prefixes.remove(digest)
            self._refcounts[page] = 1
            pages.append(page)
        if saves:
            self.host.move(saves, ())
        return pages

    def _check_live(self, table: BlockTable) -> None:
        if table.freed:
            raise ValueError("this block table was freed before")
