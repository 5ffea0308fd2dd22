"""What a topology file says: one cluster, in frozen models that also make the JSON schema for editors.

Checks here need the file alone; those that need the model's shapes are in `splitserve.deploy.plan`.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from splitserve.cluster.topology_pools import DecodePool, PrefillPool
from splitserve.cluster.topology_sections import (
    DEFAULT_CHUNK_TOKENS,
    Hosts,
    KvTransfer,
    Model,
    Role,
    Router,
    Section,
    Security,
    Tracing,
)

# For payloads that are packed and not yet in pages: of a rank's GPU for those that copy engines carry, of a prefill
# rank's for those that NCCL does.
BOUNCE_BYTES, PACKED_BYTES = 128 << 20, 256 << 20


class Topology(Section):
    """One splitserve cluster."""

    name: str = Field(pattern="^[a-z0-9-]{1,40}$", description="name of the cluster: 1 to 40 of a-z, 0-9 and -")
    model: Model = Field(description="the model that the cluster serves")
    hosts: Hosts = Field(default=Hosts(), description="what there is to run on")
    router: Router = Field(default=Router(), description="the front")
    colocated: bool = Field(
        default=False,
        description="true runs prefill and decode in one pool, which decode describes; prefill must be absent",
    )
    prefill: PrefillPool | None = Field(default=None, description="engines that compute prompts")
    decode: DecodePool = Field(default=DecodePool(), description="engines that compute answers")
    kv_transfer: KvTransfer = Field(default=KvTransfer(), description="how KV moves from prefill to decode")
    security: Security = Field(default=Security(), description="who may connect")
    tracing: Tracing | None = Field(default=None, description="where traces of requests go; nowhere if unset")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_pools(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        if raw.get("colocated") is not True:
            return {"prefill": {}} | raw
        decode = raw.get("decode", {})
        return raw | {"decode": {"chunk_tokens": DEFAULT_CHUNK_TOKENS} | decode} if isinstance(decode, dict) else raw

    @field_validator("prefill")
    @classmethod
    def _prefill_unless_colocated(cls, value: PrefillPool | None, info: ValidationInfo) -> PrefillPool | None:
        colocated = info.data.get("colocated")
        if colocated is True and value is not None:
            raise ValueError("expected no prefill where colocated is true: decode describes the one pool")
        if colocated is False and value is None:
            raise ValueError("expected a mapping: only a colocated cluster has no prefill pool")
        return value

    @field_validator("decode")
    @classmethod
    def _chunks_where_colocated(cls, value: DecodePool, info: ValidationInfo) -> DecodePool:
        colocated = info.data.get("colocated")
        if colocated is False and value.chunk_tokens is not None:
            expected = "leave it out: a decode pool computes prompts only where colocated is true"
        elif colocated is True and value.chunk_tokens is None:
            expected = "expected a number: a colocated pool computes prompts too"
        else:
            return value
        details = {"field": "chunk_tokens", "found": value.chunk_tokens, "expected": expected}
        raise PydanticCustomError("inner_field", "{field}: {expected}", details)

    @property
    def roles(self) -> tuple[Role, ...]:
        return ("colocated",) if self.colocated else ("prefill", "decode")

    @property
    def worker_timeout_s(self) -> float:
        """Silence after which a worker counts as dead."""
        on_gpus = all(self.pool(role).device == "cuda" for role in self.roles)
        return self.router.worker_timeout_s or (2.5 if on_gpus else 10.0)

    @property
    def local_transport(self) -> Literal["cuda_ipc", "shm", "nccl", "tcp"]:
        """How KV gets from a prefill to a decode rank of the same host."""
        if self.kv_transfer.transport != "auto":
            return self.kv_transfer.transport
        return "cuda_ipc" if self._between_gpus else "shm"

    @property
    def remote_transport(self) -> Literal["nccl", "tcp"]:
        """How KV gets to a rank of another host."""
        return "nccl" if self._between_gpus and self.kv_transfer.transport in ("auto", "nccl") else "tcp"

    @property
    def _between_gpus(self) -> bool:
        return self.prefill is not None and self.prefill.device == self.decode.device == "cuda"

    @property
    def staging(self) -> int:
        """Bytes of a decode rank for KV on its way: of its GPU for cuda_ipc and nccl, of its host otherwise."""
        on_host = 256 if self.decode.device == "cuda" else 64
        mebibytes = {"cuda_ipc": 1024, "nccl": 2048}.get(self.local_transport, on_host)
        return self.kv_transfer.staging or mebibytes * 2**20

    @property
    def fetch_staging(self) -> int:
        """Bytes of a prefill rank for prefixes that other engines have cached; 0 where it caches none itself."""
        return self.staging // 4 if self.prefill is not None and self.prefill.prefix_cache else 0

    @property
    def lends(self) -> bool:
        """Whether decode engines send what they have cached to prefill engines."""
        return self.fetch_staging > 0 and self.decode.prefix_cache

    def gpu_staging(self, role: Role) -> int:
        """What of a rank's GPU is for KV on its way: staging, packed payloads, and communicators between hosts."""
        if self.prefill is None or self.pool(role).device == "cpu":
            return 0
        by_copy, local_link = self.local_transport == "cuda_ipc", self.local_transport == "nccl"
        linked = local_link or (self._between_gpus and self.hosts.count > 1 and self.remote_transport == "nccl")
        links = self.kv_transfer.link_memory if linked else 0
        if role == "decode":
            return BOUNCE_BYTES + links + self.staging * (by_copy or local_link)
        return BOUNCE_BYTES + links + self.fetch_staging * by_copy + PACKED_BYTES * linked

    def pool(self, role: Role) -> PrefillPool | DecodePool:
        """The pool of `role`. Raises KeyError for a role that this cluster does not have."""
        if role not in self.roles:
            raise KeyError(role)
        return self.prefill if role == "prefill" and self.prefill is not None else self.decode
