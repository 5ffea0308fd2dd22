"""Metrics over HTTP: the endpoint that Prometheus scrapes, and the count of calls."""

from __future__ import annotations

import asyncio

from prometheus_client import Counter
from prometheus_client.exposition import choose_encoder
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from splitserve.router.metrics import RouterMetrics


class MetricsEndpoint:
    """Answers with all metrics, in OpenMetrics' format where the scraper takes it, else in Prometheus' own."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._registry = metrics.registry
        self._one_at_a_time = asyncio.Lock()

    async def answer(self, request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        async with self._one_at_a_time:  # in a thread: with hundreds of engines it would hold up streams
            body = await asyncio.to_thread(encode, self._registry)
        return Response(body, headers={"content-type": content_type})


class CallCounter:
    """ASGI middleware that counts calls by route and status. A path that is none of ours counts as "other"."""

    def __init__(self, app: ASGIApp, calls: Counter) -> None:
        self._app, self._calls = app, calls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 500  # where the app raises, the server answers that

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note)
        finally:
            route = scope.get("route")
            self._calls.labels("http", route.path if route else "other", status).inc()
