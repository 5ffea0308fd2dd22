"""Moves KV between pages and packed payloads, and sums what it moves for the payload's checksum, in one pass.

A payload holds [layers, planes, heads, tokens, head_dim] of one rank's cache, end to end. Its words, 4 bytes each and
signed, lie in blocks of BLOCK_WORDS, and word w of block b counts weight(w) * weight(b) times; those behind the last
whole block count weight(w) times. The sum is modulo 2^64, so that its order does not matter. A program takes the same
words of many blocks: then a word costs one multiplication by its block's weight, and its own weight waits for the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from splitserve.kernels.launch import current_stream, num_sms, relaunch

WORD_BYTES = 4
WORDS_IN_BLOCK, TILE_WORDS = 1 << 14, 2048
BLOCK_WORDS = tl.constexpr(WORDS_IN_BLOCK)
LONGEST_RUN = 64  # words that lie side by side in a page and are moved by neighbouring threads


@dataclass(frozen=True, eq=False)
class PagedLayers:
    """Every layer of a cache: `pointers` [layers] int64 on the device, of tensors [planes, pages, heads, page_size,
    head_dim] that are contiguous; `row_bytes` are those of one token's head, a multiple of 8.
    """

    pointers: torch.Tensor
    planes: int
    pages: int
    heads: int
    page_size: int
    row_bytes: int

    @classmethod
    def of(cls, layers: list[torch.Tensor]) -> PagedLayers:
        planes, pages, heads, page_size, head_dim = layers[0].shape
        pointers = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.int64, device=layers[0].device)
        return cls(pointers, planes, pages, heads, page_size, head_dim * layers[0].itemsize)


@dataclass(frozen=True)
class KvRegion:
    """Layers, local heads and tokens of a sequence, each [start, stop)."""

    layers: tuple[int, int]
    heads: tuple[int, int]
    tokens: tuple[int, int]

    def rows(self, planes: int) -> int:
        """Rows of a payload of this region: one for every token of every head."""
        (first, last), (low, high), (start, stop) = self.layers, self.heads, self.tokens
        return (last - first) * planes * (high - low) * (stop - start)


def pack_kv(
    cache: PagedLayers,
    table: torch.Tensor,
    region: KvRegion,
    payload: torch.Tensor,
    total: torch.Tensor,
    sms: int = 0,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Copy `region` of the sequence whose pages are `table` [pages] int64 into `payload`, uint8 of exactly its size.

    Adds the payload's weighted sum to `total` [1] int64. `payload` may lie in another GPU's memory that is mapped here.
    `sms` limits the SMs that are taken, 0 for all; `stream` is the current one unless given. Raises ValueError when
    sizes do not fit.
    """
    _move(cache, table, region, payload, total, sms, pack=True, stream=stream)


def unpack_kv(
    cache: PagedLayers,
    table: torch.Tensor,
    region: KvRegion,
    payload: torch.Tensor,
    total: torch.Tensor,
    sms: int = 0,
    stream: torch.cuda.Stream | None = None,
) -> None:
    """Copy `payload` into `region`. Every word is read once, so that the sum is that of what was written."""
    _move(cache, table, region, payload, total, sms, pack=False, stream=stream)


def _move(
    cache: PagedLayers,
    table: torch.Tensor,
    region: KvRegion,
    payload: torch.Tensor,
    total: torch.Tensor,
    sms: int,
    *,
    pack: bool,
    stream: torch.cuda.Stream | None,
) -> None:
    rows, row_words = region.rows(cache.planes), cache.row_bytes // WORD_BYTES
    if payload.numel() != rows * cache.row_bytes or cache.row_bytes % (2 * WORD_BYTES):
        raise ValueError(f"payload: found {payload.numel()} bytes for {rows} rows of {cache.row_bytes}")
    if region.tokens[1] > table.numel() * cache.page_size:
        raise ValueError(f"table: {table.numel()} pages of {cache.page_size} do not reach token {region.tokens[1]}")
    run = min(LONGEST_RUN, row_words & -row_words)
    blocks = -(-rows * row_words // WORDS_IN_BLOCK)
    tiles = WORDS_IN_BLOCK // TILE_WORDS
    programs = min(blocks, max(1, 8 * (sms or num_sms(payload.device)) // tiles))
    (first, _), (low, high), (start, stop) = region.layers, region.heads, region.tokens
    relaunch(
        _move_kv,
        (tiles, programs, 1),
        (cache.pointers, table, payload, total),
        (cache.pages, first, low, high - low, start, stop - start, rows * row_words),
        (cache.planes, cache.heads, cache.page_size, row_words, run, TILE_WORDS // run, pack),
        stream.cuda_stream if stream else current_stream(table.device),
        num_warps=4,
    )


@triton.jit
def _weight(counter):  # type: ignore[no-untyped-def]
    """Odd 64-bit numbers by splitmix64's finaliser (Steele, Lea and Flood 2014), as `kv_transfer.checksum` has them."""
    z = tl.cast(counter, tl.uint64) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return ((z ^ (z >> 31)) | 1).to(tl.int64, bitcast=True)


@triton.jit(  # type: ignore[untyped-decorator]
    do_not_specialize=["pages", "first_layer", "first_head", "num_heads", "first_token", "num_tokens", "words"]
)
def _move_kv(  # type: ignore[no-untyped-def]
    layers, table, payload, total, pages, first_layer, first_head, num_heads, first_token, num_tokens, words,
    PLANES: tl.constexpr, HEADS: tl.constexpr, PAGE: tl.constexpr, ROW: tl.constexpr,
    RUN: tl.constexpr, RUNS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    run_in_block = tl.program_id(0) * RUNS + tl.arange(0, RUNS)
    column = tl.arange(0, RUN)[None, :]
    words_of_payload = payload.to(tl.pointer_type(tl.int32))
    whole = words // BLOCK_WORDS
    sums = tl.zeros((RUNS, RUN), tl.int64)
    for block in range(tl.program_id(1), tl.cdiv(words, BLOCK_WORDS), tl.num_programs(1)):
        run = block * (BLOCK_WORDS // RUN) + run_in_block
        live = run < words // RUN
        row = run // (ROW // RUN)
        token, row = first_token + row % num_tokens, row // num_tokens
        head, row = first_head + row % num_heads, row // num_heads
        plane, layer = row % PLANES, first_layer + row // PLANES
        page = tl.load(table + token // PAGE, mask=live, other=0)
        cache_row = ((plane * pages + page) * HEADS + head) * PAGE + token % PAGE
        start = tl.load(layers + layer, mask=live, other=0).to(tl.pointer_type(tl.int32))
        paged = (start + cache_row * ROW + run % (ROW // RUN) * RUN)[:, None] + column
        packed = words_of_payload + run.to(tl.int64)[:, None] * RUN + column
        # Every run starts at a multiple of its length, in pages and in payloads.
        paged, packed = tl.multiple_of(paged, [1, RUN]), tl.multiple_of(packed, [1, RUN])
        if PACK:
            value = tl.load(paged, mask=live[:, None], other=0)
            tl.store(packed, value, mask=live[:, None])
        else:
            value = tl.load(packed, mask=live[:, None], other=0)
            tl.store(paged, value, mask=live[:, None])
        factor = tl.where(block < whole, _weight(tl.cast(block + 1, tl.uint64) << 32), 1)
        sums += value.to(tl.int64) * factor
    sums *= _weight(run_in_block[:, None] * RUN + column + 1)
    tl.atomic_add(total, tl.sum(tl.sum(sums, 1), 0))
