"""One sample of one request, as an engine sees it."""

from __future__ import annotations

from dataclasses import dataclass, field

from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.messages import FinishReason, Prefill, Reserve, SampleToken, TokenLogprobs
from splitserve.cluster.sampling import MAX_SAMPLES, SamplingParams, check_prompt
from splitserve.engine.block_manager import BlockTable
from splitserve.engine.grammar import Grammars, GrammarState
from splitserve.engine.sampler import SamplerRow


@dataclass(frozen=True)
class ModelLimits:
    """What the model sets: `max_model_len` bounds prompt and output together, in tokens."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]

    def check(self, request: Prefill | Reserve) -> None:
        """Raise InvalidRequest for parameters or a prompt that this model cannot take."""
        request.params.validate(self.vocab_size)
        check_prompt(request.token_ids, self.max_model_len, self.vocab_size)
        answered, limit = request.output_tokens, request.params.max_tokens
        if not 0 <= answered < len(request.token_ids) or (limit is not None and answered >= limit):
            raise InvalidRequest("output_tokens", answered, "give fewer than token_ids has, and than max_tokens")
        if answered and request.params.n != 1:
            raise InvalidRequest("n", request.params.n, "go on with one sample at a time")
        if request.params.grammar is not None and not self.eos_token_ids:
            raise InvalidRequest("grammar", "a model without an end-of-sequence token", "leave it out")
        if not 0 <= request.first_sample <= MAX_SAMPLES - request.params.n:
            raise InvalidRequest("first_sample", request.first_sample, f"samples have numbers below {MAX_SAMPLES}")


@dataclass(eq=False)
class Sequence:
    """Prompt and output in one list; the KV of the first `computed_tokens` of them is in the pages of `table`.

    `max_model_len` bounds prompt and output together, in tokens. `prompt_tokens` is how many of `token_ids` came
    with the request: tokens that an earlier attempt generated already are output, not prompt. `in_flight` tokens are
    being computed that the host does not know yet. `grammar` is where a constrained one stands, its tokens taken.
    """

    request_id: str
    attempt: int
    sample: int
    token_ids: list[int]
    prompt_tokens: int
    params: SamplingParams
    eos_token_ids: frozenset[int]
    max_model_len: int
    extra_keys: tuple[str, ...] = ()
    table: BlockTable | None = None
    computed_tokens: int = 0
    in_flight: int = 0
    finish_reason: FinishReason | None = None
    grammar: GrammarState | None = None
    stopping_ids: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        eos = frozenset() if self.params.ignore_eos else self.eos_token_ids
        self.stopping_ids = eos | frozenset(self.params.stop_token_ids)

    @property
    def output_tokens(self) -> int:
        return len(self.token_ids) - self.prompt_tokens

    @property
    def pending_tokens(self) -> int:
        """Tokens whose KV is not in the cache yet: one in decode, the rest of the prompt in prefill."""
        return len(self.token_ids) - self.computed_tokens

    @property
    def length_limit(self) -> int:
        """Tokens at which it ends, prompt and output together."""
        limit = self.params.max_tokens
        return self.max_model_len if limit is None else min(self.max_model_len, self.prompt_tokens + limit)

    @property
    def needs_step(self) -> bool:
        """Whether another decode step can be asked for: not when those in flight reach the limit."""
        return len(self.token_ids) + self.in_flight < self.length_limit

    @property
    def tokens_to_hold(self) -> int:
        """Tokens that the table must hold for the next step."""
        return min(len(self.token_ids) + self.in_flight, self.length_limit - 1)

    @classmethod
    def of(cls, request: Prefill | Reserve, index: int, limits: ModelLimits) -> Sequence:
        """The `index`-th sample that a request asks for, nothing computed yet."""
        return cls(
            request_id=request.request_id,
            attempt=request.attempt,
            sample=request.first_sample + index,
            token_ids=list(request.token_ids),
            prompt_tokens=len(request.token_ids) - request.output_tokens,
            params=request.params,
            eos_token_ids=limits.eos_token_ids,
            max_model_len=limits.max_model_len,
            extra_keys=request.extra_keys,
        )

    def take(self, token_id: int, logprobs: TokenLogprobs | None = None) -> SampleToken:
        """Append a newly sampled token; the message about it says whether, and why, the sequence ends with it."""
        position = len(self.token_ids)
        self.token_ids.append(token_id)
        self.finish_reason = self._finish_reason(token_id)
        return SampleToken(self.request_id, self.attempt, self.sample, position, token_id, self.finish_reason, logprobs)

    def constrain(self, grammars: Grammars) -> None:
        """Have its next tokens match the grammar that it asks for, if it does."""
        if self.params.grammar is not None:
            self.grammar = grammars.begin(self.params.grammar, self.token_ids[self.prompt_tokens :])

    def sampler_row(self) -> SamplerRow:
        """What the sampler needs to choose the next token."""
        mask = self.grammar.mask if self.grammar else None
        return SamplerRow(self.params, self.sample, self.token_ids, self.prompt_tokens, self.stopping_ids, mask)

    def _finish_reason(self, token_id: int) -> FinishReason | None:
        if token_id in self.stopping_ids and self.output_tokens > self.params.min_tokens:
            return "stop"
        return "length" if len(self.token_ids) >= self.length_limit else None
