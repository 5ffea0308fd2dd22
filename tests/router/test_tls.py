"""TLS of both ports: whom a router lets in, whom it keeps out, and certificates that are renewed while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import os
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trustme

from splitserve.client import AsyncClient, SplitserveClientError
from splitserve.cluster.errors import StartupError
from splitserve.cluster.topology_sections import Security, Tls
from splitserve.deploy.preflight import check_security
from splitserve.router.fake_cluster import FakeCluster
from splitserve.router.service import RouterService
from tests.router.routers import running_router

OURS, THEIRS = trustme.CA(), trustme.CA()
YESTERDAY = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)


@dataclass
class Files:
    """The files that a topology names."""

    folder: Path

    def __post_init__(self) -> None:
        self.ca.write_bytes(OURS.cert_pem.bytes())
        self.renew(OURS.issue_cert("127.0.0.1"))

    @property
    def cert(self) -> Path:
        return self.folder / "cert.pem"

    @property
    def key(self) -> Path:
        return self.folder / "key.pem"

    @property
    def ca(self) -> Path:
        return self.folder / "ca.pem"

    def renew(self, leaf: trustme.LeafCert) -> None:
        for path, content in ((self.cert, leaf.cert_chain_pems[0]), (self.key, leaf.private_key_pem)):
            new = path.with_suffix(".new")
            new.write_bytes(content.bytes())
            os.replace(new, path)

    def tls(self, *, mutual: bool = False) -> dict[str, str]:
        names = {"cert": str(self.cert), "key": str(self.key)}
        return names | {"client_ca": str(self.ca)} if mutual else names


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def identity(ca: trustme.CA) -> tuple[bytes, bytes]:
    """A client's certificate and key."""
    leaf = ca.issue_cert("client@example.org")
    return leaf.cert_chain_pems[0].bytes(), leaf.private_key_pem.bytes()


@contextlib.asynccontextmanager
async def router(files: Files, *, mutual: bool = False) -> AsyncIterator[RouterService]:
    connection = {"root_certificates": OURS.cert_pem.bytes()} | ({"certificate": identity(OURS)} if mutual else {})
    security = {"tls": files.tls(mutual=mutual)}
    with FakeCluster() as cluster:
        async with running_router(cluster, connection=connection, security=security) as (service, _):
            yield service


async def by_grpc(service: RouterService, **connection: Any) -> str:
    """How a call of a client that connects so ends."""
    async with AsyncClient(service.address, **connection) as client:
        try:
            completion = await client.generate([5, 6], max_tokens=2, timeout_s=2).result()
        except SplitserveClientError as error:
            return error.code
        return f"{completion.samples[0].token_ids}"


async def by_http(service: RouterService, context: ssl.SSLContext | None) -> bytes:
    """The status line of GET /health; raises what the connection raises."""
    host, _, port = str(service.http_address).rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        async with asyncio.timeout(5):
            return (await reader.read()).partition(b"\r\n")[0]
    finally:
        writer.close()


async def is_refused(service: RouterService, context: ssl.SSLContext | None) -> bool:
    """Whether a request gets no answer. In TLS 1.3 a client learns that only after its own handshake."""
    try:
        return await by_http(service, context) == b""
    except (ssl.SSLError, ConnectionError):
        return True


def trusting(ca: trustme.CA, own: trustme.CA | None = None) -> ssl.SSLContext:
    """A client's context that trusts `ca` and shows a certificate of `own`."""
    context = ssl.create_default_context()
    ca.configure_trust(context)
    if own is not None:
        own.issue_cert("client@example.org").configure_cert(context)
    return context


def test_both_ports_answer_those_who_trust_them_and_nobody_in_plain_text(files: Files) -> None:
    async def scenario() -> None:
        async with router(files) as service:
            assert await by_grpc(service, root_certificates=OURS.cert_pem.bytes()) == "(5, 6)"
            assert await by_grpc(service, root_certificates=THEIRS.cert_pem.bytes()) == "UNAVAILABLE"
            assert await by_grpc(service) in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
            assert await by_http(service, trusting(OURS)) == b"HTTP/1.1 200 OK"
            with pytest.raises(ssl.SSLCertVerificationError, match="unable to get local issuer"):
                await by_http(service, trusting(THEIRS))
            assert await is_refused(service, None)
            assert await by_http(service, trusting(OURS)) == b"HTTP/1.1 200 OK", "it goes on"

    asyncio.run(scenario())


