"""The sections of a topology file, and what each says of itself."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from splitserve.cluster.units import SIZE_PATTERN, parse_bytes

Role = Literal["prefill", "decode", "colocated"]
DEFAULT_CHUNK_TOKENS = 512


def _bytes(value: object) -> object:
    return parse_bytes(value) if isinstance(value, str) else value


Bytes = Annotated[
    int,
    Field(gt=0, le=2**60),
    BeforeValidator(_bytes),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": SIZE_PATTERN}]}),
]
Seconds = Annotated[float, Field(gt=0, le=86400)]
Resource = Annotated[str, Field(min_length=1, max_length=100)] | None


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """The model that the cluster serves."""

    path: str = Field(
        min_length=1,
        description="a Hugging Face folder, a .gguf file, or the name of a built-in model (smollm2-135m-instruct)",
    )
    name: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9._:/-]{1,100}$",
        description="name that requests use; the last part of path if unset",
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="arithmetic and KV cache: float32 repeats tokens exactly on CPU, bfloat16 suits GPUs",
    )
    context: int = Field(default=2048, ge=2, description="longest sequence in tokens, prompt and answer together")
    deterministic: bool = Field(
        default=False,
        description="on GPUs, the same bits in any slot, batch, capacity and packing, at a price; CPUs always do that",
    )
    tool_parser: Literal["auto", "none", "hermes", "llama3", "deepseek"] = Field(
        default="auto", description="form in which the model calls tools; auto: the one that its chat template shows"
    )
    reasoning_parser: Literal["auto", "none", "think"] = Field(
        default="auto",
        description="form of reasoning before an answer; auto: think where the chat template has </think>",
    )
    load_format: Literal["auto", "dummy"] = Field(
        default="auto", description="auto reads the weights; dummy makes random ones and needs only the config"
    )

    @property
    def served_name(self) -> str:
        return self.name or PurePath(self.path).name.removesuffix(".gguf")


class Hosts(Section):
    """What there is to run on, for `splitserve check`; Ray finds out what really is."""

    count: int = Field(default=1, ge=1, le=4096, description="number of hosts")
    gpus: int = Field(default=0, ge=0, le=64, description="GPUs of one host")
    gpu_memory: Bytes = Field(default=80 * 10**9, description="memory of one GPU, such as 80GB")


class Slo(Section):
    """Latency objectives; none if unset."""

    ttft_s: Seconds | None = Field(
        default=None,
        description="time to first token, in seconds; what is predicted to miss it is refused at once",
    )
    tpot_s: Seconds | None = Field(
        default=None,
        description="time per output token after the first, in seconds; "
        "decode engines whose steps would take longer come after all others",
    )


class Router(Section):
    """The front: takes requests over gRPC and HTTP, places them and streams their tokens."""

    replicas: int = Field(default=1, ge=1, le=64, description="number of routers")
    grpc: str = Field(default="127.0.0.1:50061", description="host:port of router 0; router i listens on port + i")
    http: str | None = Field(
        default=None, description="the same for OpenAI's HTTP API, such as 127.0.0.1:8000; none if unset"
    )
    policy: Literal["kv_aware", "least_load", "round_robin"] = Field(
        default="kv_aware",
        description="how engines are picked: by what they have cached, how fast they are and what lies before them; "
        "by the number of their requests; in turn",
    )
    max_queue: int = Field(
        default=256, ge=0, le=1_000_000, description="requests that may wait before new ones are refused"
    )
    max_active: int = Field(default=1024, ge=1, le=1_000_000, description="requests in progress at once, in one router")
    default_deadline_s: Seconds = Field(default=600.0, description="deadline of a request that brings none, in seconds")
    worker_timeout_s: Seconds | None = Field(
        default=None,
        description="silence after which a worker counts as dead, in seconds; "
        "if unset, 2.5 where all workers have GPUs, else 10: on a CPU a step may take seconds",
    )
    slo: Slo = Field(default=Slo(), description="latency objectives")
    node_resource: Resource = Field(default=None, description="Ray custom resource of the nodes that routers run on")

    @field_validator("grpc", "http")
    @classmethod
    def _host_and_ports(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None:
            return None
        host, _, port = value.rpartition(":")
        if not _is_port(port):
            raise ValueError("expected host:port with a port from 1 to 65535, such as 127.0.0.1:50061")
        _require_one_host(host.removeprefix("[").removesuffix("]"))
        first, replicas = int(port), info.data.get("replicas", 1)
        if (last := first + replicas - 1) > 65535:
            raise ValueError(f"ports {first} to {last} would pass 65535; lower the port or the replicas")
        grpc = info.data.get("grpc")  # not there yet while grpc itself is checked
        if grpc and abs(first - (other := int(grpc.rpartition(":")[2]))) < replicas:
            raise ValueError(f"{replicas} ports from {other} and from {first} on overlap; move grpc or http")
        return value

    @property
    def max_connections(self) -> int:
        """Connections to each port of a router: one for each request that it takes, and as many that are idle."""
        return 2 * (self.max_active + self.max_queue)

    def grpc_address(self, index: int) -> str:
        """host:port that router `index` takes gRPC on."""
        return _with_port_added(self.grpc, index)

    def http_address(self, index: int) -> str | None:
        """host:port that router `index` takes HTTP on, if it does."""
        return None if self.http is None else _with_port_added(self.http, index)


class KvTransfer(Section):
    """How KV moves from prefill to decode."""

    transport: Literal["auto", "cuda_ipc", "shm", "nccl", "tcp"] = Field(
        default="auto",
        description="auto: between GPUs cuda_ipc within a host and nccl between hosts; otherwise shm and tcp",
    )
    link_memory: Bytes = Field(
        default=512 * 2**20,
        description="memory of a GPU for NCCL communicators with ranks of other hosts, 68MiB each; the idle ones leave",
    )
    host_tier: Bytes = Field(
        default=512 * 2**20,
        description="host memory of a rank for KV of preempted sequences, and of cached prefixes that had to leave",
    )
    staging: Bytes | None = Field(
        default=None,
        description="memory of a decode rank for KV on its way, such as 64MiB; "
        "if unset, 1GiB for cuda_ipc, 2GiB for nccl, else 256MiB for GPUs and 64MiB for CPUs; "
        "a prefill rank has a quarter of it, for prefixes that other engines have cached",
    )
    lease_s: Seconds = Field(
        default=10.0, description="time without progress after which a transfer is given up, in seconds"
    )


class Tls(Section):
    """Files in PEM form, read again when they change."""

    cert: str = Field(min_length=1, description="certificate chain of the gRPC and HTTP ports")
    key: str = Field(min_length=1, description="private key of the certificate")
    client_ca: str | None = Field(
        default=None,
        min_length=1,
        description="certificates of which one must have signed a client's (mTLS); if unset, clients need none",
    )

    def with_absolute_paths(self) -> Tls:
        """The same for processes that run in other folders."""
        return self.model_copy(update={name: os.path.abspath(path) for name, path in self if path is not None})


class Security(Section):
    """Who may connect, and how."""

    curve: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="ZeroMQ CURVE between processes; auto is on with a cluster_key, or when bind is not loopback",
    )
    cluster_key: str | None = Field(
        default=None,
        min_length=1,
        description="file of `splitserve keygen`, the same on every host; if unset, Ray carries one made at start",
    )
    tls: Tls | None = Field(default=None, description="TLS of the gRPC and HTTP ports; plain text if unset")
    api_keys: str | None = Field(
        default=None, min_length=1, description="file of `splitserve keygen --api NAME`; if unset, requests need no key"
    )
    bind: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=100,
        description="address or interface that worker sockets bind; node is each node's own address",
    )

    @field_validator("cluster_key")
    @classmethod
    def _key_in_use(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("curve") == "off":
            raise ValueError("expected none where curve is off: nothing would use it")
        return value

    @field_validator("bind")
    @classmethod
    def _one_address(cls, value: str) -> str:
        _require_one_host(value)
        return value

    def with_absolute_paths(self) -> Security:
        """The same for processes that run in other folders."""
        paths = {"cluster_key": self.cluster_key, "api_keys": self.api_keys}
        changed: dict[str, object] = {name: os.path.abspath(path) for name, path in paths.items() if path is not None}
        if self.tls is not None:
            changed["tls"] = self.tls.with_absolute_paths()
        return self.model_copy(update=changed)

    @property
    def is_loopback(self) -> bool:
        """Whether worker sockets can be reached from their own host only."""
        try:
            return ipaddress.ip_address(self.bind).is_loopback
        except ValueError:
            return self.bind in ("localhost", "lo")

    @property
    def encrypted(self) -> bool:
        """Whether sockets between processes use CURVE."""
        keyed = self.cluster_key is not None or not self.is_loopback
        return self.curve == "on" or (self.curve == "auto" and keyed)


class Tracing(Section):
    """Where requests go as OpenTelemetry traces."""

    endpoint: str = Field(
        pattern=r"^https?://([^/\s:\[\]]+|\[[0-9a-fA-F:]+\]):[0-9]{1,5}$",
        description="OTLP collector (gRPC), such as http://127.0.0.1:4317; https for TLS",
    )
    sample: float = Field(
        default=1.0, ge=0, le=1, description="share of requests traced, of those whose caller brings no traceparent"
    )

    @field_validator("endpoint")
    @classmethod
    def _host_and_port(cls, value: str) -> str:
        if not is_address(value.partition("//")[2]):
            raise ValueError("expected a host name of ASCII and a port from 1 to 65535, such as http://127.0.0.1:4317")
        return value


def _with_port_added(address: str, index: int) -> str:
    host, _, port = address.rpartition(":")
    return f"{host}:{int(port) + index}"


def is_address(text: str) -> bool:
    """Whether `text` is host:port as resolvers take it."""
    host, _, port = text.rpartition(":")
    return _is_host(host.removeprefix("[").removesuffix("]")) and _is_port(port)


def _is_host(text: str) -> bool:
    """Not what Python's resolver raises UnicodeError or ValueError for."""
    labels = text.removesuffix(".").split(".")
    return text.isascii() and text.isprintable() and all(1 <= len(label) <= 63 for label in labels)


def _is_port(text: str) -> bool:
    return re.fullmatch("[0-9]{1,5}", text) is not None and 1 <= int(text) <= 65535


def _require_one_host(host: str) -> None:
    """Nothing may listen on every interface, so one address has to be named."""
    if host and not _is_host(host):
        raise ValueError("expected an address, or a host name in ASCII with 1 to 63 characters between its dots")
    if host in ("", "*") or _is_unspecified(host):
        raise ValueError("expected one address or host name, not every interface")


def _is_unspecified(host: str) -> bool:
    with contextlib.suppress(OSError):
        return socket.inet_aton(host) == bytes(4)  # knows 0 and 0x0, as whoever listens does
    try:
        address = ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return (address.ipv4_mapped or address).is_unspecified
