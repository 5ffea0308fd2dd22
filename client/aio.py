"""The async client: `splitserve.client.client`, awaited."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Unpack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from splitserve.client import wire
from splitserve.client.types import (
    ClusterStatus,
    Completion,
    Conversation,
    Delta,
    Model,
    Sampling,
    SplitserveClientError,
)
from splitserve.router.v1 import splitserve_pb2 as pb
from splitserve.router.v1.splitserve_pb2_grpc import SplitServeStub


class AsyncClient:
    """A cluster's router at `address` (host:port), or one of several, over TLS if `root_certificates` (PEM) are given.

    A router that asks for its clients' certificates gets `certificate`: the chain and its private key (PEM). One that
    asks for API keys gets `api_key`, in plain text unless there is TLS.

    A stream whose router dies goes on, at another one or at the same when it is back: no token twice, none missing.

    `timeout_s` of a call becomes its deadline. Whatever fails raises SplitserveClientError. Cancelling the task that
    reads a stream cancels the request.
    """

    def __init__(
        self,
        address: str | Sequence[str],
        *,
        root_certificates: bytes | None = None,
        certificate: tuple[bytes, bytes] | None = None,
        api_key: str | None = None,
    ) -> None:
        self._metadata = wire.metadata(api_key)
        target, credentials = wire.target(address), wire.credentials(root_certificates, certificate)
        if credentials is None:
            self._channel = grpc.aio.insecure_channel(target, options=wire.CHANNEL_OPTIONS)
        else:
            self._channel = grpc.aio.secure_channel(target, credentials, options=wire.CHANNEL_OPTIONS)
        self._stub = SplitServeStub(self._channel)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        model: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """Continue `prompt`, a text or token ids. Requests that have to wait go by `priority`, the smallest first.

        Only requests with the same `cache_salt` share cached prefixes.
        """
        request = wire.generate_request(prompt, model, priority, cache_salt, sampling)
        return AsyncStream(partial(self._stub.Generate, metadata=self._metadata), request, timeout_s)

    def chat(
        self,
        messages: Conversation,
        *,
        model: str = "",
        timeout_s: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
        **sampling: Unpack[Sampling],
    ) -> AsyncStream:
        """Answer `messages`, each a mapping of role and content; `priority` and `cache_salt` as in `generate`."""
        request = wire.chat_request(messages, model, priority, cache_salt, sampling)
        return AsyncStream(partial(self._stub.Chat, metadata=self._metadata), request, timeout_s)

    async def tokenize(self, text: str | Conversation, *, model: str = "") -> list[int]:
        """Token ids of a text, or of a conversation as Chat would send it to the model."""
        with wire.client_errors():
            return list(
                (await self._stub.Tokenize(wire.tokenize_request(text, model), metadata=self._metadata)).token_ids
            )

    async def detokenize(self, token_ids: Sequence[int], *, model: str = "") -> str:
        """Text of token ids, special tokens left out."""
        with wire.client_errors():
            return (
                await self._stub.Detokenize(wire.detokenize_request(token_ids, model), metadata=self._metadata)
            ).text

    async def models(self) -> list[Model]:
        """The served models."""
        with wire.client_errors():
            return wire.models(await self._stub.ListModels(pb.ListModelsRequest(), metadata=self._metadata))

    async def status(self, *, timeout_s: float | None = None) -> ClusterStatus:
        """The cluster as this router sees it."""
        with wire.client_errors():
            return wire.cluster_status(
                await self._stub.Status(pb.StatusRequest(), metadata=self._metadata, timeout=timeout_s)
            )

    async def trace(self, request_id: str = "", *, timeout_s: float | None = None) -> str:
        """Where the time of a request that is over went, or of all lately: JSON for ui.perfetto.dev."""
        request = pb.TraceRequest(request_id=request_id)
        with wire.client_errors():
            return (await self._stub.Trace(request, metadata=self._metadata, timeout=timeout_s)).chrome_trace

    async def healthy(self, *, timeout_s: float | None = None) -> bool:
        """Whether a request could be placed now, by gRPC's health protocol."""
        request = health_pb2.HealthCheckRequest()
        with wire.client_errors():
            answer = await health_pb2_grpc.HealthStub(self._channel).Check(request, timeout=timeout_s)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    async def close(self) -> None:
        """Disconnect; streams that still run are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class AsyncStream:
    """The answer as it arrives: iterate over its deltas, once, or await the `result`."""

    def __init__(
        self,
        method: Callable[..., grpc.aio.UnaryStreamCall[Any, pb.GenerateResponse]],
        request: pb.GenerateRequest | pb.ChatRequest,
        timeout_s: float | None,
    ) -> None:
        self._method, self._cancelled = method, False
        self._call = method(request, timeout=timeout_s)
        self._gatherer = wire.Gatherer(request, timeout_s)

    def __del__(self) -> None:
        """Whoever drops a stream wants no more of it."""
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            self._call.cancel()

    @property
    def request_id(self) -> str:
        """The cluster's name for this request; empty before the first delta."""
        return self._gatherer.request_id

    async def __aiter__(self) -> AsyncIterator[Delta]:
        try:
            while True:
                try:
                    with wire.client_errors():
                        async for response in self._call:
                            for delta in self._gatherer.accept(response):
                                yield delta
                    return
                except SplitserveClientError as error:
                    request = self._gatherer.again(error)
                    await asyncio.sleep(wire.PAUSE_S)
                    self._call = self._method(request, timeout=self._gatherer.timeout_s)
                    if self._cancelled:
                        self._call.cancel()
        except asyncio.CancelledError as error:
            if self._task_cancelled():
                raise
            # gRPC raises this for `cancel` too, where nobody has cancelled the task.
            raise SplitserveClientError("CANCELLED", "the stream was cancelled by its reader") from error

    async def result(self) -> Completion:
        """Read to the end. What was iterated over before is part of it."""
        async for _ in self:
            pass
        return self._gatherer.completion()

    def cancel(self) -> None:
        """Stop; the cluster frees what the request holds."""
        self._cancelled = True
        self._call.cancel()

    @staticmethod
    def _task_cancelled() -> bool:
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
