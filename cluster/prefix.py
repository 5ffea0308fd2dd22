"""Names of cached prefixes: what engines know their pages by, and routers a prompt's.

A page's digest covers its tokens and everything before them, chained page by page from a root that covers the extra
keys (an adapter's name, an image's content hash), so equal digests mean equal KV.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from hashlib import blake2b

DIGEST_BYTES = 16


def root_digest(extra_keys: tuple[str, ...]) -> bytes:
    # Lengths in front keep ("ab", "c") and ("a", "bc") apart.
    root = blake2b(digest_size=DIGEST_BYTES)
    for key in extra_keys:
        data = key.encode()
        root.update(len(data).to_bytes(8, "little") + data)
    return root.digest()


def page_digest(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Of a full page of `tokens` behind the page, or root, with digest `parent`."""
    return blake2b(parent + array("q", tokens).tobytes(), digest_size=DIGEST_BYTES).digest()


def page_digests(token_ids: Sequence[int], page_size: int, extra_keys: tuple[str, ...] = ()) -> Iterator[bytes]:
    """Those of a prompt's pages that may be found in a cache: at least its last token is always computed."""
    digest = root_digest(extra_keys)
    for stop in range(page_size, len(token_ids), page_size):
        digest = page_digest(digest, token_ids[stop - page_size : stop])
        yield digest
