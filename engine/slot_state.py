"""What the device knows of every slot, and the records that change it.

All of it lies in one flat tensor of 32-bit words, so that any change, from a new page to a whole admission, is a list
of (word, value) pairs that one small kernel applies before the step that it belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from splitserve.cluster.codec import message
from splitserve.cluster.sampling import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from splitserve.engine.sequence import Sequence
from splitserve.engine.to_device import to_device
from splitserve.kernels.sampling import BARRED_FOREVER, SamplerState
from splitserve.kernels.slot_rows import SlotTable
from splitserve.kernels.word_updates import update_words
from splitserve.models.grammar import Mask

MAX_BIASES = MAX_LOGIT_BIASES + MAX_STOP_TOKEN_IDS + 32  # 32 ids that end every sequence
MASK_BITS = 32


_SAMPLING = (
    "seed",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
_SCALARS = {
    "seed": "int64",
    "sample": "int64",
    "length": "int32",
    "room": "int32",
    "last_token": "int32",
    "grammar": "int32",
    "mask_length": "int32",
    "temperature": "float32",
    "top_k": "int32",
    "top_p": "float32",
    "min_p": "float32",
    "repetition_penalty": "float32",
    "presence_penalty": "float32",
    "frequency_penalty": "float32",
    "logprobs": "int32",
    "bias_count": "int32",
}


@dataclass(frozen=True)
class _Field:
    """`shape` numbers a slot from word `start` on, slot after slot."""

    dtype: str
    start: int
    shape: tuple[int, ...]

    @property
    def words_each(self) -> int:
        """Words of one number."""
        return np.dtype(self.dtype).itemsize // 4

    @property
    def words(self) -> int:
        """Words of one slot."""
        return self.words_each * math.prod(self.shape)


@dataclass(frozen=True)
class SlotLayout:
    """Where each field lies: the same on every rank. 64-bit fields come first, so that they are aligned."""

    slots: int
    max_pages: int
    vocab_size: int

    @cached_property
    def fields(self) -> dict[str, _Field]:
        """All fields, in order."""
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {name: (dtype, ()) for name, dtype in _SCALARS.items()}
        shapes |= {
            "bias_ids": ("int32", (MAX_BIASES,)),
            "bias_values": ("float32", (MAX_BIASES,)),
            "bias_until": ("int32", (MAX_BIASES,)),
            "mask": ("int32", (-(-self.vocab_size // MASK_BITS),)),
            "block_table": ("int32", (self.max_pages,)),
        }
        fields, start = {}, 0
        for name, (dtype, shape) in shapes.items():
            fields[name] = _Field(dtype, start, shape)
            start += fields[name].words * self.slots
        return fields

    @property
    def words(self) -> int:
        return sum(field.words for field in self.fields.values()) * self.slots


@message
@dataclass(frozen=True)
class History:
    """A slot's tokens so far, the first `prompt_tokens` of them the prompt: what penalties count."""

    slot: int
    prompt_tokens: int
    token_ids: list[int]


@message
@dataclass(frozen=True)
class SlotUpdates:
    """Changes of one step: `words` and `values`, int32 each, in this machine's byte order, and histories to recount."""

    words: bytes = b""
    values: bytes = b""
    histories: tuple[History, ...] = ()


