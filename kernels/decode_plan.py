"""Who computes what in a step's decode attention, worked out on the device once a step and shared by all layers.

Contexts are cut into *splits* at a fixed table of positions. Every slot gets as many *pieces*, runs of its splits, as
let the longest piece be short: slots of up to q tokens get one, of up to 2q two, and q is the least that leaves no more
pieces than programs. Programs run in waves. Where all waves with their short pieces would take no less time than the
fewest waves that the slots need, with longer ones, there are no more pieces than those hold.

    splits   | slot 0: 0 1 2 3 4 5 | slot 1: 0 | slot 3: 0 1 2 3 |
    programs | 0       | 1         | 2         | 3     | 4       |

A slot's result is always the fold of its splits' results, one by one from the first, whoever computes them: programs
change the time it takes and not a bit of it. A slot of one piece needs no scratch at all. Of several, the first leaves
the fold of its splits and the others each split's own result, and the last program to end folds them all.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import triton
import triton.language as tl

GRAIN = 16  # tokens: lengths of pieces are tried in multiples of this


@dataclass(frozen=True)
class SplitTable:
    """Splits of `front_step` tokens up to position `front`, of `step` tokens from there on.

    Short splits at the front keep all processors busy with few short contexts; longer ones behind it leave fewer
    partial results. Raises ValueError unless the steps are powers of two and each divides the next.
    """

    front_step: int = 128
    front: int = 1024
    step: int = 256

    def __post_init__(self) -> None:
        powers = all(step > 0 and step & (step - 1) == 0 for step in (self.front_step, self.step))
        if not powers or self.step % self.front_step or self.front % self.step:
            raise ValueError(f"front_step and step must be powers of two, each dividing the next and front: {self}")

    def count(self, tokens: int) -> int:
        """How many splits `tokens` tokens have."""
        return -(-min(tokens, self.front) // self.front_step) - (-max(tokens - self.front, 0) // self.step)

    def start(self, split: int) -> int:
        """The position at which `split` starts."""
        front = self.front // self.front_step
        return min(split, front) * self.front_step + max(split - front, 0) * self.step


@dataclass(frozen=True)
class DecodeShape:
    """One rank's attention layers: `dim` numbers a key, of which MLA takes the first `value_dim` as values.

    `q_len` (1 to 4) queries a slot: the last token and its drafts.
    """

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    page_size: int
    q_len: int = 1

    @property
    def latent(self) -> bool:
        return self.value_dim != self.dim

    @property
    def rows(self) -> int:
        """Rows of one KV head."""
        return self.q_len * self.heads // self.kv_heads


@dataclass(frozen=True)
class DecodeTiles:
    """How a layer is cut into programs. All but `programs_per_sm`, `combine` and `pdl` may change bits.

    Tiles are `block_rows` (query, head) pairs by `block_keys` keys, whose columns come in `parts`. With `combine` a
    second kernel folds what a slot's pieces left, a program a row, which suits many partial results; without, the last
    piece's program does. `pdl` overlaps kernels' starts with the ends of those in front of them (programmatic
    dependent launch): then plan, lengths and block table must have been written before the kernel in front began.
    """

    block_rows: int = 16
    block_keys: int = 64
    keys_first: bool = False
    num_warps: int = 4
    num_stages: int = 3
    programs_per_sm: int = 1
    pdl: bool = False
    splits: SplitTable = SplitTable()
    parts: int = 1
    combine: bool = False

    def lanes(self, shape: DecodeShape) -> int:
        """Programs that run one plan beside each other: one for each KV head and block of rows."""
        return shape.kv_heads * -(-shape.rows // self.block_rows)

    def wave(self, shape: DecodeShape, num_sms: int) -> int:
        """How many programs of each lane run at once."""
        return max(1, num_sms * self.programs_per_sm // self.lanes(shape))


def choose_tiles(shape: DecodeShape, slots: int, deterministic: bool = False) -> DecodeTiles:
    """The tiles for `shape` and a capacity of `slots`. Measured on an H100; docs/LOG.md has the runners-up.

    MLA's partial results are as wide as four tokens' latents, so that many slots want long splits; few want short ones,
    which keep all processors busy. What the split table changes is the last bits, between capacities: `deterministic`
    tiles have one table for all.
    """
    if not shape.latent:
        return DecodeTiles(16 if shape.rows <= 16 else 32, keys_first=True, programs_per_sm=2)
    splits = SplitTable() if slots <= 16 else SplitTable(256, 2048, 512) if slots <= 64 else SplitTable(512, 0, 512)
    if deterministic:
        splits = SplitTable(256, 2048, 512)
    parts = 4 if shape.value_dim >= 256 else 1
    return DecodeTiles(num_warps=8, pdl=True, splits=splits, parts=parts, combine=slots <= 16)


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """`pieces` [programs, 4] int32: each program's slot (-1: none), the first of its splits and the one behind its last
    (the same: no split at all), and an idle slot whose result it sets to 0 (-1: none).

    `slots` [slots, 3] int32: where in the scratch a slot's splits begin, how many splits its first piece folds, and
    how many pieces it has. `wave` programs run at once.
    """

    pieces: torch.Tensor
    slots: torch.Tensor
    wave: int
    splits: SplitTable

    @property
    def programs(self) -> int:
        return len(self.pieces)


@dataclass(frozen=True, eq=False)
class DecodeScratch:
    """Partial results of splits, shared by all layers that run one after another.

    `acc` [splits, q_len * heads, value_dim] float32, not normalised, and `stats` [splits, 2, q_len * heads] float32:
    the maximum (base 2) and the sum that belong to it. `arrived` [slots, lanes] int32: how many pieces have ended, 0
    between two layers.
    """

    acc: torch.Tensor
    stats: torch.Tensor
    arrived: torch.Tensor


def new_decode_scratch(
    shape: DecodeShape, tiles: DecodeTiles, slots: int, max_tokens: int, device: torch.device
) -> DecodeScratch:
    """Room for `slots` contexts of at most `max_tokens` tokens in all; a page that slots share counts for each."""
    splits, rows = -(-max_tokens // tiles.splits.front_step) + slots, shape.q_len * shape.heads
    acc = torch.empty(splits, rows, shape.value_dim, dtype=torch.float32, device=device)
    stats = torch.empty(splits, 2, rows, dtype=torch.float32, device=device)
    return DecodeScratch(acc, stats, torch.zeros(slots, tiles.lanes(shape), dtype=torch.int32, device=device))


def new_decode_plan(slots: int, wave: int, splits: SplitTable, device: torch.device) -> DecodePlan:
    """Room for the plan of `slots` slots, to be filled each step by `plan_decode`.

    There are as many programs as run at once, `wave`, or for more slots a multiple of that.
    """
    programs = wave * -(-slots // wave)
    pieces, slot_plans = (torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((programs, 4), (slots, 3)))
    return DecodePlan(pieces, slot_plans, wave, splits)


def plan_decode(lengths: torch.Tensor, plan: DecodePlan) -> None:
    """Fill `plan` for `lengths` [slots] int32, the tokens of each slot's context (0: idle). One small kernel."""
    slots = len(plan.slots)
    if lengths.shape != (slots,) or lengths.dtype != torch.int32 or not lengths.is_contiguous():
        raise ValueError(f"lengths: found {lengths.dtype} {tuple(lengths.shape)}; the plan is for int32 [{slots}]")
    table = plan.splits
    _plan_kernel[(plan.programs,)](
        lengths, plan.pieces, plan.slots, slots, plan.programs, plan.wave,
        SLOTS=triton.next_power_of_2(slots), GRAIN=GRAIN,
        FRONT_STEP=table.front_step, FRONT=table.front, STEP=table.step,
    )  # fmt: skip


