"""Streaming a response as server-sent events, and noticing clients that leave."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import NoReturn, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from splitserve.cluster.errors import RequestCancelled, SplitserveError
from splitserve.router.http_errors import error_object
from splitserve.router.openai_responses import event

Write = Callable[[bytes], Awaitable[None]]
T = TypeVar("T")


class EventStream(Response):
    """What `run(write)` writes, as it writes it; `run` returns the end.

    The status goes out with the first bytes, so that an error before them has its own. A later one is the last event,
    and no `[DONE]` follows it.
    """

    media_type = "text/event-stream"

    def __init__(self, run: Callable[[Write], Awaitable[bytes]]) -> None:
        super().__init__(headers={"cache-control": "no-cache"})
        del self.headers["content-length"]
        self._run = run
        self._started = False
        self._order = asyncio.Lock()  # several prompts write side by side

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def write(data: bytes, *, more: bool = True) -> None:
            async with self._order:
                if not self._started:
                    self._started = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await send({"type": "http.response.body", "body": data, "more_body": more})

        try:
            end = await self._run(write)
        except SplitserveError as error:
            if not self._started:
                raise
            end = event(error_object(error))
        await write(end, more=False)


async def unless_client_leaves(receive: Receive, work: Awaitable[T]) -> T:
    """What `work` comes to. Raises RequestCancelled, and ends it, once the client has left."""
    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(until_client_leaves(receive))
            found = await work
            watching.cancel()
        return found
    except BaseExceptionGroup as failed:
        raise failed.exceptions[0] from None


async def until_client_leaves(receive: Receive) -> NoReturn:
    """Raise RequestCancelled once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
    raise RequestCancelled("the client went away")