class SlotUpdateBuilder:
    """Collects a step's changes; a later one of the same word wins."""

    def __init__(self, layout: SlotLayout) -> None:
        self._fields = layout.fields
        self._changes: dict[int, int] = {}
        self._masks: dict[int, Mask] = {}  # by slot
        self._histories: list[History] = []

    def set(self, slot: int, values: Mapping[str, float]) -> None:
        """Change single numbers of a slot."""
        for name, value in values.items():
            self.fill(slot, name, [value])

    def fill(self, slot: int, name: str, values: Seq[float], first: int = 0) -> None:
        """Change numbers `first` and following of a slot's field."""
        field = self._fields[name]
        words = np.array(values, dtype=field.dtype).view(np.int32).tolist()
        start = field.start + slot * field.words + first * field.words_each
        self._changes.update(zip(range(start, start + len(words)), words, strict=True))

    def sample_as(self, slot: int, sequence: Sequence) -> None:
        """Have the slot sample as `sequence` asks, which stands at the token that it is to choose next."""
        params = sequence.params
        values = {name: getattr(params, name) for name in _SAMPLING}
        logprobs = -1 if params.logprobs is None else params.logprobs
        biases = _biases(sequence)
        extra = {
            "sample": sequence.sample,
            "logprobs": logprobs,
            "grammar": int(sequence.grammar is not None),
            "bias_count": len(biases),
        }
        self.set(slot, values | extra | {"length": len(sequence.token_ids)})
        for name, column in zip(("bias_ids", "bias_values", "bias_until"), zip(*biases, strict=True), strict=False):
            self.fill(slot, name, column)
        if params.penalised:
            self._histories.append(History(slot, sequence.prompt_tokens, list(sequence.token_ids)))

    def allow(self, slot: int, length: int, mask: Mask) -> None:
        """Let a slot whose `grammar` is set run at `length` tokens, with the tokens whose bits are set."""
        self._masks[slot] = mask
        self.set(slot, {"mask_length": length})

    def take(self) -> SlotUpdates:
        """The changes since the last call."""
        field = self._fields["mask"]
        rows = [np.arange(field.words, dtype=np.int32) + (field.start + slot * field.words) for slot in self._masks]
        words = np.concatenate([np.fromiter(self._changes.keys(), np.int32, len(self._changes)), *rows])
        single = np.fromiter(self._changes.values(), np.int32, len(self._changes))
        values = np.concatenate([single, *self._masks.values()])
        updates = SlotUpdates(words.tobytes(), values.tobytes(), tuple(self._histories))
        self._changes, self._masks, self._histories = {}, {}, []
        return updates


class SlotState:
    """The slots of one rank; `table` and `sampler` are views of `words`, which is int32 and starts empty."""

    def __init__(self, layout: SlotLayout, device: torch.device) -> None:
        self.layout = layout
        self.words = torch.zeros(layout.words, dtype=torch.int32, device=device)
        view = {name: self._view(field) for name, field in layout.fields.items()}
        self.table = SlotTable(
            lengths=view["length"],
            room=view["room"],
            last_tokens=view["last_token"],
            grammar=view["grammar"],
            mask_lengths=view["mask_length"],
            block_table=view["block_table"],
        )
        self.sampler = SamplerState(
            counts=torch.zeros(layout.slots, layout.vocab_size, dtype=torch.int16, device=device),
            **{name: view[name] for name in SamplerState.__dataclass_fields__ if name != "counts"},
        )

    def apply(self, updates: SlotUpdates) -> None:
        """Enqueue the changes on the current stream."""
        pairs = np.frombuffer(updates.words + updates.values, np.int32).reshape(2, -1).copy()
        if pairs.size:
            changes = torch.from_numpy(pairs)
            # Pinned memory from torch's pool, which takes it back only after the copy.
            changes = changes.pin_memory() if self.words.is_cuda else changes
            update_words(self.words, changes.to(self.words.device, non_blocking=True))
        for history in updates.histories:
            self._count(history)

    def _count(self, history: History) -> None:
        """Count tokens for the penalties: bit 15 for the prompt, below it the times generated."""
        row = self.sampler.counts[history.slot].zero_()
        prompt, output = history.token_ids[: history.prompt_tokens], history.token_ids[history.prompt_tokens :]
        seen, times = np.unique(np.array(output, dtype=np.int64), return_counts=True)
        row[to_device(seen.tolist(), row.device)] = to_device(times.tolist(), row.device).clamp(max=2**15 - 1).short()
        row[to_device(prompt, row.device)] |= -(2**15)

    def _view(self, field: _Field) -> torch.Tensor:
        words = self.words[field.start : field.start + field.words * self.layout.slots]
        return words.view(getattr(torch, field.dtype)).view(self.layout.slots, *field.shape)


def _biases(sequence: Sequence) -> list[tuple[int, float, int]]:
    """Biases for good, and bars on what would end the sequence for as long as min_tokens says."""
    params = sequence.params
    biases = [(token, bias, BARRED_FOREVER) for token, bias in params.logit_bias.items()]
    if params.min_tokens:
        until = sequence.prompt_tokens + params.min_tokens
        biases += [(token, -math.inf, until) for token in sorted(sequence.stopping_ids)]
    return biases
