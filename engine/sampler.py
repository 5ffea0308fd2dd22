"""From logits to tokens. A row's token depends on its own logits and request only, to the bit.

token = argmax(filter(adjust(logits) / temperature) + gumbel(seed, sample index, position, token id))

`adjust` is logit bias, then repetition, presence and frequency penalties, then the masks of min_tokens and grammar;
`filter` is top-k, top-p, min-p, each of which keeps tokens tied at its threshold. Without temperature the token is
argmax(adjust(logits)), the lowest id of equals. Log probabilities are the model's own, before any of this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from splitserve.cluster.messages import TokenLogprobs
from splitserve.cluster.sampling import SamplingParams
from splitserve.engine.noise import gumbel, noise_keys
from splitserve.models.grammar import Mask

_NUCLEUS_GUESS = 1024


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What the next token of one sequence depends on, besides its logits.

    `token_ids` are prompt and output so far, the first `prompt_tokens` of them the prompt; the new token's position
    is their number. Tokens in `stopping_ids` would end the sequence. `mask`: a bit for each token that may come.
    """

    params: SamplingParams
    sample: int
    token_ids: Sequence[int]
    prompt_tokens: int
    stopping_ids: frozenset[int]
    mask: Mask | None = None

    @property
    def position(self) -> int:
        return len(self.token_ids)

    @property
    def output_ids(self) -> Sequence[int]:
        return self.token_ids[self.prompt_tokens :]

    @property
    def forbids_stop(self) -> bool:
        return self.position - self.prompt_tokens < self.params.min_tokens and bool(self.stopping_ids)

    @property
    def adjusts(self) -> bool:
        """Whether the logits change before temperature applies."""
        return bool(self.params.logit_bias or self.params.penalised or self.forbids_stop or self.mask is not None)


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprobs: TokenLogprobs | None


def sample(logits: torch.Tensor, rows: Sequence[SamplerRow]) -> list[SampledToken | None]:
    """Choose a token for every row of `logits` [rows, vocab] float32.

    None for a row whose best logit is not finite: the model failed there and nothing can be chosen. Its neighbours
    are not affected.
    """
    if logits.shape[0] != len(rows):
        raise ValueError(f"logits: found {logits.shape[0]} rows; there are {len(rows)} requests")
    wanted = [index for index, row in enumerate(rows) if row.params.logprobs is not None]
    raw = torch.log_softmax(_select(logits, wanted), dim=-1) if wanted else None
    if any(row.adjusts for row in rows):
        logits = logits.clone()
        for index, row in enumerate(rows):
            _adjust_(logits[index], row)
    best, chosen = logits.max(dim=-1)
    finite = best.isfinite().tolist()
    sampled = [index for index, row in enumerate(rows) if row.params.temperature > 0 and finite[index]]
    if sampled:
        chosen[sampled] = _draw(_select(logits, sampled), best[sampled], [rows[index] for index in sampled])
    logprobs: dict[int, TokenLogprobs] = {}
    if raw is not None:
        top_counts = [rows[index].params.logprobs or 0 for index in wanted]
        logprobs = dict(zip(wanted, _logprobs(raw, chosen[wanted], top_counts), strict=True))
    tokens = [SampledToken(token, logprobs.get(index)) for index, token in enumerate(chosen.tolist())]
    return [token if ok else None for token, ok in zip(tokens, finite, strict=True)]


def prompt_logprobs(logits: torch.Tensor, targets: Sequence[int], top: int) -> tuple[TokenLogprobs, ...]:
    """Row i of `logits` [rows, vocab] predicts `targets[i]`: its log probability and those of the `top` likeliest."""
    raw = torch.log_softmax(logits, dim=-1)
    chosen = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    return tuple(_logprobs(raw, chosen, [top] * len(targets)))


def _select(logits: torch.Tensor, indices: list[int]) -> torch.Tensor:
    return logits if len(indices) == logits.shape[0] else logits[indices]


def _logprobs(raw: torch.Tensor, chosen: torch.Tensor, top_counts: list[int]) -> list[TokenLogprobs]:
    top = raw.topk(max(top_counts, default=0), dim=-1)
    columns = (raw.gather(1, chosen[:, None])[:, 0].tolist(), top.indices.tolist(), top.values.tolist(), top_counts)
    return [
        TokenLogprobs(logprob, tuple(zip(ids[:count], values[:count], strict=True)))
        for logprob, ids, values, count in zip(*columns, strict=True)
    ]


def _adjust_(logits: torch.Tensor, row: SamplerRow) -> None:
    params = row.params
    if params.logit_bias:
        logits[list(params.logit_bias)] += logits.new_tensor(list(params.logit_bias.values()))
    if params.repetition_penalty != 1:
        seen = torch.unique(torch.tensor(row.token_ids, device=logits.device))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if params.presence_penalty or params.frequency_penalty:
        output = torch.tensor(row.output_ids, dtype=torch.int64, device=logits.device)
        seen, counts = torch.unique(output, return_counts=True)
        logits[seen] -= params.presence_penalty + params.frequency_penalty * counts
    if row.forbids_stop:
        logits[list(row.stopping_ids)] = -math.inf
    if row.mask is not None:
        allowed = np.unpackbits(row.mask.view(np.uint8), count=len(logits), bitorder="little")
        logits[torch.from_numpy(allowed == 0).to(logits.device)] = -math.inf


def _draw(logits: torch.Tensor, best: torch.Tensor, rows: list[SamplerRow]) -> torch.Tensor:
    """Tokens [rows] for `logits` [rows, vocab], whose maxima are `best` [rows], all with a temperature.

    One row at a time: its noise is needed for few tokens if it is filtered, and fits the cache of a CPU if not.
    """
    seeds, samples, positions = logits.new_tensor(
        [(row.params.seed, row.sample, row.position) for row in rows], dtype=torch.int64
    ).unbind(1)
    keys = noise_keys(seeds, samples, positions)
    vocabulary = torch.arange(logits.shape[1], device=logits.device)
    tokens = []
    for index, row in enumerate(rows):
        # The best logit becomes 0, so that no temperature, however small, can overflow.
        scores = (logits[index] - best[index]) / max(row.params.temperature, torch.finfo(torch.float32).tiny)
        scores, token_ids = _filter(scores, vocabulary, row.params)
        noise = gumbel(keys[index : index + 1], token_ids)[0]
        tokens.append(token_ids[noise.add_(scores).argmax()])
    return torch.stack(tokens)


def _filter(scores: torch.Tensor, token_ids: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """What top-k, then top-p of the rest, then min-p leave of `scores` [tokens], whose maximum is 0, and their ids."""
    if 0 < params.top_k < scores.numel():
        kept = scores >= scores.topk(params.top_k).values[-1]
        scores, token_ids = scores[kept], token_ids[kept]
    if params.top_p < 1:
        probabilities = scores.softmax(dim=-1)
        kept = probabilities >= _nucleus_threshold(probabilities, params.top_p)
        scores, token_ids = scores[kept], token_ids[kept]
    if params.min_p > 0:
        kept = scores >= math.log(params.min_p)
        scores, token_ids = scores[kept], token_ids[kept]
    return scores, token_ids


def _nucleus_threshold(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """The least probability among the likeliest tokens that together reach `top_p`."""
    ordered = probabilities.topk(min(_NUCLEUS_GUESS, probabilities.numel())).values
    mass = ordered.cumsum(dim=0)
    if mass[-1] < top_p:
        ordered = probabilities.sort(descending=True).values
        mass = ordered.cumsum(dim=0)
    last = (mass < top_p).sum().clamp_(max=ordered.numel() - 1)
    return ordered[last]
