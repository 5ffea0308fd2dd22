"""The fields of OpenAI's JSON bodies, with vLLM's additions.

What would change an answer and cannot be honoured is refused by name; what changes nothing (`user`, `metadata`) is
ignored. Fields that are null are as good as absent.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.sampling import SamplingParams

NO_FIELD = "no such field here; leave it out"
HARMLESS = {"user", "metadata", "store", "safety_identifier", "service_tier", "prediction"}
HARMLESS |= {"prompt_cache_key", "prompt_cache_retention"}
# Accepted with these values, which ask for what is done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "modalities": (["text"],),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "use_beam_search": (False,),
}

B = TypeVar("B", bound="_Model")
TokenIds = Annotated[list[int], FailFast()]  # one fault is told: looking for a million more takes seconds


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # padding, which is not sent
    continuous_usage_stats: bool = False  # usage comes once, at the end


class _Model(_Strict):
    model: str = ""


class _Body(_Model):
    """What completions and chat have in common; below `logit_bias`, what vLLM adds to OpenAI's fields."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = 1
    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: Any = []  # a text or several
    logit_bias: dict[str, Any] = {}  # token ids to numbers
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    min_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: TokenIds = []
    priority: int = Field(default=0, ge=-(2**31), lt=2**31)
    cache_salt: str = ""
    response_format: Any = None
    structured_outputs: Any = None

    def sampling_params(self, logprobs: int | None) -> SamplingParams:
        """Sampling parameters, not validated yet. Without a seed, an answer is another one each time."""
        stop = self.stop if isinstance(self.stop, list) else [self.stop]
        return SamplingParams(
            max_tokens=self.max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_k=0 if self.top_k == -1 else self.top_k,  # both mean off
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=dict(_bias(*each) for each in self.logit_bias.items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            n=self.n,
            stop=tuple(text_of("stop", text) for text in stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with usage."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options", "no stream", "give it with stream: true only")
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionBody(_Body):
    prompt: Any
    best_of: int | None = None
    echo: bool = False
    logprobs: int | None = None


class ChatBody(_Body):
    messages: list[Any]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    tools: Any = None
    tool_choice: Any = None
    parallel_tool_calls: bool = True


class TokenizeBody(_Model):
    prompt: str | None = None
    messages: list[Any] | None = None


class DetokenizeBody(_Model):
    tokens: TokenIds


def parse(body_type: type[B], raw: dict[str, Any]) -> B:
    """The fields of `raw`, checked. Raises InvalidRequest naming the first that is wrong."""
    fields = {name: value for name, value in raw.items() if value is not None and name not in HARMLESS}
    for name in fields.keys() & NEUTRAL.keys():
        if (value := fields.pop(name)) not in NEUTRAL[name]:
            raise InvalidRequest(name, value, "this cluster does not support it yet; leave it out")
    if unknown := next((name for name in fields if name not in body_type.model_fields), None):
        raise InvalidRequest(unknown, fields[unknown], NO_FIELD)
    try:
        return body_type.model_validate(fields)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        field = ".".join(map(str, details["loc"]))
        match details["type"]:
            case "extra_forbidden":
                raise InvalidRequest(field, details["input"], NO_FIELD) from error
            case "missing":
                raise InvalidRequest(field, None, "this field is needed") from error
        raise InvalidRequest(field, details["input"], details["msg"].replace("Input", "it", 1)) from error


def text_of(field: str, text: Any) -> str:
    """A string that has an encoding. Raises InvalidRequest."""
    if not isinstance(text, str):
        raise InvalidRequest(field, text, "give a text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            field, text[error.start], "give whole characters: half a surrogate pair is none"
        ) from error
    return text


def _bias(token: str, bias: Any) -> tuple[int, float]:
    if type(bias) not in (int, float):
        raise InvalidRequest(f"logit_bias.{token}", bias, "give a number")
    try:
        return int(token), float(bias)
    except OverflowError as error:
        raise InvalidRequest(f"logit_bias.{token}", bias, "give a number from -100 to 100") from error
    except ValueError as error:
        raise InvalidRequest("logit_bias", token, "give token ids as keys") from error
