"""What every surface checks of a request. Every fault is an InvalidRequest or NotFound that names its field."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from splitserve.cluster.errors import InvalidRequest, NotFound
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.chat_template import Conversation
from splitserve.router.constraint import Constraint, GrammarChecker
from splitserve.router.output_buffer import Answered
from splitserve.router.parsers.families import Family
from splitserve.router.tokenizer import Tokenizer

MOST_SALT = 256  # characters
SHORT_TEXT = 8192  # characters; longer texts are tokenised in a thread, so that other requests go on

T = TypeVar("T")


class Validator:
    """Checks requests against one model: its served name, tokenizer, grammars, and context in tokens.

    `family` says in what form it calls tools and reasons.
    """

    def __init__(
        self, model: str, tokenizer: Tokenizer, grammars: GrammarChecker, family: Family, context: int
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.grammars = grammars
        self.family = family
        self.context = context

    def check_model(self, name: str) -> None:
        """Raise NotFound unless `name` is the served model; empty stands for it."""
        if name not in ("", self.model):
            raise NotFound(f"model: found {name[:80]!r}; this cluster serves {self.model!r}")

    async def encode(self, field: str, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a text, or the ids themselves once they are checked."""
        if not isinstance(prompt, str):
            self.room(prompt)
            self.tokenizer.check_ids(field, prompt)
            return list(prompt)
        if not prompt:
            raise InvalidRequest(field, prompt, "give at least one character")
        self._check_length(field, len(prompt))
        return await _off_loop_if_long(self.tokenizer.encode, prompt, len(prompt))

    def cache_salt(self, salt: str) -> str:
        """The salt of a request's prefixes, checked."""
        if len(salt) > MOST_SALT:
            raise InvalidRequest("cache_salt", f"{len(salt)} characters", f"give at most {MOST_SALT}")
        return salt

    async def encode_chat(
        self, messages: Conversation, tools: Sequence[Mapping[str, Any]] = (), *, remember: bool = True
    ) -> list[int]:
        """Token ids of a conversation, ready for the assistant's answer, who may call `tools`.

        `remember` what will come again with its next turn.
        """
        if not messages:
            raise InvalidRequest("messages", [], "give at least one message")
        length = sum(len(message["role"]) + len(message["content"]) for message in messages)
        self._check_length("messages", length)
        for index, message in enumerate(messages):
            if not message["role"]:
                raise InvalidRequest(f"messages[{index}].role", "", "give a role, such as user")
        length += len(json.dumps([*tools, *(message.get("tool_calls", ()) for message in messages)]))
        self._check_length("tools", length)
        encode = partial(self.tokenizer.encode_chat, tools=tools, remember=remember)
        return await _off_loop_if_long(encode, messages, length)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        if len(token_ids) > self.context:
            raise InvalidRequest("token_ids", f"{len(token_ids)} ids", f"give at most the context's {self.context}")
        return self.tokenizer.decode(token_ids)

    def room(self, token_ids: Sequence[int]) -> int:
        """How many tokens fit behind a prompt; at least one must."""
        if not token_ids:
            raise InvalidRequest("prompt", "no tokens", "give at least one token")
        room = self.context - len(token_ids)
        if room < 1:
            expected = f"the context holds {self.context}, the answer's included; shorten the prompt"
            raise InvalidRequest("prompt", f"{len(token_ids)} tokens", expected)
        return room

    def check_params(self, token_ids: Sequence[int], params: SamplingParams) -> None:
        """Check sampling parameters, and that prompt and answer fit into the context."""
        params.validate(self.tokenizer.vocab_size)
        room = self.room(token_ids)
        if params.max_tokens is not None and params.max_tokens > room:
            expected = f"after {len(token_ids)} prompt tokens the context of {self.context} has room for {room}"
            raise InvalidRequest("max_tokens", params.max_tokens, expected)

    async def constrain(self, params: SamplingParams, constraint: Constraint | None) -> SamplingParams:
        """`params` for answers that match `constraint`, if there is one."""
        return replace(params, grammar=await self.grammars.grammar(constraint)) if constraint else params

    def check_answered(self, answered: Sequence[Answered], token_ids: Sequence[int], params: SamplingParams) -> None:
        """Check what a client has of an answer to a prompt: nothing, or part of each sample."""
        if answered and len(answered) != params.n:
            raise InvalidRequest("answered", f"{len(answered)} samples", f"give none, or all {params.n}")
        room = min(self.room(token_ids), params.max_tokens or self.context)
        for index, sample in enumerate(answered):
            field = f"answered[{index}].token_ids"
            if len(sample.token_ids) > room - (not sample.finish_reason):
                expected = f"an answer that goes on has fewer than {room}"
                raise InvalidRequest(field, f"{len(sample.token_ids)} tokens", expected)
            self.tokenizer.check_ids(field, sample.token_ids)

    def _check_length(self, field: str, characters: int) -> None:
        """Refuse what no tokenisation could fit into the context, before doing the work."""
        if characters > self.context * self.tokenizer.longest_token:
            raise InvalidRequest(field, f"{characters} characters", f"the context holds {self.context} tokens")


async def _off_loop_if_long(encode: Callable[[T], list[int]], text: T, characters: int) -> list[int]:
    return encode(text) if characters <= SHORT_TEXT else await asyncio.to_thread(encode, text)
