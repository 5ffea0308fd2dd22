"""Which experts a token goes to, and how much each one counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from splitserve.kernels.launch import INTERPRETING
from splitserve.kernels.rms_norm import load_terms


@dataclass(frozen=True)
class Routing:
    """A model's rule. Only experts of the best `top_groups` of `groups` equal groups can be chosen.

    `softmax` is DeepSeek-V2's rule (arXiv 2405.04434): a group is worth its best expert. `sigmoid` is DeepSeek-V3's
    (arXiv 2412.19437): a group is worth its two best experts, and a bias takes part in the choice, not in the
    weights. Weights are divided by their sum if `normalise`, and multiplied by `scale`.
    """

    top_k: int
    scoring: Literal["softmax", "sigmoid"]
    groups: int
    top_groups: int
    normalise: bool
    scale: float


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing, shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by `logits` [rows, experts] and, for sigmoid scores, `bias` [experts], all float32.

    On a GPU, `logits` [terms, rows, experts] may be a sum still to be taken.
    Returns weights [rows, top_k + shared] float32 and expert ids [rows, top_k + shared] int64, the best choice first.
    The last `shared` choices are the same for all rows: the ids behind those of the experts, with weight 1.
    """
    if logits.is_cuda:
        return triton_route(logits, bias, rule, shared)
    scores = logits.softmax(-1) if rule.scoring == "softmax" else logits.sigmoid()
    merit = scores if bias is None else scores + bias
    if rule.top_groups < rule.groups:
        merit = _within_best_groups(merit, rule)
    chosen = merit.topk(rule.top_k, dim=-1).indices
    weights = scores.gather(1, chosen)
    if rule.normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    always = torch.arange(shared, device=logits.device).expand(len(logits), -1)
    weights = torch.cat((weights * rule.scale, torch.ones_like(always, dtype=weights.dtype)), dim=1)
    return weights, torch.cat((chosen, logits.shape[1] + always), dim=1)


def _within_best_groups(merit: torch.Tensor, rule: Routing) -> torch.Tensor:
    """`merit` with -inf for the experts of all but the best groups."""
    grouped = merit.view(len(merit), rule.groups, -1)
    worth = grouped.amax(-1) if rule.scoring == "softmax" else grouped.topk(2, dim=-1).values.sum(-1)
    best = worth.topk(rule.top_groups, dim=-1).indices
    outside = torch.ones_like(worth, dtype=torch.bool).scatter_(1, best, False)
    return grouped.masked_fill(outside.unsqueeze(-1), -torch.inf).view_as(merit)


def triton_route(
    logits: torch.Tensor, bias: torch.Tensor | None, rule: Routing, shared: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same as one kernel; of equal experts the one with the lower id. `groups` must be a power of two."""
    terms, rows, experts = (logits if logits.dim() == 3 else logits.unsqueeze(0)).shape
    groups = rule.groups if rule.top_groups < rule.groups else 1
    weights = logits.new_empty(rows, rule.top_k + shared)
    chosen = torch.empty(rows, rule.top_k + shared, dtype=torch.int64, device=logits.device)
    _route[(rows,)](
        logits,
        bias,
        weights,
        chosen,
        rule.scale,
        logits.stride(0),
        terms=terms,
        experts=experts,
        top_k=rule.top_k,
        shared=shared,
        groups=groups,
        top_groups=rule.top_groups,
        sigmoid=rule.scoring == "sigmoid",
        normalise=rule.normalise,
        block=groups * triton.next_power_of_2(experts // groups),
        block_k=triton.next_power_of_2(rule.top_k + shared),
        pdl=not INTERPRETING,
        launch_pdl=not INTERPRETING,
        num_warps=1 if experts <= 128 else 2,
    )
    return weights, chosen


@triton.jit(do_not_specialize=["term_stride"])  # type: ignore[untyped-decorator]
def _route(  # type: ignore[no-untyped-def]
    logits, bias, weights, chosen, scale, term_stride,
    terms: tl.constexpr, experts: tl.constexpr, top_k: tl.constexpr, shared: tl.constexpr, groups: tl.constexpr,
    top_groups: tl.constexpr, sigmoid: tl.constexpr, normalise: tl.constexpr, block: tl.constexpr,
    block_k: tl.constexpr, pdl: tl.constexpr,
):  # fmt: skip
    if pdl:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)  # groups side by side, each padded to a power of two
    size: tl.constexpr = experts // groups
    padded: tl.constexpr = block // groups
    expert, real = lane // padded * size + lane % padded, lane % padded < size
    values = load_terms(logits, None, row, expert, real, term_stride, experts, terms)
    values = tl.where(real, values, float("-inf"))
    if sigmoid:
        scores = 1.0 / (1.0 + tl.exp(-values))
    else:
        scores = tl.exp(values - tl.max(values, axis=0))
        scores = scores / tl.sum(scores, axis=0)
    merit = scores
    if bias is not None:
        merit += tl.load(bias + expert, mask=real, other=0.0)
    merit = tl.where(real, merit, float("-inf"))
    if groups > 1:
        merit = _keep_best_groups(merit, groups, top_groups, sigmoid, block)
    place = tl.arange(0, block_k)
    picked, total = tl.zeros([block_k], tl.float32), 0.0
    for k in tl.static_range(top_k):
        best = tl.argmax(merit, axis=0)
        score = tl.sum(tl.where(lane == best, scores, 0.0), axis=0)
        picked = tl.where(place == k, score, picked)
        total += score
        tl.store(chosen + row * (top_k + shared) + k, (best // padded * size + best % padded).to(tl.int64))
        merit = tl.where(lane == best, float("-inf"), merit)
    if normalise:
        picked = picked / (total + 1e-20)
    picked = tl.where(place < top_k, picked * scale, 1.0)
    tl.store(weights + row * (top_k + shared) + place, picked, mask=place < top_k + shared)
    always = (place >= top_k) & (place < top_k + shared)
    tl.store(chosen + row * (top_k + shared) + place, (experts + place - top_k).to(tl.int64), mask=always)


@triton.jit  # type: ignore[untyped-decorator]
def _keep_best_groups(  # type: ignore[no-untyped-def]
    merit, groups: tl.constexpr, top_groups: tl.constexpr, by_two: tl.constexpr, block: tl.constexpr
):
    grouped = tl.reshape(merit, [groups, block // groups])
    worth = tl.max(grouped, axis=1)
    if by_two:
        member = tl.arange(0, block // groups)[None, :]
        first = tl.argmax(grouped, axis=1)[:, None]
        worth += tl.max(tl.where(member == first, float("-inf"), grouped), axis=1)
    group = tl.arange(0, groups)
    outside = group >= 0
    for _ in tl.static_range(top_groups):
        best = tl.argmax(worth, axis=0)
        outside = outside & (group != best)
        worth = tl.where(group == best, float("-inf"), worth)
    return tl.reshape(tl.where(outside[:, None], float("-inf"), grouped), [block])
