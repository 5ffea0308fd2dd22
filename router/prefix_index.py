"""Which engines have a prompt's beginning in their prefix caches, as far as they have said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from splitserve.cluster.messages import PrefixUpdate
from splitserve.cluster.prefix import DIGEST_BYTES, page_digests

MOST_PAGES = 1 << 20  # known at once; of more, those that were heard of first are forgotten


@dataclass
class _Follower:
    """What is known of one engine: `bit` stands for it in every page's set of engines."""

    bit: int
    page_size: int
    version: int = 0


class PrefixIndex:
    """Pages by their digests, each with the set of engines that have it, as the bits of a number.

    A digest says all about the tokens before its page, so a prompt's cached length at every engine is found in one walk
    along its pages. What is known is a heartbeat old: a page may be gone, or there already.
    """

    def __init__(self, most_pages: int = MOST_PAGES) -> None:
        self._most_pages = most_pages
        self._engines: dict[str, _Follower] = {}
        self._holders: dict[bytes, int] = {}

    @property
    def pages(self) -> int:
        """Pages that are known."""
        return len(self._holders)

    def add(self, engine: str, page_size: int) -> None:
        """Follow `engine`, of whom nothing is known yet."""
        self.remove(engine)
        taken = {follower.bit for follower in self._engines.values()}
        bit = next(bit for bit in (1 << number for number in range(len(taken) + 1)) if bit not in taken)
        self._engines[engine] = _Follower(bit, page_size)

    def remove(self, engine: str) -> None:
        """Forget `engine`."""
        if (follower := self._engines.pop(engine, None)) is not None:
            self._clear(follower.bit)

    def version(self, engine: str) -> int:
        """What the next update of `engine` should begin from."""
        follower = self._engines.get(engine)
        return follower.version if follower else 0

    def update(self, news: PrefixUpdate) -> None:
        """Take what an engine says of its cache; what does not follow on what is known of it is ignored."""
        follower = self._engines.get(news.engine)
        if follower is None or news.since not in (0, follower.version):
            return
        if not news.since:
            self._clear(follower.bit)
        for digest in _split(news.evicted):
            self._drop(digest, follower.bit)
        for digest in _split(news.stored):
            self._holders[digest] = self._holders.get(digest, 0) | follower.bit
        while len(self._holders) > self._most_pages:
            del self._holders[next(iter(self._holders))]
        follower.version = news.version

    def cached_tokens(self, token_ids: Sequence[int], extra_keys: tuple[str, ...] = ()) -> Mapping[str, int]:
        """How many leading tokens each engine has cached, of those that have any."""
        cached: dict[str, int] = {}
        for page_size in {follower.page_size for follower in self._engines.values()}:
            followers = {name: each.bit for name, each in self._engines.items() if each.page_size == page_size}
            lengths = self._walk(page_digests(token_ids, page_size, extra_keys), sum(followers.values()))
            cached |= {name: lengths[bit] * page_size for name, bit in followers.items() if bit in lengths}
        return cached

    def _walk(self, digests: Iterator[bytes], having: int) -> dict[int, int]:
        """For each bit of `having`, how many pages of a prompt it has, where that is any."""
        lengths: dict[int, int] = {}
        pages = 0
        for digest in digests:
            still = having & self._holders.get(digest, 0)
            lengths.update(dict.fromkeys(_bits(having & ~still), pages))
            having = still
            if not having:
                break
            pages += 1
        lengths.update(dict.fromkeys(_bits(having), pages))
        return {bit: pages for bit, pages in lengths.items() if pages}

    def _clear(self, bit: int) -> None:
        for digest in [digest for digest, holders in self._holders.items() if holders & bit]:
            self._drop(digest, bit)

    def _drop(self, digest: bytes, bit: int) -> None:
        holders = self._holders.get(digest, 0) & ~bit
        if holders:
            self._holders[digest] = holders
        else:
            self._holders.pop(digest, None)


def _bits(number: int) -> Iterable[int]:
    while number:
        lowest = number & -number
        yield lowest
        number ^= lowest


def _split(data: bytes) -> list[bytes]:
    return [data[start : start + DIGEST_BYTES] for start in range(0, len(data), DIGEST_BYTES)]
