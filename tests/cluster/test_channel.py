"""Channels whose other end, or own end, is gone."""

from __future__ import annotations

import asyncio

from splitserve.cluster.channel import RouterChannel
from splitserve.cluster.messages import Heartbeat


def test_what_is_sent_on_a_closed_channel_goes_nowhere() -> None:
    async def scenario() -> None:
        channel = RouterChannel("tcp://127.0.0.1:9", b"router", print)
        channel.close()
        channel.send(Heartbeat("router"))

    asyncio.run(scenario())
