"""Which KV heads and tokens travel from which source rank to which target rank: a pure function of two layouts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from splitserve.cluster.errors import TransferFailed
from splitserve.cluster.layout import KvLayout


@dataclass(frozen=True)
class Piece:
    """All that one source rank sends to one target rank: a block of heads by tokens, of every layer and plane.

    Head ranges [start, stop) count from the rank's own first head; the token range counts from the sequence's start.
    """

    source_rank: int
    target_rank: int
    source_heads: tuple[int, int]
    target_heads: tuple[int, int]
    start_token: int
    stop_token: int


def reshard(source: KvLayout, target: KvLayout, start_token: int, stop_token: int) -> tuple[Piece, ...]:
    """Pieces that bring tokens [start_token, stop_token) from every source layout into every target layout.

    Each element of each target rank comes from exactly one source rank, and a pair of ranks has at most one piece.
    Replicas share the work: by heads in grouped-query attention (the i-th rank in need of a head turns to its i-th
    holder), by tokens in MLA, where every source rank holds the whole latent. Page sizes play no part: pieces are
    ranges of tokens. Raises TransferFailed when the layouts are of different models or the range is none.
    """
    check_same_model(source, target)
    if not 0 <= start_token <= stop_token:
        raise TransferFailed(f"tokens: found [{start_token}, {stop_token}); give 0 <= start <= stop")
    if start_token == stop_token:
        return ()
    pieces = _share_tokens if source.is_latent else _share_heads
    return tuple(pieces(source, target, start_token, stop_token))


def check_same_model(source: KvLayout, target: KvLayout) -> None:
    """Raise TransferFailed unless both layouts hold the same elements. `tp` and `page_size` may differ."""
    for name in ("num_layers", "planes", "num_kv_heads", "head_dim", "dtype"):
        found, expected = getattr(source, name), getattr(target, name)
        if found != expected:
            raise TransferFailed(f"KvLayout.{name}: the source has {found}, the target {expected}; they must be equal")


def _share_heads(source: KvLayout, target: KvLayout, start: int, stop: int) -> Iterator[Piece]:
    holders = _ranks_by_head(source)
    takers = _ranks_by_head(target)
    for rank in range(target.tp):
        heads = target.heads(rank)
        chosen = [holders[head][takers[head].index(rank) % len(holders[head])] for head in heads]
        for origin in dict.fromkeys(chosen):
            wanted = [head for head, holder in zip(heads, chosen, strict=True) if holder == origin]
            yield Piece(
                source_rank=origin,
                target_rank=rank,
                source_heads=_within(source.heads(origin), wanted),
                target_heads=_within(heads, wanted),
                start_token=start,
                stop_token=stop,
            )


def _share_tokens(source: KvLayout, target: KvLayout, start: int, stop: int) -> Iterator[Piece]:
    # Rounded up, so that the first ranks always have a part.
    share = -(-(stop - start) // source.tp)
    for rank in range(target.tp):
        for origin in range(source.tp):
            first, last = start + origin * share, min(start + (origin + 1) * share, stop)
            if first < last:
                yield Piece(origin, rank, (0, 1), (0, 1), first, last)


def _ranks_by_head(layout: KvLayout) -> list[list[int]]:
    ranks: list[list[int]] = [[] for _ in range(layout.num_kv_heads)]
    for rank in range(layout.tp):
        for head in layout.heads(rank):
            ranks[head].append(rank)
    return ranks


def _within(held: range, wanted: list[int]) -> tuple[int, int]:
    """Local range of `wanted`, which is contiguous: a rank with several heads shares none of them with another rank."""
    return wanted[0] - held.start, wanted[-1] + 1 - held.start