def test_an_expired_certificate_is_noticed_by_clients(files: Files) -> None:
    async def scenario() -> None:
        async with router(files) as service:
            files.renew(OURS.issue_cert("127.0.0.1", not_after=YESTERDAY))
            with pytest.raises(ssl.SSLCertVerificationError, match="certificate has expired"):
                await by_http(service, trusting(OURS))
            assert await by_grpc(service, root_certificates=OURS.cert_pem.bytes()) == "UNAVAILABLE"

    asyncio.run(scenario())


def test_mutual_tls_lets_in_whom_its_authority_signed(files: Files) -> None:
    async def scenario() -> None:
        roots = OURS.cert_pem.bytes()
        async with router(files, mutual=True) as service:
            assert await by_grpc(service, root_certificates=roots, certificate=identity(OURS)) == "(5, 6)"
            assert await by_grpc(service, root_certificates=roots, certificate=identity(THEIRS)) == "UNAVAILABLE"
            assert await by_grpc(service, root_certificates=roots) == "UNAVAILABLE"
            assert await by_http(service, trusting(OURS, OURS)) == b"HTTP/1.1 200 OK"
            for own in (None, THEIRS):
                assert await is_refused(service, trusting(OURS, own))

    asyncio.run(scenario())


def test_renewed_files_are_in_use_at_the_next_handshake(files: Files, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)

    async def scenario() -> None:
        async with router(files, mutual=True) as service:
            files.renew(THEIRS.issue_cert("127.0.0.1"))
            assert await by_http(service, trusting(THEIRS, OURS)) == b"HTTP/1.1 200 OK"
            theirs = THEIRS.cert_pem.bytes()
            assert await by_grpc(service, root_certificates=theirs, certificate=identity(OURS)) == "(5, 6)"
            assert f"{files.cert}: the new version is in use" in caplog.text

            files.ca.write_bytes(theirs)
            assert await by_http(service, trusting(THEIRS, THEIRS)) == b"HTTP/1.1 200 OK"
            assert await by_grpc(service, root_certificates=theirs, certificate=identity(THEIRS)) == "(5, 6)"
            assert await is_refused(service, trusting(THEIRS, OURS))

            files.cert.write_text("half of a fi")
            assert await by_http(service, trusting(THEIRS, THEIRS)) == b"HTTP/1.1 200 OK"
            assert f"{files.cert}: the former version stays in use; security.tls" in caplog.text
            files.cert.unlink()
            assert await by_grpc(service, root_certificates=theirs, certificate=identity(THEIRS)) == "(5, 6)"

    asyncio.run(scenario())


def test_files_that_cannot_be_used_are_told_before_anything_starts(files: Files) -> None:
    def fault(**names: Any) -> str:
        with pytest.raises(StartupError) as caught:
            check_security(Security(tls=Tls(**files.tls() | {name: str(path) for name, path in names.items()})))
        return str(caught.value)

    check_security(Security(tls=Tls(**files.tls(mutual=True))))
    missing = files.folder / "none.pem"
    for name in ("cert", "key", "client_ca"):
        assert "No such file or directory" in fault(**{name: missing})
        assert "name PEM files that belong together" in fault(**{name: __file__})
    other = files.folder / "other.pem"
    other.write_bytes(THEIRS.issue_cert("127.0.0.1").private_key_pem.bytes())
    assert "KEY_VALUES_MISMATCH" in fault(key=other) or "key values mismatch" in fault(key=other)


def test_a_certificate_without_trust_is_the_users_own_fault() -> None:
    with pytest.raises(SplitserveClientError, match="give it with root_certificates only"):
        AsyncClient("127.0.0.1:1", certificate=identity(OURS))
