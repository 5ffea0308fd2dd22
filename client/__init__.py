"""The Python client: `Client` and `AsyncClient`."""

from splitserve.client.aio import AsyncClient, AsyncStream
from splitserve.client.client import Client, Stream
from splitserve.client.types import (
    ClusterStatus,
    Completion,
    Delta,
    Engine,
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

__all__ = [
    "AsyncClient",
    "AsyncStream",
    "Client",
    "ClusterStatus",
    "Completion",
    "Delta",
    "Engine",
    "Latency",
    "Model",
    "Sample",
    "Sampling",
    "SplitserveClientError",
    "Stream",
    "Summary",
    "Timings",
    "TokenLogprobs",
    "Usage",
]
