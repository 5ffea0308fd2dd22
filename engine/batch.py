"""One step's work: which tokens of which sequences run, where their KV lies, and whose logits are wanted."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from splitserve.cluster.codec import message
from splitserve.engine.sequence import Sequence
from splitserve.kernels.paged_attention import AttentionMetadata

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `num_tokens` pending tokens of `sequence`, with logits for the last `num_logits` of them."""

    sequence: Sequence
    num_tokens: int
    num_logits: int


@message
@dataclass(frozen=True)
class Batch:
    """Chunks packed end to end, as plain numbers, so that it can travel to every rank.

    `token_ids` are all chunks' tokens in order. For each chunk: `query_lens` tokens, the first of which has position
    `starts` in its sequence, logits for the last `num_logits` of them, and `num_pages` of `pages`.
    """

    token_ids: list[int]
    query_lens: list[int]
    starts: list[int]
    num_logits: list[int]
    num_pages: list[int]
    pages: list[int]

    @classmethod
    def of(cls, chunks: Seq[Chunk]) -> Batch:
        """Pack `chunks`; every sequence must have pages for the tokens that it is to run."""
        batch = cls([], [], [], [], [], [])
        for chunk in chunks:
            sequence, start = chunk.sequence, chunk.sequence.computed_tokens
            if sequence.table is None:
                raise ValueError(f"sequence {sequence.request_id} has no pages")
            batch.token_ids.extend(sequence.token_ids[start : start + chunk.num_tokens])
            batch.query_lens.append(chunk.num_tokens)
            batch.starts.append(start)
            batch.num_logits.append(chunk.num_logits)
            batch.num_pages.append(len(sequence.table.pages))
            batch.pages.extend(sequence.table.pages)
        return batch


@dataclass(frozen=True)
class BatchTensors:
    """A batch on a device: `token_ids`, `positions`, `slot_mapping` [tokens] and `logit_rows` [rows], all int64."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    slot_mapping: torch.Tensor
    logit_rows: torch.Tensor
    metadata: AttentionMetadata


def to_tensors(batch: Batch, page_size: int, device: torch.device) -> BatchTensors:
    """Expand `batch`. A token at position p of its sequence is in slot `page * page_size + p % page_size`."""
    query_lens, starts = np.array(batch.query_lens), np.array(batch.starts)
    ends = np.cumsum(query_lens)
    owner = np.repeat(np.arange(len(query_lens)), query_lens)
    row = np.arange(len(batch.token_ids))
    positions = row + (starts - (ends - query_lens))[owner]
    block_tables = _pad(np.array(batch.pages), np.array(batch.num_pages))
    slots = block_tables[owner, positions // page_size] * page_size + positions % page_size
    wanted = row >= (ends - np.array(batch.num_logits))[owner]
    return BatchTensors(
        token_ids=_tensor(np.array(batch.token_ids), device),
        positions=_tensor(positions, device),
        slot_mapping=_tensor(slots, device),
        logit_rows=_tensor(row[wanted], device),
        metadata=AttentionMetadata(
            query_lens=_tensor(query_lens, device),
            context_lens=_tensor(starts + query_lens, device),
            block_tables=_tensor(block_tables, device),
        ),
    )


def _pad(values: Ints, lengths: Ints) -> Ints:
    """Rows of `lengths` values each, filled up with 0."""
    padded = np.zeros((len(lengths), lengths.max()), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = values
    return padded


def _tensor(array: Ints, device: torch.device) -> torch.Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)
