"""The HTTP surface: OpenAI's API, over the dispatcher that gRPC uses too."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from splitserve.cluster.errors import InvalidRequest, SplitserveError, WorkerUnavailable
from splitserve.cluster.topology_sections import Role
from splitserve.router import openai_requests, status_page
from splitserve.router.deadline import Deadline
from splitserve.router.dispatcher import Dispatcher
from splitserve.router.http_body import read_json
from splitserve.router.http_errors import json_response, on_fault, on_http_exception, on_splitserve_error
from splitserve.router.http_metrics import CallCounter, MetricsEndpoint
from splitserve.router.http_stream import EventStream, Write, unless_client_leaves, until_client_leaves
from splitserve.router.openai_requests import Call
from splitserve.router.openai_responses import Answer, ChatAnswer, CompletionAnswer, Json
from splitserve.router.request import Chunk, Summary
from splitserve.router.tenants import Tenant, Tenants
from splitserve.router.v1 import splitserve_pb2 as pb
from splitserve.router.validate import Validator

DEADLINE = "x-request-timeout"  # header: a request's deadline in seconds
MAX_DEADLINE_S = 86400.0
CONSTRAINTS = {"response_format", "structured_outputs", "tools"}  # fields whose check may take its time

WriteChunk = Callable[[int, Chunk], Awaitable[None]]
Endpoint = Callable[[Request], Awaitable[Response]]
Serve = Callable[[WriteChunk], Awaitable[list[Summary]]]
Check = Callable[[dict[str, Any], Validator], Awaitable[Call]]


class HttpApi:
    """The endpoints. `roles` are those of the cluster's pools; `status` makes what the status page shows."""

    def __init__(
        self,
        validator: Validator,
        dispatcher: Dispatcher,
        tenants: Tenants,
        default_deadline_s: float,
        roles: Sequence[Role],
        status: Callable[[], pb.StatusResponse],
    ) -> None:
        self._validator = validator
        self._dispatcher = dispatcher
        self._tenants = tenants
        self._default_deadline_s = default_deadline_s
        self._roles = roles
        self._status = status
        self._created = int(time.time())

    def app(self) -> Starlette:
        """All routes, and how errors are answered."""
        return Starlette(
            routes=[
                Route("/v1/completions", self._for_tenants(self._complete), methods=["POST"]),
                Route("/v1/chat/completions", self._for_tenants(self._chat), methods=["POST"]),
                Route("/v1/models", self._for_tenants(self._models)),
                Route("/v1/models/{name:path}", self._for_tenants(self._model)),
                Route("/tokenize", self._for_tenants(self._tokenize), methods=["POST"]),
                Route("/detokenize", self._for_tenants(self._detokenize), methods=["POST"]),
                Route("/health", self._health),
                *status_page.routes(self._status),
                Route("/trace", self._for_tenants(self._trace)),
                Route("/trace/{request_id}", self._for_tenants(self._trace)),
                Route("/metrics", MetricsEndpoint(self._dispatcher.metrics).answer),
            ],
            middleware=[Middleware(CallCounter, calls=self._dispatcher.metrics.calls)],
            exception_handlers={
                SplitserveError: on_splitserve_error,
                HTTPException: on_http_exception,
                Exception: on_fault,
            },
        )

    def _for_tenants(self, endpoint: Endpoint) -> Endpoint:
        """`endpoint` for those whom the cluster knows and whose limits allow it; what others send is not read."""

        async def answer(request: Request) -> Response:
            request.state.tenant = tenant = self._tenants.find(request.headers.get("authorization"))
            if request.method == "POST":
                tenant.check()
            return await endpoint(request)

        return answer

    async def _complete(self, request: Request) -> Response:
        return await self._answer(request, openai_requests.completion, CompletionAnswer)

    async def _chat(self, request: Request) -> Response:
        return await self._answer(request, openai_requests.chat, ChatAnswer)

    async def _answer(self, request: Request, check: Check, answer_type: type[Answer]) -> Response:
        body, deadline = await read_json(request), self._deadline(request)
        checking = check(body, self._validator)
        if CONSTRAINTS & body.keys():
            async with deadline.bounds():
                call = await unless_client_leaves(request.receive, checking)
        else:
            call = await checking
        answer = answer_type(call, self._validator)
        serve = partial(self._serve, call, request, deadline)
        if call.stream:
            return EventStream(partial(_stream, answer, serve))

        async def gather(prompt: int, chunk: Chunk) -> None:
            answer.accept(prompt, chunk)

        return json_response(answer.whole(await serve(gather)))

    async def _serve(self, call: Call, request: Request, deadline: Deadline, write: WriteChunk) -> list[Summary]:
        """Serve a call's prompts side by side. All end when one fails or when the client leaves."""
        tenant: Tenant = request.state.tenant
        prompt_tokens = sum(len(prompt.token_ids) for prompt in call.prompts)
        with tenant.request(prompt_tokens, sum(prompt.params.n for prompt in call.prompts)):
            return await self._serve_prompts(call, request, deadline, write)

    async def _serve_prompts(
        self, call: Call, request: Request, deadline: Deadline, write: WriteChunk
    ) -> list[Summary]:
        try:
            async with asyncio.TaskGroup() as group:
                watching = group.create_task(until_client_leaves(request.receive))
                serve = partial(self._dispatcher.serve, tenant=request.state.tenant, priority=call.priority)
                serve = partial(serve, cache_salt=call.cache_salt, traceparent=request.headers.get("traceparent"))
                serving = [
                    group.create_task(serve(prompt.token_ids, prompt.params, deadline, partial(write, index)))
                    for index, prompt in enumerate(call.prompts)
                ]
                summaries = [await task for task in serving]
                watching.cancel()
            return summaries
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        except asyncio.CancelledError:
            raise WorkerUnavailable("this router is going down; send the request again") from None

    def _deadline(self, request: Request) -> Deadline:
        text = request.headers.get(DEADLINE)
        if text is None:
            return Deadline(self._default_deadline_s)
        with contextlib.suppress(ValueError):
            if 0 < (deadline_s := float(text)) <= MAX_DEADLINE_S:
                return Deadline(deadline_s)
        raise InvalidRequest(DEADLINE, text, f"give seconds, above 0 to {MAX_DEADLINE_S:g}")

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request) -> Response:
        self._validator.check_model(request.path_params["name"])
        return json_response(self._model_object())

    def _model_object(self) -> Json:
        known = self._validator
        return {
            "id": known.model,
            "object": "model",
            "created": self._created,
            "owned_by": "splitserve",
            "max_model_len": known.context,
        }

    async def _tokenize(self, request: Request) -> Response:
        request.state.tenant.take_request()
        token_ids = await openai_requests.tokenize(await read_json(request), self._validator)
        context = self._validator.context
        return json_response({"tokens": token_ids, "count": len(token_ids), "max_model_len": context})

    async def _detokenize(self, request: Request) -> Response:
        request.state.tenant.take_request()
        return json_response({"prompt": openai_requests.detokenize(await read_json(request), self._validator)})

    async def _trace(self, request: Request) -> Response:
        """Where the time of a request that is over went, or of all lately, as Perfetto reads it."""
        content = self._dispatcher.recent.chrome_trace(request.path_params.get("request_id", ""))
        return Response(content, media_type="application/json")

    async def _health(self, request: Request) -> Response:
        """200 where a request could be placed, else 503 with the reason."""
        engines = [(engine.member.role, engine.ready) for engine in self._dispatcher.engines]
        pools = {
            role: {"engines": sum(one == role for one, _ in engines), "ready": engines.count((role, True))}
            for role in self._roles
        }
        missing = [role for role, pool in pools.items() if not pool["ready"]]
        if not missing:
            return json_response({"status": "ready", "pools": pools})
        reason = f"no {' and no '.join(missing)} worker is ready"
        return json_response({"status": "unavailable", "reason": reason, "pools": pools}, 503)


async def _stream(answer: Answer, serve: Serve, write: Write) -> bytes:
    async def write_events(prompt: int, chunk: Chunk) -> None:
        if events := answer.events(prompt, chunk):
            await write(events)

    return answer.last_events(await serve(write_events))
