"""The first and the last kernel of a decode step: live slots become rows, and what the rows came to goes back.

    slot     0    1    2    3    4    5          row    0    1    2    3
    length   9    -   40    -    7   12    -->   slot   0    2    5    -      slot 4 waits for a page

Slots stay where they are as long as their sequence runs; rows are the slots that run in this step, packed to the front
in the order of slots, so that a step costs what its live rows cost. A slot waits, and nothing of it changes, when its
next token has no room, its grammar mask is not there yet, or the slots before it fill the step's rows or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

TABLE_BLOCK = 256
RESULT_WORDS = 4


@dataclass(frozen=True, eq=False)
class SlotTable:
    """Where each slot's sequence stands. Device tensors, int32 [slots] unless said; a slot of length 0 is empty.

    `lengths` counts tokens, the one to run next included; that one is in `last_tokens`. `room` is the longest length
    that may run: its page is there, and the sequence does not end before. A slot whose `grammar` is 1 runs only while
    `mask_lengths` equals its length. `block_table` [slots, max_pages] are its pages.
    """

    lengths: torch.Tensor
    room: torch.Tensor
    last_tokens: torch.Tensor
    grammar: torch.Tensor
    mask_lengths: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True, eq=False)
class StepRows:
    """A step's rows. `live` [1] int32 counts them; of the rows behind, lengths are 0 and cache slots -1.

    `slots` and `lengths` [rows] are int32, `tokens`, `positions`, `next_positions` and `cache_slots` (page * page_size
    + offset) [rows] int64, `block_table` [rows, max_pages] int32 with nothing of meaning behind a row's length.
    """

    live: torch.Tensor
    slots: torch.Tensor
    lengths: torch.Tensor
    tokens: torch.Tensor
    positions: torch.Tensor
    next_positions: torch.Tensor
    cache_slots: torch.Tensor
    block_table: torch.Tensor


def new_step_rows(rows: int, max_pages: int, device: torch.device) -> StepRows:
    """Room for `rows` rows of at most `max_pages` pages."""

    def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    return StepRows(
        live=zeros(1),
        slots=zeros(rows),
        lengths=zeros(rows),
        tokens=zeros(rows, dtype=torch.int64),
        positions=zeros(rows, dtype=torch.int64),
        next_positions=zeros(rows, dtype=torch.int64),
        cache_slots=zeros(rows, dtype=torch.int64),
        block_table=zeros(rows, max_pages),
    )


def gather_rows(table: SlotTable, rows: StepRows, page_size: int, max_tokens: int) -> None:
    """Fill `rows` with the slots that can run now, as many as there are rows and `max_tokens` tokens in all."""
    slots, max_pages = table.block_table.shape
    _gather_kernel[(len(rows.slots),)](
        table.lengths, table.room, table.last_tokens, table.grammar, table.mask_lengths, table.block_table,
        rows.live, rows.slots, rows.lengths, rows.tokens, rows.positions, rows.next_positions, rows.cache_slots,
        rows.block_table, slots, max_pages, max_tokens,
        ROWS=len(rows.slots), PAGE=page_size, SLOTS=triton.next_power_of_2(slots), BLOCK=TABLE_BLOCK,
    )  # fmt: skip


def finish_rows(
    table: SlotTable,
    rows: StepRows,
    tokens: torch.Tensor,
    finite: torch.Tensor,
    logprobs: torch.Tensor,
    results: torch.Tensor,
) -> None:
    """Append `tokens` [rows] int64 to the rows' slots, and report.

    `results` [rows, 4] int32 gets a row's slot (-1 behind the live ones), its token, `finite` [rows] int32 and the
    bits of `logprobs` [rows] float32. A row that is not finite goes on with token 0.
    """
    _finish_kernel[(len(rows.slots),)](
        table.lengths, table.last_tokens, rows.live, rows.slots, tokens, finite, logprobs, results,
        WORDS=RESULT_WORDS,
    )  # fmt: skip


def gather_rows_reference(table: SlotTable, rows: int, max_tokens: int) -> list[int]:
    """The slots that run."""
    lengths, room, grammar, masks = (
        column.tolist() for column in (table.lengths, table.room, table.grammar, table.mask_lengths)
    )
    live: list[int] = []
    tokens = 0
    for slot, length in enumerate(lengths):
        if not 0 < length <= room[slot] or (grammar[slot] and masks[slot] != length):
            continue
        tokens += length
        if tokens <= max_tokens and len(live) < rows:
            live.append(slot)
    return live


@triton.jit(do_not_specialize=["slots", "max_pages", "max_tokens"])  # type: ignore[untyped-decorator]
def _gather_kernel(  # type: ignore[no-untyped-def]
    lengths, room, last_tokens, grammar, mask_lengths, block_table,
    live_out, slots_out, lengths_out, tokens_out, positions_out, next_out, cache_out, table_out,
    slots, max_pages, max_tokens,
    ROWS: tl.constexpr, PAGE: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every program finds its own row's slot."""
    row = tl.program_id(0)
    slot_ids = tl.arange(0, SLOTS)
    inside = slot_ids < slots
    length = tl.load(lengths + slot_ids, mask=inside, other=0)
    waits = (tl.load(grammar + slot_ids, mask=inside, other=0) != 0) & (
        tl.load(mask_lengths + slot_ids, mask=inside, other=0) != length
    )
    runs = (length > 0) & (length <= tl.load(room + slot_ids, mask=inside, other=0)) & (waits == 0)
    runs = runs & (tl.cumsum(tl.where(runs, length, 0)) <= max_tokens)
    place = tl.cumsum(runs.to(tl.int32)) - 1
    live = tl.minimum(tl.sum(runs.to(tl.int32)), ROWS)
    if row == 0:
        tl.store(live_out, live)
    if row < live:
        here = runs & (place == row)
        slot = tl.sum(tl.where(here, slot_ids, 0))
        row_length = tl.sum(tl.where(here, length, 0))
        position = row_length - 1
        source, target = block_table + slot * max_pages, table_out + row * max_pages
        page = tl.load(source + position // PAGE).to(tl.int64)
        tl.store(slots_out + row, slot)
        tl.store(lengths_out + row, row_length)
        tl.store(tokens_out + row, tl.load(last_tokens + slot).to(tl.int64))
        tl.store(positions_out + row, position.to(tl.int64))
        tl.store(next_out + row, row_length.to(tl.int64))
        tl.store(cache_out + row, page * PAGE + position % PAGE)
        pages = (row_length + PAGE - 1) // PAGE
        for start in range(0, pages, BLOCK):
            index = start + tl.arange(0, BLOCK)
            tl.store(target + index, tl.load(source + index, mask=index < pages, other=0), mask=index < pages)
    else:
        tl.store(slots_out + row, -1)
        tl.store(lengths_out + row, 0)
        tl.store(tokens_out + row, tl.zeros((), tl.int64))
        tl.store(positions_out + row, tl.zeros((), tl.int64))
        tl.store(next_out + row, tl.zeros((), tl.int64))
        tl.store(cache_out + row, tl.full((), -1, tl.int64))


@triton.jit  # type: ignore[untyped-decorator]
def _finish_kernel(  # type: ignore[no-untyped-def]
    lengths, last_tokens, live, slots, tokens, finite, logprobs, results, WORDS: tl.constexpr
):
    row = tl.program_id(0)
    result = results + row * WORDS
    if row < tl.load(live):
        slot, ok = tl.load(slots + row), tl.load(finite + row)
        token = tl.where(ok != 0, tl.load(tokens + row), 0).to(tl.int32)
        tl.store(last_tokens + slot, token)
        tl.store(lengths + slot, tl.load(lengths + slot) + 1)
        tl.store(result, slot)
        tl.store(result + 1, token)
        tl.store(result + 2, ok)
        tl.store(result + 3, tl.load(logprobs + row).to(tl.int32, bitcast=True))
    else:
        tl.store(result, -1)
