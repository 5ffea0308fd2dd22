"""TLS of a router's gRPC and HTTP ports: one set of files for both. A handshake uses the files as they are then."""

from __future__ import annotations

import ssl
from pathlib import Path

import grpc

from splitserve.cluster.errors import StartupError
from splitserve.cluster.topology_sections import Tls
from splitserve.router.renewal import Renewed


class Certificates:
    """What `security.tls` names. Raises StartupError where a file cannot be read, or key and certificate differ."""

    def __init__(self, tls: Tls) -> None:
        self._mutual = tls.client_ca is not None
        self._paths = [path for path in (tls.cert, tls.key, tls.client_ca) if path is not None]
        self._pair = Renewed(self._paths, self._load)

    def grpc_credentials(self) -> grpc.ServerCredentials:
        """For a gRPC port."""
        first = self._pair.newest()[1]
        return grpc.dynamic_ssl_server_credentials(first, lambda: self._pair.newest()[1], self._mutual)

    def ssl_context(self) -> ssl.SSLContext:
        """For any other port: each handshake goes on with the context of that moment."""
        door = self._pair.newest()[0]

        def take_newest(connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
            connection.context = self._pair.newest()[0]

        door.sni_callback = take_newest
        return door

    def _load(self) -> tuple[ssl.SSLContext, grpc.ServerCertificateConfiguration]:
        cert, key, *ca = self._paths
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            cert_pem, key_pem, *ca_pem = [Path(path).read_bytes() for path in self._paths]
            context.load_cert_chain(cert, key, password=_refuse_password)
            if ca:
                context.verify_mode = ssl.CERT_REQUIRED
                context.load_verify_locations(*ca)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            names = ", ".join(self._paths)
            raise StartupError(f"security.tls: {names}: {error}; name PEM files that belong together") from error
        roots = ca_pem[0] if ca_pem else None
        return context, grpc.ssl_server_certificate_configuration([(key_pem, cert_pem)], roots)


def _refuse_password() -> str:
    raise ValueError("the key is encrypted with a password")  # OpenSSL would ask for it at a terminal
