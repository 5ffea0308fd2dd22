"""Slots become rows and rows slots, and single words change."""

from __future__ import annotations

import random

import pytest
import torch

from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.slot_rows import (
    RESULT_WORDS,
    SlotTable,
    finish_rows,
    gather_rows,
    gather_rows_reference,
    new_step_rows,
)
from splitserve.kernels.word_updates import update_words

DEVICE = torch.device("cpu" if INTERPRETING else "cuda")
PAGE_SIZE = 16

pytestmark = [] if INTERPRETING else [pytest.mark.gpu]


def random_table(seed: int, slots: int, max_pages: int) -> SlotTable:
    dice = random.Random(seed)
    longest = max_pages * PAGE_SIZE
    lengths = [dice.choice([0, dice.randint(1, longest)]) for _ in range(slots)]
    columns = {
        "lengths": lengths,
        "room": [dice.choice([length - 1, length, longest]) for length in lengths],
        "last_tokens": [dice.randrange(1000) for _ in lengths],
        "grammar": [int(dice.random() < 0.3) for _ in lengths],
        "mask_lengths": [dice.choice([length, length - 1]) for length in lengths],
        "block_table": [[dice.randrange(10_000) for _ in range(max_pages)] for _ in lengths],
    }
    return SlotTable(
        **{name: torch.tensor(column, dtype=torch.int32, device=DEVICE) for name, column in columns.items()}
    )


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_the_slots_that_can_run(seed: int) -> None:
    dice = random.Random(1000 + seed)
    slots, capacity, max_pages = dice.randint(1, 40), dice.randint(1, 40), dice.choice([1, 5, 300])
    table = random_table(seed, slots, max_pages)
    max_tokens = dice.choice([slots * max_pages * PAGE_SIZE, max_pages * PAGE_SIZE * 2])
    rows = new_step_rows(capacity, max_pages, DEVICE)
    gather_rows(table, rows, PAGE_SIZE, max_tokens)
    expected = gather_rows_reference(table, capacity, max_tokens)
    live, idle = len(expected), capacity - len(expected)
    assert int(rows.live) == live
    assert rows.slots.tolist() == expected + [-1] * idle
    lengths = table.lengths[expected].tolist()
    assert rows.lengths.tolist() == lengths + [0] * idle
    assert rows.tokens[:live].tolist() == table.last_tokens[expected].tolist()
    assert rows.positions[:live].tolist() == [length - 1 for length in lengths]
    assert rows.next_positions[:live].tolist() == lengths
    assert rows.cache_slots[live:].tolist() == [-1] * idle
    for row, (slot, length) in enumerate(zip(expected, lengths, strict=True)):
        pages = table.block_table[slot, : -(-length // PAGE_SIZE)].tolist()
        assert rows.block_table[row, : len(pages)].tolist() == pages
        assert int(rows.cache_slots[row]) == pages[-1] * PAGE_SIZE + (length - 1) % PAGE_SIZE


def test_tokens_go_back_to_their_slots() -> None:
    table = random_table(0, 9, 4)
    rows = new_step_rows(6, 4, DEVICE)
    gather_rows(table, rows, PAGE_SIZE, 10_000)
    live = int(rows.live)
    assert 1 < live < 6
    ran, before = rows.slots[:live].tolist(), table.lengths.tolist()
    tokens = torch.arange(100, 106, device=DEVICE)
    finite = torch.tensor([1, 0, 1, 1, 1, 1], dtype=torch.int32, device=DEVICE)
    logprobs = torch.linspace(-3, -1, 6, device=DEVICE)
    results = torch.zeros(6, RESULT_WORDS, dtype=torch.int32, device=DEVICE)
    finish_rows(table, rows, tokens, finite, logprobs, results)
    assert table.lengths.tolist() == [length + (slot in ran) for slot, length in enumerate(before)]
    assert table.last_tokens[ran].tolist() == [100, 0, *range(102, 100 + live)]
    assert results[:, 0].tolist() == ran + [-1] * (6 - live)
    assert results[:live, 1].tolist() == [100, 0, *range(102, 100 + live)]
    assert results[:live, 2].tolist() == finite[:live].tolist()
    assert torch.equal(results[:live, 3].contiguous().view(torch.float32), logprobs[:live])


def test_words_change_and_no_others() -> None:
    words = torch.arange(2000, dtype=torch.int32, device=DEVICE)
    places = torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:700].to(DEVICE, torch.int32)
    expected = words.clone()
    expected[places.long()] = -places
    update_words(words, torch.stack((places, -places)))
    assert torch.equal(words, expected)
    update_words(words, torch.empty(2, 0, dtype=torch.int32, device=DEVICE))
    assert torch.equal(words, expected)
