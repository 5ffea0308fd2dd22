"""Packing sequences into a batch, and a batch into tensors, against plain loops."""

from __future__ import annotations

import random
import time

import pytest
import torch

from splitserve.cluster.codec import pack, unpack
from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.batch import Batch, Chunk, to_tensors
from splitserve.engine.block_manager import BlockManager
from splitserve.engine.sequence import Sequence

CPU = torch.device("cpu")


def random_chunks(seed: int, page_size: int) -> list[Chunk]:
    rng = random.Random(seed)
    blocks = BlockManager(4000 // page_size, page_size)
    chunks = []
    for index in range(rng.randrange(1, 9)):
        tokens = [rng.randrange(1000) for _ in range(rng.randrange(1, 300))]
        sequence = Sequence(str(index), 0, 0, tokens, len(tokens), SamplingParams(), frozenset(), 1000)
        sequence.table = blocks.allocate(tokens)
        sequence.computed_tokens = rng.randrange(len(tokens))
        num_tokens = rng.randrange(1, sequence.pending_tokens + 1)
        chunks.append(Chunk(sequence, num_tokens, rng.choice([0, 1, num_tokens])))
    return chunks


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("seed", range(15))
def test_tensors_equal_plain_loops(seed: int, page_size: int) -> None:
    chunks = random_chunks(seed, page_size)
    tensors = to_tensors(Batch.of(chunks), page_size, CPU)
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    logit_rows: list[int] = []
    for chunk in chunks:
        sequence = chunk.sequence
        assert sequence.table is not None
        for offset in range(chunk.num_tokens):
            position = sequence.computed_tokens + offset
            if offset >= chunk.num_tokens - chunk.num_logits:
                logit_rows.append(len(positions))
            token_ids.append(sequence.token_ids[position])
            positions.append(position)
            slots.append(sequence.table.pages[position // page_size] * page_size + position % page_size)
    assert tensors.token_ids.tolist() == token_ids
    assert tensors.positions.tolist() == positions
    assert tensors.slot_mapping.tolist() == slots
    assert tensors.logit_rows.tolist() == logit_rows
    assert tensors.metadata.query_lens.tolist() == [chunk.num_tokens for chunk in chunks]
    ends = [chunk.sequence.computed_tokens + chunk.num_tokens for chunk in chunks]
    assert tensors.metadata.context_lens.tolist() == ends
    for chunk, block_table in zip(chunks, tensors.metadata.block_tables.tolist(), strict=True):
        assert chunk.sequence.table is not None
        pages = chunk.sequence.table.pages
        assert block_table[: len(pages)] == pages
        assert not any(block_table[len(pages) :])


def test_a_batch_travels() -> None:
    batch = Batch.of(random_chunks(3, 16))
    assert unpack(pack(batch)) == batch


def test_a_sequence_without_pages_is_refused() -> None:
    sequence = Sequence("r7", 0, 0, [1, 2], 2, SamplingParams(), frozenset(), 1000)
    with pytest.raises(ValueError, match="sequence r7 has no pages"):
        Batch.of([Chunk(sequence, 1, 1)])


def test_building_a_decode_step_is_fast() -> None:
    chunks = []
    blocks = BlockManager(1000, 16)
    for index in range(16):
        sequence = Sequence(str(index), 0, 0, [index] * 400, 400, SamplingParams(), frozenset(), 1000)
        sequence.table = blocks.allocate(sequence.token_ids)
        sequence.computed_tokens = 399
        chunks.append(Chunk(sequence, 1, 1))

    def build() -> float:
        start = time.perf_counter()
        to_tensors(Batch.of(chunks), 16, CPU)
        return time.perf_counter() - start

    assert min(build() for _ in range(50)) < 0.5e-3
