"""Between plain values and protobuf messages; shared by the sync and the async client."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, ParamSpec, TypeVar, cast

import grpc

from splitserve.client.types import (
    FINISH_REASONS,
    ClusterStatus,
    Completion,
    Conversation,
    Delta,
    Engine,
    FinishReason,
    Latency,
    Model,
    Sample,
    Sampling,
    SplitserveClientError,
    Summary,
    Timings,
    TokenLogprobs,
    Usage,
)
from splitserve.router.v1 import splitserve_pb2 as pb

# Without the environment's http_proxy, which is for the web and would be asked for loopback, too.
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
)
RETRY_AFTER = "retry-after-ms"
ENGINE_STATES: dict[int, Literal["starting", "ready", "draining", "silent"]] = {
    pb.ENGINE_STATE_STARTING: "starting",
    pb.ENGINE_STATE_READY: "ready",
    pb.ENGINE_STATE_DRAINING: "draining",
    pb.ENGINE_STATE_SILENT: "silent",
}

REASONS: dict[FinishReason | None, pb.FinishReason.ValueType] = {
    None: pb.FINISH_REASON_UNSPECIFIED,
    "stop": pb.FINISH_REASON_STOP,
    "length": pb.FINISH_REASON_LENGTH,
}
AGAIN_S, PAUSE_S = 15.0, 0.1

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def client_errors() -> Iterator[None]:
    """Failed calls, sync or async, raise SplitserveClientError."""
    try:
        yield
    except grpc.RpcError as error:
        call = cast(grpc.Call, error)
        retry_ms = dict(call.trailing_metadata() or ()).get(RETRY_AFTER)
        retry_after_s = None if retry_ms is None else float(retry_ms) / 1000
        raise SplitserveClientError(call.code().name, call.details() or "no details", retry_after_s) from error


def _checked(build: Callable[P, R]) -> Callable[P, R]:
    """Values that protobuf refuses (a wrong type, an unknown parameter) raise the client's own exception."""

    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return build(*args, **kwargs)
        except (TypeError, ValueError) as error:
            raise SplitserveClientError("INVALID_ARGUMENT", str(error)) from error

    return checked


def target(address: str | Sequence[str]) -> str:
    """What gRPC connects to: of several addresses the first that answers, and when that is gone, another one."""
    if isinstance(address, str):
        return address
    found: list[tuple[socket.AddressFamily, str]] = []
    for each in address:
        host, _, port = each.rpartition(":")
        try:
            family, *_, place = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        except (OSError, ValueError) as error:
            raise SplitserveClientError("INVALID_ARGUMENT", f"address: found {each!r}; give host:port") from error
        found.append((family, f"[{place[0]}]:{port}" if family == socket.AF_INET6 else f"{place[0]}:{port}"))
    if len({family for family, _ in found}) != 1:
        raise SplitserveClientError("INVALID_ARGUMENT", "address: give at least one, and all IPv4 or all IPv6")
    scheme = "ipv6" if found[0][0] == socket.AF_INET6 else "ipv4"
    return f"{scheme}:" + ",".join(place for _, place in found)


def credentials(
    root_certificates: bytes | None, certificate: tuple[bytes, bytes] | None
) -> grpc.ChannelCredentials | None:
    """What a channel over TLS trusts and shows; None for plain text."""
    if root_certificates is None:
        if certificate is not None:
            raise SplitserveClientError("INVALID_ARGUMENT", "certificate: give it with root_certificates only")
        return None
    chain, key = certificate or (None, None)
    return grpc.ssl_channel_credentials(root_certificates, key, chain)


def metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    """What goes with each call of a holder of `api_key`."""
    if api_key is None:
        return ()
    if not (api_key.isascii() and api_key.isprintable()):  # gRPC's own error would show it
        raise SplitserveClientError("INVALID_ARGUMENT", "api_key: give printable ASCII, without an end of line")
    return (("authorization", f"Bearer {api_key}"),)


@_checked
def generate_request(
    prompt: str | Sequence[int], model: str, priority: int, cache_salt: str, sampling: Sampling
) -> pb.GenerateRequest:
    """A Generate call for a text or for token ids."""
    parameters = _sampling(sampling)
    request = pb.GenerateRequest(model=model, priority=priority, cache_salt=cache_salt, sampling=parameters)
    if isinstance(prompt, str):
        request.text = prompt
    else:
        request.token_ids.ids.extend(prompt)
    return request


@_checked
def chat_request(
    messages: Conversation, model: str, priority: int, cache_salt: str, sampling: Sampling
) -> pb.ChatRequest:
    """A Chat call."""
    request = pb.ChatRequest(model=model, priority=priority, cache_salt=cache_salt, sampling=_sampling(sampling))
    request.messages.extend(_messages(messages))
    return request


@_checked
def tokenize_request(text: str | Conversation, model: str) -> pb.TokenizeRequest:
    """A Tokenize call for a text or for a conversation."""
    if isinstance(text, str):
        return pb.TokenizeRequest(model=model, text=text)
    return pb.TokenizeRequest(model=model, conversation=pb.Conversation(messages=_messages(text)))


