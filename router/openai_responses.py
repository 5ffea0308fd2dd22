"""From a call's chunks to OpenAI's objects. Choices are numbered prompt by prompt: prompt * n + sample."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from splitserve.cluster.messages import TokenLogprobs
from splitserve.router.detokenizer import Detokenizer
from splitserve.router.openai_requests import Call, Prompt
from splitserve.router.output_buffer import Delta
from splitserve.router.parsers.message import MessageParser
from splitserve.router.parsers.pieces import ToolCall
from splitserve.router.request import Chunk, Summary
from splitserve.router.validate import Validator

LOWEST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
DONE = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

Json = dict[str, Any]


@dataclass
class _Part:
    """What is new of one choice or, gathered, all of it. A prompt's first token has no logprobs."""

    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs | None]
    finish_reason: Literal["stop", "length", "tool_calls"] | None
    is_first: bool
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()
    calls_before: int = 0

    def add(self, later: _Part) -> None:
        self.text += later.text
        self.reasoning += later.reasoning
        self.calls += later.calls
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason


class Answer(ABC):
    """The answer to one call as it grows. `accept` gathers it whole; `events` streams it."""

    object_name: str
    chunk_name: str
    id_prefix: str

    def __init__(self, call: Call, validator: Validator) -> None:
        self.tokenizer = validator.tokenizer
        self._call = call
        self._model = validator.model
        self._created = int(time.time())
        self._id = ""
        self._parts: dict[int, _Part] = {}
        self._begun: set[int] = set()

    def accept(self, prompt: int, chunk: Chunk) -> None:
        """Take what is new of prompt number `prompt`."""
        for index, part in self._new_parts(prompt, chunk):
            if part.is_first:
                self._parts[index] = part
            else:
                self._parts[index].add(part)

    def whole(self, summaries: Sequence[Summary]) -> Json:
        """All that was gathered."""
        choices = [self.choice(index, part) for index, part in sorted(self._parts.items())]
        return {**self._head(self.object_name), "choices": choices, "usage": self._usage(summaries)}

    def events(self, prompt: int, chunk: Chunk) -> bytes:
        """What is new of prompt number `prompt`, as server-sent events; nothing if no more text is complete yet."""
        parts = self._new_parts(prompt, chunk)
        return b"".join(
            b"%b[%b]%b" % (self._event_head, to_json(self.chunk_choice(index, part)), self._event_tail)
            for index, part in parts
            if part.is_first or part.text or part.logprobs or part.finish_reason or part.reasoning or part.calls
        )

    def last_events(self, summaries: Sequence[Summary]) -> bytes:
        """The end of a stream."""
        if not self._call.include_usage:
            return DONE
        return event({**self._head(self.chunk_name), "choices": [], "usage": self._usage(summaries)}) + DONE

    @abstractmethod
    def choice(self, index: int, part: _Part) -> Json:
        """A whole choice."""

    @abstractmethod
    def chunk_choice(self, index: int, part: _Part) -> Json:
        """A choice of a stream's event."""

    def _new_parts(self, prompt: int, chunk: Chunk) -> list[tuple[int, _Part]]:
        self._id = self._id or self.id_prefix + chunk.request_id
        first_index = prompt * self._call.prompts[prompt].params.n
        return [(first_index + delta.index, self._part(prompt, first_index, delta, chunk)) for delta in chunk.deltas]

    def _part(self, prompt: int, first_index: int, delta: Delta, chunk: Chunk) -> _Part:
        is_first = first_index + delta.index not in self._begun
        self._begun.add(first_index + delta.index)
        part = _Part(delta.text, delta.token_ids, [*delta.logprobs], delta.finish_reason, is_first)
        if not self._call.answered:
            part = _Part("", [], [], "length", is_first)
        if is_first and self._call.echo:
            asked, before = self._call.prompts[prompt], [None, *chunk.prompt_logprobs]
            wanted = asked.params.prompt_logprobs is not None
            echo = _Part(asked.text, [*asked.token_ids], before if wanted else [], None, True)
            echo.add(part)
            return echo
        return part

    @cached_property
    def _event_head(self) -> bytes:
        """What each event begins with, up to its choices; `_event_tail` is what follows them."""
        return b"data: " + to_json(self._head(self.chunk_name)).removesuffix(b"}") + b',"choices":'

    @cached_property
    def _event_tail(self) -> bytes:
        return b',"usage":null}\n\n' if self._call.include_usage else b"}\n\n"

    def _head(self, name: str) -> Json:
        return {"id": self._id, "object": name, "created": self._created, "model": self._model}

    def _usage(self, summaries: Sequence[Summary]) -> Json:
        prompt_tokens = sum(summary.prompt_tokens for summary in summaries)
        completion_tokens = sum(summary.completion_tokens for summary in summaries) if self._call.answered else 0
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(summary.cached_tokens for summary in summaries)},
        }


