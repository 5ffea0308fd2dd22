"""One router process: tokenizer, dispatcher, gRPC and HTTP server, wired from the topology."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from splitserve import __version__
from splitserve.cluster.channel import CurveKeys
from splitserve.cluster.errors import StartupError
from splitserve.cluster.messages import Member
from splitserve.cluster.topology import Topology
from splitserve.router.certificates import Certificates
from splitserve.router.constraint import GrammarChecker
from splitserve.router.dispatcher import Dispatcher
from splitserve.router.grpc_server import SERVICE, SplitServe
from splitserve.router.http_api import HttpApi
from splitserve.router.http_server import HttpServer
from splitserve.router.parsers.families import Family
from splitserve.router.status import Status
from splitserve.router.tenants import Tenants
from splitserve.router.tokenizer import Tokenizer
from splitserve.router.validate import Validator

if TYPE_CHECKING:
    from splitserve.router.tracing import TraceExport

HEALTH_PERIOD_S = 0.2
GRACE_S = 1.0
DRAIN_S = 86_400.0  # no deadline is longer
SERVER_OPTIONS = (
    ("grpc.max_receive_message_length", 16 * 1024 * 1024),
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.absolute_max_metadata_size", 32 * 1024),
    ("grpc.max_concurrent_streams", 1024),  # of one connection
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.so_reuseport", 0),  # a port in use must be an error, not shared
    ("grpc.keepalive_time_ms", 30_000),  # notices clients that vanished
    ("grpc.keepalive_timeout_ms", 10_000),
)


class RouterService:
    """Router `index` of the cluster. It runs on the event loop of `start`, in any thread.

    Raises StartupError where the files of `security` cannot be used.
    """

    def __init__(
        self, topology: Topology, model_folder: Path, *, keys: CurveKeys | None = None, index: int = 0
    ) -> None:
        self._topology = topology
        self.address = topology.router.grpc_address(index)
        self.http_address = topology.router.http_address(index)
        self._members: tuple[Member, ...] = ()
        self._loop: asyncio.AbstractEventLoop | None = None
        tokenizer = Tokenizer.load(model_folder)
        identity = f"router-{index}-{secrets.token_hex(4)}"
        self._grammars = GrammarChecker(model_folder, tokenizer.vocab_size)
        model, family = topology.model, Family.of(topology.model, tokenizer.chat_template)
        validator = Validator(model.served_name, tokenizer, self._grammars, family, model.context)
        self._traces = _trace_export(topology)
        export = self._traces.export if self._traces else None
        self.dispatcher = Dispatcher(
            identity, topology.router, topology.worker_timeout_s, keys, tokenizer.detokenizer, export
        )
        self.dispatcher.metrics.describe(version=__version__, cluster=topology.name, model=topology.model.served_name)
        deadline_s, tenants = topology.router.default_deadline_s, Tenants(topology.security.api_keys)
        status = Status(topology.name, model.served_name, self.dispatcher)
        self._service = SplitServe(validator, self.dispatcher, tenants, deadline_s, status.now)
        tls = topology.security.tls
        self._certificates = None if tls is None else Certificates(tls)
        self._http: HttpServer | None = None
        if self.http_address is not None:
            app = HttpApi(validator, self.dispatcher, tenants, deadline_s, topology.roles, status.now).app()
            context = None if self._certificates is None else self._certificates.ssl_context()
            self._http = HttpServer(app, self.http_address, topology.router.max_connections, context)
        self._health = health.aio.HealthServicer()

    async def start(self) -> str:
        """Listen, and return gRPC's host:port. Raises StartupError when an address cannot be had."""
        most = ("grpc.max_allowed_incoming_connections", self._topology.router.max_connections)
        self._server = grpc.aio.server(options=(*SERVER_OPTIONS, most))
        self._server.add_generic_rpc_handlers((self._service.handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        self._listen()
        if self._http is not None:
            self._http.start()
        await self._server.start()
        self._loop = asyncio.get_running_loop()
        self.dispatcher.engines.set_members(self._members)
        self._health_task = asyncio.create_task(self._report_health())
        return self.address

    def set_members(self, members: Sequence[Member]) -> None:
        """Follow the cluster's membership. Callable from any thread, before `start` and after."""
        self._members = tuple(members)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self.dispatcher.engines.set_members, self._members)

    async def drain(self) -> None:
        """Refuse new requests, and return when the running ones have ended. There is no way back."""
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(self._server.stop(DRAIN_S), *([self._http.drain()] if self._http else []))

    async def stop(self) -> None:
        """Refuse new requests, give running ones GRACE_S seconds, then end them."""
        self._health_task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._health_task
        await self._health.enter_graceful_shutdown()
        await asyncio.gather(self._server.stop(GRACE_S), *([self._http.stop()] if self._http else []))
        await self._grammars.close()
        self.dispatcher.engines.close()
        if self._traces is not None:
            await self._traces.close()

    def _listen(self) -> None:
        try:
            if self._certificates is None:
                self._server.add_insecure_port(self.address)
            else:
                self._server.add_secure_port(self.address, self._certificates.grpc_credentials())
        except RuntimeError as error:
            raise StartupError(f"router.grpc: cannot listen on {self.address}: {error}") from error

    async def _report_health(self) -> None:
        """Healthy means that a request could be placed."""
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        while True:
            status = serving if self.dispatcher.ready else not_serving
            for service in ("", SERVICE):
                await self._health.set(service, status)
            await asyncio.sleep(HEALTH_PERIOD_S)


def _trace_export(topology: Topology) -> TraceExport | None:
    if topology.tracing is None:
        return None
    try:
        from splitserve.router.tracing import TraceExport, otlp_processor
    except ImportError as error:
        raise StartupError(f"tracing: {error}; install splitserve[otel] where routers run") from error
    processor = otlp_processor(topology.tracing)
    return TraceExport(topology.tracing, topology.name, topology.model.served_name, processor)