@_checked
def detokenize_request(token_ids: Sequence[int], model: str) -> pb.DetokenizeRequest:
    """A Detokenize call."""
    return pb.DetokenizeRequest(model=model, token_ids=token_ids)


def models(response: pb.ListModelsResponse) -> list[Model]:
    """The served models."""
    return [Model(model.name, model.context, model.vocab_size) for model in response.models]


def cluster_status(response: pb.StatusResponse) -> ClusterStatus:
    """The answer to Status."""
    plain = {field.name: getattr(response, field.name) for field in pb.StatusResponse.DESCRIPTOR.fields}
    latencies = {name: Latency(plain[name].p50_s, plain[name].p99_s) for name in ("ttft", "tpot")}
    return ClusterStatus(**plain | latencies | {"engines": tuple(map(_engine, response.engines))})


class Gatherer:
    """Collects a stream of responses into one Completion, and says how a stream that breaks off is gone on from.

    A request that has a deadline keeps it.
    """

    def __init__(self, request: pb.GenerateRequest | pb.ChatRequest, timeout_s: float | None) -> None:
        self.request_id = ""
        self._request = request
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._progress_at: float | None = None
        self._deltas: list[Delta] = []
        self._prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        self._summary: Summary | None = None

    def accept(self, response: pb.GenerateResponse) -> list[Delta]:
        """The deltas of one response."""
        self.request_id = response.request_id
        self._progress_at = time.monotonic()
        self._prompt_logprobs += _logprobs(response.prompt_logprobs)
        if response.HasField("summary"):
            self._summary = _summary(response.summary)
        deltas = [_delta(delta) for delta in response.deltas]
        self._deltas += deltas
        return deltas

    @property
    def timeout_s(self) -> float | None:
        """What is left of the deadline."""
        return None if self._deadline is None else max(self._deadline - time.monotonic(), 0.0)

    def again(self, error: SplitserveClientError) -> pb.GenerateRequest | pb.ChatRequest:
        """The request to send after `error`, when the router is gone. Raises `error` where that is no use.

        A stream that has begun is tried again for AGAIN_S from its last message on, another one once.
        """
        now = time.monotonic()
        first_try, self._progress_at = self._progress_at is None, self._progress_at or now - AGAIN_S
        if error.code != "UNAVAILABLE" or not (first_try or now - self._progress_at < AGAIN_S):
            raise error
        if self._deltas:
            del self._request.answered[:]
            self._request.answered.extend(map(self._answered, range(self._request.sampling.n or 1)))
        return self._request

    def completion(self) -> Completion:
        """Everything, once the stream has ended well."""
        if self._summary is None:
            raise SplitserveClientError("INTERNAL", "the stream ended without a summary")
        count = 1 + max(delta.index for delta in self._deltas)
        samples = tuple(self._sample(index) for index in range(count))
        return Completion(self.request_id, samples, self._prompt_logprobs, self._summary)

    def _answered(self, index: int) -> pb.Answered:
        deltas = [delta for delta in self._deltas if delta.index == index]
        return pb.Answered(
            token_ids=[token for delta in deltas for token in delta.token_ids],
            finish_reason=REASONS[deltas[-1].finish_reason if deltas else None],
        )

    def _sample(self, index: int) -> Sample:
        deltas = [delta for delta in self._deltas if delta.index == index]
        return Sample(
            text="".join(delta.text for delta in deltas),
            token_ids=tuple(token for delta in deltas for token in delta.token_ids),
            logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
            finish_reason=cast(FinishReason, deltas[-1].finish_reason),
        )


def _messages(conversation: Conversation) -> list[pb.Message]:
    return [pb.Message(**message) for message in conversation]


def _sampling(sampling: Sampling) -> pb.Sampling:
    fields: dict[str, Any] = dict(sampling)
    if "choice" in fields:
        fields["choice"] = pb.Choices(texts=fields["choice"])
    return pb.Sampling(**fields)


def _delta(delta: pb.Delta) -> Delta:
    return Delta(
        index=delta.index,
        text=delta.text,
        token_ids=tuple(delta.token_ids),
        logprobs=_logprobs(delta.logprobs),
        finish_reason=FINISH_REASONS.get(delta.finish_reason),
    )


def _logprobs(entries: Iterable[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(entry.logprob, tuple((top.token_id, top.logprob) for top in entry.top)) for entry in entries
    )


def _summary(summary: pb.Summary) -> Summary:
    usage, timings = summary.usage, summary.timings
    return Summary(
        usage=Usage(usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens),
        timings=Timings(**{field.name: getattr(timings, field.name) for field in pb.Timings.DESCRIPTOR.fields}),
        prefill_engine=summary.prefill_engine,
        decode_engine=summary.decode_engine,
        losses=summary.losses,
    )


def _engine(engine: pb.Engine) -> Engine:
    plain: dict[str, Any] = {field.name: getattr(engine, field.name) for field in pb.Engine.DESCRIPTOR.fields}
    return Engine(**plain | {"state": ENGINE_STATES[engine.state]})
