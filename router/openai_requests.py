"""From OpenAI's JSON bodies to checked calls: prompts as token ids, and what is to be sampled behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from splitserve.cluster.errors import InvalidRequest
from splitserve.cluster.sampling import SamplingParams
from splitserve.router.chat_template import Conversation
from splitserve.router.openai_bodies import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, parse, text_of
from splitserve.router.openai_constraints import constraint_of
from splitserve.router.openai_tools import calls_of, tools_of
from splitserve.router.parsers.families import Family
from splitserve.router.validate import Validator

COMPLETION_TOKENS = 16  # OpenAI's default where a completion names no max_tokens
MAX_PROMPTS = 256  # of one request
# What an assistant thought on earlier turns is not told to it again.
MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


@dataclass(frozen=True)
class Prompt:
    """One of a call's prompts. `text` is what stands before its answer where the call asks for `echo`, and `offsets`
    says where in it each token begins, where log probabilities are asked for too."""

    token_ids: list[int]
    params: SamplingParams
    text: str = ""
    offsets: Sequence[int] = ()


@dataclass(frozen=True)
class Call:
    """A checked call: its prompts are answered side by side. `answered` is False where only the echo is wanted.

    Of a chat, `reasons` says whether its answers have a part of reasoning, and `most_calls` how many tools each may
    call (None: any number).
    """

    prompts: list[Prompt]
    stream: bool
    include_usage: bool
    priority: int
    cache_salt: str
    echo: bool = False
    answered: bool = True
    reasons: bool = False
    most_calls: int | None = 0


async def completion(raw: dict[str, Any], validator: Validator) -> Call:
    """A call of /v1/completions."""
    body = parse(CompletionBody, raw)
    validator.check_model(body.model)
    if body.best_of not in (None, body.n):
        raise InvalidRequest("best_of", body.best_of, f"leave it out, or give n, {body.n}")
    answered = not (body.echo and body.max_tokens == 0)
    constraint = constraint_of(body.response_format, body.structured_outputs)
    params = await validator.constrain(body.sampling_params(body.logprobs), constraint)
    if body.echo:
        params = replace(params, prompt_logprobs=body.logprobs)
    prompts = []
    for field, prompt in _prompts(body.prompt):
        token_ids = await validator.encode(field, prompt)
        room = validator.room(token_ids)
        limit = min(COMPLETION_TOKENS, room) if body.max_tokens is None else body.max_tokens
        fitted = replace(params, max_tokens=limit if answered else 1)
        validator.check_params(token_ids, fitted)
        text = (prompt if isinstance(prompt, str) else validator.tokenizer.decode(token_ids)) if body.echo else ""
        wants_offsets = fitted.prompt_logprobs is not None
        offsets = await asyncio.to_thread(validator.tokenizer.offsets, prompt) if wants_offsets else ()
        prompts.append(Prompt(token_ids, fitted, text, offsets))
    cache_salt = validator.cache_salt(text_of("cache_salt", body.cache_salt))
    return Call(prompts, body.stream, body.include_usage, body.priority, cache_salt, body.echo, answered)


async def chat(raw: dict[str, Any], validator: Validator) -> Call:
    """A call of /v1/chat/completions."""
    body = parse(ChatBody, raw)
    validator.check_model(body.model)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs", body.top_logprobs, "give it with logprobs: true only")
    params = body.sampling_params((body.top_logprobs or 0) if body.logprobs else None)
    params = await validator.constrain(params, constraint_of(body.response_format, body.structured_outputs))
    tools = tools_of(body.tools, body.tool_choice, validator.family, params.grammar)
    params = await validator.constrain(params, tools.constraint)
    if body.max_completion_tokens is not None:
        params = replace(params, max_tokens=body.max_completion_tokens)
    cache_salt = validator.cache_salt(text_of("cache_salt", body.cache_salt))
    conversation = _conversation(body.messages, validator.family)
    token_ids = await validator.encode_chat(conversation, tools.offered, remember=not cache_salt)
    validator.check_params(token_ids, params)
    return Call(
        [Prompt(token_ids, params)],
        body.stream,
        body.include_usage,
        body.priority,
        cache_salt,
        reasons=validator.family.reasons and params.grammar is None,
        most_calls=0 if not tools.offered else None if body.parallel_tool_calls else 1,
    )


async def tokenize(raw: dict[str, Any], validator: Validator) -> list[int]:
    """Token ids of a text or of a conversation."""
    body = parse(TokenizeBody, raw)
    validator.check_model(body.model)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("prompt", body.prompt, "give prompt or messages")
    if body.messages is not None:
        return await validator.encode_chat(_conversation(body.messages, validator.family))
    return await validator.encode("prompt", text_of("prompt", body.prompt))


def detokenize(raw: dict[str, Any], validator: Validator) -> str:
    """Text of token ids."""
    body = parse(DetokenizeBody, raw)
    validator.check_model(body.model)
    return validator.decode(body.tokens)


def _prompts(prompt: Any) -> list[tuple[str, str | Sequence[int]]]:
    """Field and content of each prompt: one or several, as texts or token ids."""
    if isinstance(prompt, str):
        return [("prompt", text_of("prompt", prompt))]
    if not isinstance(prompt, list) or not prompt:
        raise InvalidRequest("prompt", prompt, "give a text, token ids, or a list of either")
    if type(prompt[0]) is int:
        return [("prompt", _ids("prompt", prompt))]
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest("prompt", f"{len(prompt)} prompts", f"give at most {MAX_PROMPTS}")
    named = [(f"prompt[{index}]", one) for index, one in enumerate(prompt)]
    return [(field, text_of(field, one) if isinstance(one, str) else _ids(field, one)) for field, one in named]


def _ids(field: str, ids: Any) -> Sequence[int]:
    if not isinstance(ids, list) or any(type(token) is not int for token in ids):
        raise InvalidRequest(field, ids, "give a text or a list of token ids")
    return ids


def _conversation(messages: list[Any], family: Family) -> Conversation:
    return [_message(f"messages[{index}]", message, family) for index, message in enumerate(messages)]


def _message(field: str, message: Any, family: Family) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise InvalidRequest(field, message, "give an object with role and content")
    for name, value in message.items():
        if name not in MESSAGE_FIELDS and value not in (None, []):
            raise InvalidRequest(f"{field}.{name}", value, "this cluster does not support it yet; leave it out")
    role = text_of(f"{field}.role", message.get("role"))
    more: dict[str, Any] = {}
    if message.get("tool_calls"):
        if role != "assistant":
            raise InvalidRequest(f"{field}.tool_calls", message["tool_calls"], "only an assistant calls tools")
        more["tool_calls"] = calls_of(f"{field}.tool_calls", message["tool_calls"], family)
    if role == "tool":
        more["tool_call_id"] = text_of(f"{field}.tool_call_id", message.get("tool_call_id") or "")
    content = message.get("content") or ("" if "tool_calls" in more else message.get("content"))
    if isinstance(content, list):
        content = "".join(_part(f"{field}.content[{index}]", part) for index, part in enumerate(content))
    role = "system" if role == "developer" else role
    return {"role": role, "content": text_of(f"{field}.content", content), **more}


def _part(field: str, part: Any) -> str:
    if not isinstance(part, dict) or part.get("type") != "text":
        raise InvalidRequest(field, part, 'give text parts only: {"type": "text", "text": ...}')
    return text_of(f"{field}.text", part.get("text"))
