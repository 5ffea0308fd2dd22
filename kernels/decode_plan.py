"""Who computes what in a step's decode attention, worked out on the device once a step and shared by all layers.

Contexts are cut into *splits* at a fixed table of positions, each slot's splits are laid end to end, and every program
gets an equal run of that line, measured in units of the table's smallest step (FlashMLA's tile scheduler and Stream-K,
arXiv 2301.03598, with cuts that do not move):

    splits   | slot 0: 0 1 2 3 4 | slot 1: 0 | slot 3: 0 1 2 3 |
    programs | 0         | 1           | 2           | 3       |

A slot's result is always the fold of its splits' results, one by one from the first, whoever computes them: programs
change the time it takes and not a bit of it. A program that starts a slot folds in registers as far as it goes, and
a slot that ends there needs no scratch at all. A program that takes a slot over leaves every split's partial result.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


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

    def units(self, tokens: int) -> int:
        return -(-tokens // self.front_step)


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
    """How a layer is cut into programs. All but `programs_per_sm` and `pdl` may change bits.

    Tiles are `block_rows` (query, head) pairs by `block_keys` keys, whose columns come in `parts`. `pdl` overlaps both
    kernels' starts with the ends of those in front of them (programmatic dependent launch): then plan, lengths and
    block table must have been written before the kernel in front began.
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

    def lanes(self, shape: DecodeShape) -> int:
        """Programs that run one plan beside each other: one for each KV head and block of rows."""
        return shape.kv_heads * -(-shape.rows // self.block_rows)

    def programs(self, shape: DecodeShape, num_sms: int) -> int:
        """Programs of one lane."""
        return max(1, num_sms * self.programs_per_sm // self.lanes(shape))


def choose_tiles(shape: DecodeShape, slots: int, deterministic: bool = False) -> DecodeTiles:
    """The tiles for `shape` and a capacity of `slots`. Measured on an H100; docs/LOG.md has the runners-up.

    MLA's partial results are as wide as four tokens' latents, so that many slots want long splits; few want short ones,
    which keep all processors busy. What the split table changes is the last bits, between capacities: `deterministic`
    tiles have one table for all.
    """
    if not shape.latent:
        return DecodeTiles(16 if shape.rows <= 16 else 32, keys_first=True, programs_per_sm=2)
    wide = 256 if deterministic else 512
    splits = SplitTable(wide, 0, wide) if deterministic or slots > 16 else SplitTable()
    parts = 4 if shape.value_dim >= 256 else 1
    return DecodeTiles(num_warps=8, pdl=True, splits=splits, parts=parts)


@dataclass(frozen=True, eq=False)
class DecodePlan:
    """`order` [slots] int32 lists the live slots, so that no program walks over idle ones.

    `boundaries` [programs + 1, 2] int32: where each program starts, as a place in `order` and a split; last the end.
    `slots` [slots, 2] int32: the unit where a slot's line starts, and how many splits the program there folds.
    """

    order: torch.Tensor
    boundaries: torch.Tensor
    slots: torch.Tensor
    splits: SplitTable

    @property
    def programs(self) -> int:
        return len(self.boundaries) - 1


@dataclass(frozen=True, eq=False)
class DecodeScratch:
    """Partial results of splits, shared by all layers that run one after another.

    `acc` [units, q_len * heads, value_dim] float32, not normalised, and `stats` [units, 2, q_len * heads] float32: the
    maximum (base 2) and the sum that belong to it. A unit is `front_step` tokens of the plan's line.
    """

    acc: torch.Tensor
    stats: torch.Tensor


def new_decode_scratch(
    shape: DecodeShape, splits: SplitTable, slots: int, max_tokens: int, device: torch.device
) -> DecodeScratch:
    """Room for `slots` contexts of at most `max_tokens` tokens in all; a page that slots share counts for each."""
    units, rows = splits.units(max_tokens) + slots, shape.q_len * shape.heads
    acc = torch.empty(units, rows, shape.value_dim, dtype=torch.float32, device=device)
    return DecodeScratch(acc, torch.empty(units, 2, rows, dtype=torch.float32, device=device))


def new_decode_plan(slots: int, programs: int, splits: SplitTable, device: torch.device) -> DecodePlan:
    """Room for the plan of `slots` slots over `programs` programs, to be filled each step by `plan_decode`."""
    order, boundaries, slot_plans = (
        torch.zeros(shape, dtype=torch.int32, device=device) for shape in ((slots,), (programs + 1, 2), (slots, 2))
    )
    return DecodePlan(order, boundaries, slot_plans, splits)


def plan_decode(lengths: torch.Tensor, plan: DecodePlan) -> None:
    """Fill `plan` for `lengths` [slots] int32, the tokens of each slot's context (0: idle). One small kernel."""
    slots = len(plan.slots)
    if lengths.shape != (slots,) or lengths.dtype != torch.int32 or not lengths.is_contiguous():
        raise ValueError(f"lengths: found {lengths.dtype} {tuple(lengths.shape)}; the plan is for int32 [{slots}]")
    table = plan.splits
    _plan_kernel[(max(plan.programs + 1, slots),)](
        lengths, plan.order, plan.boundaries, plan.slots, slots, plan.programs,
        SLOTS=triton.next_power_of_2(slots), FRONT_STEP=table.front_step, FRONT=table.front, STEP=table.step,
    )  # fmt: skip


def plan_reference(lengths: list[int], programs: int, splits: SplitTable) -> tuple[list[list[int]], list[list[int]]]:
    """The plan's `boundaries` and `slots`. A program without work starts where the next one does."""
    order = [slot for slot, length in enumerate(lengths) if length]
    units = [splits.units(length) for length in lengths]
    bases = [sum(units[:slot]) for slot in range(len(units))]
    total = sum(units)
    line = [
        (bases[slot] + splits.units(splits.start(split)), slot, split)
        for slot, length in enumerate(lengths)
        for split in range(splits.count(length))
    ]
    cuts = [program * total // programs for program in range(programs + 1)]
    starts = [(at, order.index(slot), split) for at, slot, split in line]
    boundaries = [next(([place, split] for at, place, split in starts if at >= cut), [len(order), 0]) for cut in cuts]
    after = [next((cut for cut in cuts if cut > base), total) for base in bases]
    folded = [sum(s == slot and at < after[slot] for at, s, _ in line) for slot in range(len(lengths))]
    return boundaries, [list(pair) for pair in zip(bases, folded, strict=True)]


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


@triton.jit(do_not_specialize=["slots", "programs"])  # type: ignore[untyped-decorator]
def _plan_kernel(  # type: ignore[no-untyped-def]
    lengths, order, boundaries, slot_plans, slots, programs,
    SLOTS: tl.constexpr, FRONT_STEP: tl.constexpr, FRONT: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Program i works out boundary i and slot i."""
    index = tl.program_id(0)
    slot = tl.arange(0, SLOTS)
    length = tl.load(lengths + slot, mask=slot < slots, other=0)
    units = (length + FRONT_STEP - 1) // FRONT_STEP
    ends = tl.cumsum(units)
    total = tl.sum(units)
    live = length > 0
    place = tl.cumsum(live.to(tl.int32)) - 1

    if index <= programs:
        cut = index * total // programs
        first = tl.sum(((ends <= cut) & live).to(tl.int32))
        here = live & (place == first)
        base = tl.sum(tl.where(here, ends - units, 0))
        split = split_count((cut - base) * FRONT_STEP, FRONT_STEP, FRONT, STEP)
        past = split >= split_count(tl.sum(tl.where(here, length, 0)), FRONT_STEP, FRONT, STEP)
        tl.store(boundaries + index * 2, tl.minimum(first + past.to(tl.int32), tl.sum(live.to(tl.int32))))
        tl.store(boundaries + index * 2 + 1, tl.where(past, 0, split))

    if index < slots:
        tl.store(
            order + tl.sum(tl.where(slot == index, place, 0)),
            index,
            mask=tl.sum((live & (slot == index)).to(tl.int32)) > 0,
        )
        base = tl.sum(tl.where(slot == index, ends - units, 0))
        splits = split_count(tl.sum(tl.where(slot == index, length, 0)), FRONT_STEP, FRONT, STEP)
        owner = ((base + 1) * programs - 1) // tl.maximum(total, 1)
        after = (owner + 1) * total // programs
        folded = tl.minimum(splits, split_count((after - base) * FRONT_STEP, FRONT_STEP, FRONT, STEP))
        tl.store(slot_plans + index * 2, base)
        tl.store(slot_plans + index * 2 + 1, folded)
