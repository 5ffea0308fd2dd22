"""What a request may ask of the sampler. The defaults are documented, and shown by every command that uses them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from splitserve.cluster.codec import message
from splitserve.cluster.errors import InvalidRequest

MAX_SAMPLES = 64
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARACTERS = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIASES = 1024
MAX_GRAMMAR_CHARACTERS = 2**20


@message
@dataclass(frozen=True)
class SamplingParams:
    """Sampling parameters of one request.

    The token at a position is argmax(filtered logits / temperature + Gumbel noise); the noise is a pure function of
    (seed, sample index, position, token id), so a request repeats exactly whatever batch it runs in. Temperature 0
    is greedy. Order of the filters: logit_bias, penalties, min_tokens, grammar, temperature, top_k, top_p, min_p. Log
    probabilities are the model's own, before any of these. `max_tokens` None means up to the context's end. `grammar`
    is what the answer must match, in llguidance's form; where nothing but its end is left, the answer ends.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    seed: int = 0
    n: int = 1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None

    @property
    def penalised(self) -> bool:
        """Whether what was said already changes the logits."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty)

    def validate(self, vocab_size: int) -> None:
        """Raise InvalidRequest naming the first field that is out of its range."""
        _between("max_tokens", self.max_tokens, 1, 2**31)
        _between("min_tokens", self.min_tokens, 0, self.max_tokens if self.max_tokens is not None else 2**31)
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_k", self.top_k, 0, 2**31)
        _between("top_p", self.top_p, 0.0, 1.0, above=True)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("seed", self.seed, -(2**63), 2**63 - 1)
        _between("n", self.n, 1, MAX_SAMPLES)
        _between("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _between("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        self._validate_collections(vocab_size)
        self._validate_grammar()

    def _validate_collections(self, vocab_size: int) -> None:
        _at_most("stop", len(self.stop), MAX_STOP_STRINGS)
        _at_most("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKEN_IDS)
        _at_most("logit_bias", len(self.logit_bias), MAX_LOGIT_BIASES)
        for text in self.stop:
            if not 0 < len(text) <= MAX_STOP_STRING_CHARACTERS:
                raise InvalidRequest("stop", text, f"give strings of 1 to {MAX_STOP_STRING_CHARACTERS} characters")
        for token in self.stop_token_ids:
            _between("stop_token_ids", token, 0, vocab_size - 1)
        for token, bias in self.logit_bias.items():
            _between("logit_bias", token, 0, vocab_size - 1)
            _between("logit_bias", bias, -100.0, 100.0)

    def _validate_grammar(self) -> None:
        if self.grammar is None:
            return
        if not 0 < len(self.grammar) <= MAX_GRAMMAR_CHARACTERS:
            expected = f"give 1 to {MAX_GRAMMAR_CHARACTERS} characters"
            raise InvalidRequest("grammar", f"{len(self.grammar)} characters", expected)
        for name in ("min_tokens", "ignore_eos"):
            if getattr(self, name):
                expected = "leave it out: a constrained answer ends where it is complete"
                raise InvalidRequest(name, getattr(self, name), expected)


def check_prompt(token_ids: Sequence[int], max_model_len: int, vocab_size: int) -> None:
    """Raise InvalidRequest for an empty, too long or out-of-vocabulary prompt. One token must fit behind it."""
    if not token_ids:
        raise InvalidRequest("prompt", "no tokens", "give at least one")
    if len(token_ids) >= max_model_len:
        raise InvalidRequest("prompt", f"{len(token_ids)} tokens", f"give fewer than the context of {max_model_len}")
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= vocab_size:
        raise InvalidRequest("token_ids", low if low < 0 else high, f"give ids from 0 to {vocab_size - 1}")


def _between(name: str, value: float | None, low: float, high: float, *, above: bool = False) -> None:
    if value is None:
        return
    if not (low < value <= high if above else low <= value <= high):  # NaN is in no range
        raise InvalidRequest(name, value, f"give a value {'above' if above else 'from'} {low:.12g} to {high:.12g}")


def _at_most(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise InvalidRequest(name, f"{count} entries", f"give at most {limit}")