def plan_reference(lengths: list[int], wave: int, splits: SplitTable) -> tuple[list[list[int]], list[list[int]]]:
    """The plan's `pieces` and `slots`."""
    counts = [splits.count(length) for length in lengths]
    programs, live = wave * -(-len(lengths) // wave), sum(length > 0 for length in lengths)

    def numbers_at(size: int) -> list[int]:
        return [min(count, -(-length // size)) for length, count in zip(lengths, counts, strict=True)]

    def least_size(most: int) -> int:
        return next(size for size in range(GRAIN, max(lengths) + 2 * GRAIN, GRAIN) if sum(numbers_at(size)) <= most)

    fewest = max(1, -(-live // wave)) * wave
    size, long_size = least_size(programs), least_size(fewest)
    numbers = numbers_at(long_size if long_size * fewest <= size * programs else size)
    pieces, slots = [], []
    for slot, (length, count, number) in enumerate(zip(lengths, counts, numbers, strict=True)):
        ideal = [length * cut // number for cut in range(number)]
        near = [min(range(count), key=lambda split, at=at: (abs(splits.start(split) - at), split)) for at in ideal]  # type: ignore[misc]
        cuts = [min(max(split, cut), count - number + cut) for cut, split in enumerate(near)] + [count]
        pieces += [[slot, first, end] for first, end in pairwise(cuts)]
        slots.append([sum(counts[:slot]), cuts[1] if number else 0, number])
    idle = [slot for slot, length in enumerate(lengths) if not length]
    pieces += [[-1, 0, 0]] * (programs - len(pieces))
    zeroed = [-1] * (programs - len(idle)) + idle[::-1]
    return [[*piece, slot] for piece, slot in zip(pieces, zeroed, strict=True)], slots


@triton.jit  # type: ignore[untyped-decorator]
def split_count(tokens, FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """How many splits start before position `tokens`."""
    front = (tl.minimum(tokens, FRONT) + FRONT_STEP - 1) // FRONT_STEP
    return front + (tl.maximum(tokens - FRONT, 0) + STEP - 1) // STEP


@triton.jit  # type: ignore[untyped-decorator]
def split_start(split, FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """The position at which `split` starts."""
    FRONT_SPLITS: tl.constexpr = FRONT // FRONT_STEP
    return tl.minimum(split, FRONT_SPLITS) * FRONT_STEP + tl.maximum(split - FRONT_SPLITS, 0) * STEP


@triton.jit  # type: ignore[untyped-decorator]
def _cut(  # type: ignore[no-untyped-def]
    piece, pieces, length, splits, FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr
):
    """The split that `piece` of a slot's `pieces` starts with: the one that starts nearest to an equal share, but for
    at least one split on either side for each piece there."""
    at = (piece.to(tl.int64) * length // tl.maximum(pieces, 1)).to(tl.int32)
    split = split_count(at + 1, FRONT_STEP, FRONT, STEP) - 1
    start, after = split_start(split, FRONT_STEP, FRONT, STEP), split_start(split + 1, FRONT_STEP, FRONT, STEP)
    split += (after - at < at - start).to(tl.int32)
    return tl.where(piece == pieces, splits, tl.minimum(tl.maximum(split, piece), splits - pieces + piece))


@triton.jit  # type: ignore[untyped-decorator]
def _least_size(lengths, splits, programs, GRAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """The shortest pieces, in tokens, of which no more than `programs` are needed."""
    too_small, size = 0, (tl.max(lengths) + GRAIN - 1) // GRAIN
    while size - too_small > 1:
        half = (too_small + size) // 2
        fits = tl.sum(tl.minimum(splits, (lengths + half * GRAIN - 1) // (half * GRAIN))) <= programs
        size = tl.where(fits, half, size)
        too_small = tl.where(fits, too_small, half)
    return tl.maximum(size, 1) * GRAIN


@triton.jit(do_not_specialize=["slots", "programs", "wave"])  # type: ignore[untyped-decorator]
def _plan_kernel(  # type: ignore[no-untyped-def]
    lengths, pieces, slot_plans, slots, programs, wave,
    SLOTS: tl.constexpr, GRAIN: tl.constexpr, FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program i works out piece i and slot i."""
    index = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    length = tl.load(lengths + slot, mask=slot < slots, other=0)
    splits = split_count(length, FRONT_STEP, FRONT, STEP)
    fewest = tl.maximum(tl.cdiv(tl.sum((length > 0).to(tl.int32)), wave), 1) * wave
    size, long_size = _least_size(length, splits, programs, GRAIN), _least_size(length, splits, fewest, GRAIN)
    size = tl.where(long_size.to(tl.int64) * fewest <= size.to(tl.int64) * programs, long_size, size)
    number = tl.minimum(splits, (length + size - 1) // size)
    ends = tl.cumsum(number)

    own = tl.sum((ends <= index).to(tl.int32))  # the slot whose piece this is
    mine = slot == own
    piece = index - tl.sum(tl.where(mine, ends - number, 0))
    own_number, own_length, own_splits = (
        tl.sum(tl.where(mine, number, 0)), tl.sum(tl.where(mine, length, 0)), tl.sum(tl.where(mine, splits, 0))
    )  # fmt: skip
    idle = (length == 0) & (slot < slots)
    zeroed = idle & (tl.cumsum(idle.to(tl.int32)) == programs - index)  # by the last programs: the first have work
    real = index < tl.sum(number)
    first = _cut(piece, own_number, own_length, own_splits, FRONT_STEP, FRONT, STEP)
    end = _cut(piece + 1, own_number, own_length, own_splits, FRONT_STEP, FRONT, STEP)
    tl.store(pieces + index * 4, tl.where(real, own, -1))
    tl.store(pieces + index * 4 + 1, tl.where(real, first, 0))
    tl.store(pieces + index * 4 + 2, tl.where(real, end, 0))
    tl.store(pieces + index * 4 + 3, tl.sum(tl.where(zeroed, slot + 1, 0)) - 1)

    if index < slots:
        here = slot == index
        base = tl.sum(tl.where(slot < index, splits, 0))
        here_number, here_length, here_splits = (
            tl.sum(tl.where(here, number, 0)), tl.sum(tl.where(here, length, 0)), tl.sum(tl.where(here, splits, 0))
        )  # fmt: skip
        folded = _cut(tl.minimum(here_number, 1), here_number, here_length, here_splits, FRONT_STEP, FRONT, STEP)
        tl.store(slot_plans + index * 3, base)
        tl.store(slot_plans + index * 3 + 1, tl.where(here_number > 0, folded, 0))
        tl.store(slot_plans + index * 3 + 2, here_number)