class CompletionAnswer(Answer):
    """Of /v1/completions."""

    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl-"

    def __init__(self, call: Call, validator: Validator) -> None:
        super().__init__(call, validator)
        new_detokenizer = self.tokenizer.detokenizer
        self._offsets = [
            _TextOffsets(prompt, new_detokenizer()) for prompt in call.prompts for _ in range(prompt.params.n)
        ]

    def choice(self, index: int, part: _Part) -> Json:
        logprobs = self._logprobs(index, part) if part.logprobs else None
        return {"index": index, "text": part.text, "logprobs": logprobs, "finish_reason": part.finish_reason}

    chunk_choice = choice

    def _logprobs(self, index: int, part: _Part) -> Json:
        """Lists with an entry a token. Offsets count characters of the choice's text."""
        offsets = self._offsets[index]
        return {
            "tokens": [_name(self.tokenizer.token_bytes(token)) for token in part.token_ids],
            "token_logprobs": [entry and _number(entry.logprob) for entry in part.logprobs],
            "top_logprobs": list(map(self._top, part.token_ids, part.logprobs)),
            "text_offset": [offsets.next(token) for token in part.token_ids],
        }

    def _top(self, token_id: int, entry: TokenLogprobs | None) -> dict[str, float] | None:
        """The likeliest tokens and the one that came; of tokens with one name, the likeliest."""
        if entry is None:
            return None
        top: dict[str, float] = {}
        for token, logprob in (*entry.top, (token_id, entry.logprob)):
            top.setdefault(_name(self.tokenizer.token_bytes(token)), _number(logprob))
        return top


class ChatAnswer(Answer):
    """Of /v1/chat/completions."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl-"

    def __init__(self, call: Call, validator: Validator) -> None:
        super().__init__(call, validator)
        inside = call.reasons and self.tokenizer.decode(call.prompts[0].token_ids[-4:]).rstrip().endswith("<think>")
        self._parsers: dict[int, MessageParser] = defaultdict(
            lambda: MessageParser(validator.family, reasons=call.reasons, inside=inside, most_calls=call.most_calls)
        )

    def choice(self, index: int, part: _Part) -> Json:
        message: Json = {"role": "assistant", "content": part.text, "refusal": None}
        if part.reasoning:
            message["reasoning_content"] = part.reasoning
        if part.calls:
            message["content"] = part.text or None
            message["tool_calls"] = self._calls(index, part)
        return {"index": index, "message": message, **self._rest(part)}

    def chunk_choice(self, index: int, part: _Part) -> Json:
        delta: Json = {"role": "assistant"} if part.is_first else {}
        if part.reasoning:
            delta["reasoning_content"] = part.reasoning
        if part.calls:
            numbered = enumerate(self._calls(index, part), part.calls_before)
            delta["tool_calls"] = [{"index": number, **call} for number, call in numbered]
        if part.text or not (part.reasoning or part.calls):
            delta["content"] = part.text
        return {"index": index, "delta": delta, **self._rest(part)}

    def _part(self, prompt: int, first_index: int, delta: Delta, chunk: Chunk) -> _Part:
        part = super()._part(prompt, first_index, delta, chunk)
        if not (self._call.reasons or self._call.most_calls != 0):
            return part
        parser = self._parsers[first_index + delta.index]
        part.calls_before = parser.calls
        part.reasoning, part.text, part.calls = parser.push(part.text, last=part.finish_reason is not None)
        if part.finish_reason == "stop" and parser.calls:
            part.finish_reason = "tool_calls"
        return part

    def _calls(self, index: int, part: _Part) -> list[Json]:
        return [
            {
                "id": f"call-{self._id}-{index}-{number}",
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for number, call in enumerate(part.calls, part.calls_before)
        ]

    def _rest(self, part: _Part) -> Json:
        content = [
            self._token(token, entry.logprob) | {"top_logprobs": [self._token(*one) for one in entry.top]}
            for token, entry in zip(part.token_ids, part.logprobs, strict=False)
            if entry is not None
        ]
        logprobs = {"content": content, "refusal": None} if content else None
        return {"logprobs": logprobs, "finish_reason": part.finish_reason}

    def _token(self, token_id: int, logprob: float) -> Json:
        data = self.tokenizer.token_bytes(token_id)
        return {"token": _name(data), "logprob": _number(logprob), "bytes": list(data)}


class _TextOffsets:
    """Where each token's characters begin in its choice's text, which an echo of the prompt may begin."""

    def __init__(self, prompt: Prompt, detokenizer: Detokenizer) -> None:
        self._of_prompt = iter(prompt.offsets)
        self._detokenizer = detokenizer
        self._length = len(prompt.text)

    def next(self, token_id: int) -> int:
        if (offset := next(self._of_prompt, None)) is not None:
            return offset
        offset = self._length
        self._length += len(self._detokenizer.push(token_id))
        return offset


def event(content: Json) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(content) + b"\n\n"


def to_json(content: Json) -> bytes:
    """JSON in ASCII, which any text can be put into."""
    return _encode(content).encode()


def _name(data: bytes) -> str:
    """A token as text; as OpenAI does it, `bytes:\\xe2\\x82` where it is no whole characters."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _number(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
