"""From wire requests to checked ones. Every fault is an InvalidRequest or NotFound that names its field."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from splitserve.cluster.errors import InvalidRequest, NotFound
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.output_buffer import Answered
from splitserve.router.tokenizer import Tokenizer
from splitserve.router.v1 import splitserve_pb2 as pb

SHORT_TEXT = 8192  # characters; longer texts are tokenised in a thread, so that other requests go on

FINISH_REASONS: dict[int, Literal["stop", "length"]] = {
    pb.FINISH_REASON_STOP: "stop",
    pb.FINISH_REASON_LENGTH: "length",
}

T = TypeVar("T")


class Validator:
    """Checks requests against one model: its served name, tokenizer, and context in tokens."""

    def __init__(self, model: str, tokenizer: Tokenizer, context: int) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.context = context

    async def generate(self, request: pb.GenerateRequest) -> tuple[list[int], SamplingParams, list[Answered]]:
        """Prompt token ids, sampling parameters and what the client has already, of a Generate call."""
        self._check_model(request.model)
        match request.WhichOneof("prompt"):
            case "text":
                token_ids = await self._encode_text(request.text)
            case "token_ids":
                self._room(len(request.token_ids.ids))
                token_ids = list(request.token_ids.ids)
                self.tokenizer.check_ids("token_ids", token_ids)
            case _:
                raise InvalidRequest("prompt", None, "give text or token_ids")
        return *(fitting := self._fit(token_ids, request.sampling)), self._answered(request.answered, *fitting)

    async def chat(self, request: pb.ChatRequest) -> tuple[list[int], SamplingParams, list[Answered]]:
        """The same of a Chat call."""
        self._check_model(request.model)
        fitting = self._fit(await self._encode_messages(request.messages), request.sampling)
        return *fitting, self._answered(request.answered, *fitting)

    async def tokenize(self, request: pb.TokenizeRequest) -> list[int]:
        """Token ids of a text or of a conversation."""
        self._check_model(request.model)
        match request.WhichOneof("input"):
            case "text":
                return await self._encode_text(request.text)
            case "conversation":
                return await self._encode_messages(request.conversation.messages)
            case _:
                raise InvalidRequest("input", None, "give text or a conversation")

    def detokenize(self, request: pb.DetokenizeRequest) -> str:
        """Text of token ids."""
        self._check_model(request.model)
        if len(request.token_ids) > self.context:
            raise InvalidRequest(
                "token_ids", f"{len(request.token_ids)} ids", f"give at most the context's {self.context}"
            )
        return self.tokenizer.decode(request.token_ids)

    def _check_model(self, name: str) -> None:
        if name not in ("", self.model):
            raise NotFound(f"model: found {name[:80]!r}; this cluster serves {self.model!r}")

    async def _encode_text(self, text: str) -> list[int]:
        if not text:
            raise InvalidRequest("text", text, "give at least one character")
        self._check_length("text", len(text))
        return await _off_loop_if_long(self.tokenizer.encode, text, len(text))

    async def _encode_messages(self, messages: Sequence[pb.Message]) -> list[int]:
        if not messages:
            raise InvalidRequest("messages", [], "give at least one message")
        length = sum(len(message.role) + len(message.content) for message in messages)
        self._check_length("messages", length)
        for index, message in enumerate(messages):
            if not message.role:
                raise InvalidRequest(f"messages[{index}].role", "", "give a role, such as user")
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        return await _off_loop_if_long(self.tokenizer.encode_chat, conversation, length)

    def _check_length(self, field: str, characters: int) -> None:
        """Refuse what no tokenisation could fit into the context, before doing the work."""
        if characters > self.context * self.tokenizer.longest_token:
            raise InvalidRequest(field, f"{characters} characters", f"the context holds {self.context} tokens")

    def _fit(self, token_ids: list[int], sampling: pb.Sampling) -> tuple[list[int], SamplingParams]:
        params = sampling_params(sampling)
        params.validate(self.tokenizer.vocab_size)
        if not token_ids:
            raise InvalidRequest("prompt", "no tokens", "give at least one token")
        room = self._room(len(token_ids))
        if params.max_tokens is not None and params.max_tokens > room:
            expected = f"after {len(token_ids)} prompt tokens the context of {self.context} has room for {room}"
            raise InvalidRequest("max_tokens", params.max_tokens, expected)
        return token_ids, params

    def _answered(
        self, answered: Sequence[pb.Answered], token_ids: list[int], params: SamplingParams
    ) -> list[Answered]:
        if answered and len(answered) != params.n:
            raise InvalidRequest("answered", f"{len(answered)} samples", f"give none, or all {params.n}")
        room = min(self._room(len(token_ids)), params.max_tokens or self.context)
        for index, sample in enumerate(answered):
            field = f"answered[{index}].token_ids"
            if len(sample.token_ids) > room - (not sample.finish_reason):
                expected = f"an answer that goes on has fewer than {room}"
                raise InvalidRequest(field, f"{len(sample.token_ids)} tokens", expected)
            self.tokenizer.check_ids(field, sample.token_ids)
        return [Answered(list(sample.token_ids), FINISH_REASONS.get(sample.finish_reason)) for sample in answered]

    def _room(self, tokens: int) -> int:
        """How many tokens an answer to a prompt of so many may have."""
        if tokens >= self.context:
            expected = f"the context holds {self.context}, the answer's included; shorten the prompt"
            raise InvalidRequest("prompt", f"{tokens} tokens", expected)
        return self.context - tokens


def sampling_params(sampling: pb.Sampling) -> SamplingParams:
    """Sampling parameters with the defaults of SamplingParams for what is not set. They are not validated yet."""
    return SamplingParams(**{field.name: _plain(value) for field, value in sampling.ListFields()})


def _plain(value: Any) -> Any:
    """The Python value of a protobuf field: maps as dict, repeated fields as tuple."""
    if isinstance(value, Mapping):
        return dict(value)
    return value if isinstance(value, int | float) else tuple(value)


async def _off_loop_if_long(encode: Callable[[T], list[int]], text: T, characters: int) -> list[int]:
    return encode(text) if characters <= SHORT_TEXT else await asyncio.to_thread(encode, text)
