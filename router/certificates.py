"""TLS of a router's gRPC and HTTP ports: one set of files for both, read again when they are renewed.

A handshake uses the files as they are then. Renewed ones that cannot be used leave the former ones in use, and the log
says why.
"""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path

import grpc

from splitserve.cluster.errors import StartupError
from splitserve.cluster.topology_sections import Tls

log = logging.getLogger(__name__)

_Version = tuple[tuple[int, int, int], ...]  # inode, size and time of each file


class Certificates:
    """What `security.tls` names. Raises StartupError where a file cannot be read, or key and certificate differ."""

    def __init__(self, tls: Tls) -> None:
        self._tls = tls
        self._seen = self._version()
        self._context, self._grpc = self._load()

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC port."""
        return grpc.dynamic_ssl_server_credentials(self._grpc, self._newest_grpc, self._tls.client_ca is not None)

    def ssl_context(self) -> ssl.SSLContext:
        """For any other port: each handshake goes on with the context of that moment."""
        door = self._context

        def take_newest(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            self._renew()
            connection.context = self._context

        door.sni_callback = take_newest
        return door

    def _newest_grpc(self) -> grpc.ServerCertificateConfiguration:
        self._renew()
        return self._grpc

    def _renew(self) -> None:
        try:
            version = self._version()
            if version == self._seen:
                return
            self._seen = version
            self._context, self._grpc = self._load()
        except StartupError as error:
            log.warning("renewed certificates cannot be used: %s", error)
        else:
            log.info("renewed certificates are in use")

    def _version(self) -> _Version:
        try:
            status = [os.stat(path) for path in self._paths]
        except OSError as error:
            raise StartupError(f"security.tls: {error.filename}: {error.strerror}; name a readable PEM file") from error
        return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in status)

    def _load(self) -> tuple[ssl.SSLContext, grpc.ServerCertificateConfiguration]:
        cert, key, *ca = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(cert, key, password=_refuse_password)
            if ca:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(*ca)
            cert_pem, key_pem, *ca_pem = [Path(path).read_bytes() for path in self._paths]
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            names = ", ".join(self._paths)
            raise StartupError(f"security.tls: {names}: {error}; expected PEM files that belong together") from error
        roots = ca_pem[0] if ca_pem else None
        return context, grpc.ssl_server_certificate_configuration([(key_pem, cert_pem)], roots)

    @property
    def _paths(self) -> list[str]:
        return [path for path in (self._tls.cert, self._tls.key, self._tls.client_ca) if path is not None]


def _refuse_password() -> str:
    raise ValueError("the key is encrypted with a password")  # OpenSSL would ask for it at a terminal
