"""The pools of a topology file: engines that do the same work, and how the ranks of each share the model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from splitserve.cluster.layout import MAX_TP
from splitserve.cluster.topology_sections import DEFAULT_CHUNK_TOKENS, Bytes, Resource, Section


class Layout(Section):
    """How a replica's ranks share the model: `tp` times `dp` ranks."""

    tp: int = Field(
        default=1, ge=1, le=MAX_TP, description="tensor parallel ranks of an engine; heads must divide by it"
    )
    dp: int = Field(default=1, ge=1, le=1024, description="data parallel engines of a replica")
    ep: int = Field(
        default=1, ge=1, le=4096, description="expert parallel ranks: tp x dp for an MoE model, 1 for a dense one"
    )

    @property
    def ranks(self) -> int:
        """Ranks of one replica."""
        return self.tp * self.dp


class Pool(Section):
    """Replicas that all do the same work."""

    replicas: int = Field(default=1, ge=1, le=1024, description="copies of the model")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="where its ranks compute")
    gpu_fraction: Annotated[float, Field(ge=0.01, le=1)] = Field(
        default=1.0, description="share of a GPU and its memory that a rank takes; below 1, ranks share GPUs"
    )
    layout: Layout = Field(default=Layout(), description="how a replica's ranks share the model")
    kv_memory: Bytes = Field(default=512 * 2**20, description="KV cache of one rank, in bytes, such as 512MiB")
    page_size: Literal[16, 32, 64, 128] = Field(default=64, description="tokens in a KV page")
    max_sequences: int = Field(
        default=64, ge=1, le=65536, description="sequences an engine holds: reserved, waiting, running"
    )
    threads: int = Field(default=1, ge=1, le=1024, description="CPU threads of one rank")
    prefix_cache: bool = Field(default=True, description="whether KV of equal prompt beginnings is reused")
    node_resource: Resource = Field(default=None, description="Ray custom resource of the nodes that its ranks run on")

    @field_validator("layout")
    @classmethod
    def _whole_gpus(cls, value: Layout, info: ValidationInfo) -> Layout:
        fraction = info.data.get("gpu_fraction", 1.0)
        if fraction < 1 and value.tp > 1:
            raise ValueError(f"expected tp 1 where gpu_fraction is {fraction:g}: an engine's ranks need their own GPUs")
        return value


class PrefillPool(Pool):
    """Engines that compute prompts."""

    chunk_tokens: int = Field(
        default=DEFAULT_CHUNK_TOKENS,
        ge=1,
        le=65536,
        description="prompt tokens computed in one step, over all requests",
    )


class DecodePool(Pool):
    """Engines that compute answers; both prompts and answers where the cluster is colocated."""

    slots: int = Field(
        default=32, ge=1, le=4096, validate_default=True, description="sequences decoded at once by an engine"
    )
    capacities: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(
        default=(16, 64, 128, 256),
        max_length=16,
        strict=False,  # files have lists
        description="numbers of sequences that a GPU captures a decode graph for; those below slots, and slots itself",
    )
    chunk_tokens: int | None = Field(
        default=None, ge=1, le=65536, description="prompt tokens computed in one step; only where colocated is true"
    )

    @field_validator("slots")
    @classmethod
    def _slots_filled(cls, value: int, info: ValidationInfo) -> int:
        held = info.data.get("max_sequences", value)
        if value > held:
            raise ValueError(f"expected at most max_sequences, {held}: more slots could never fill")
        return value

    @property
    def graph_capacities(self) -> tuple[int, ...]:
        """Rows of the decode graphs, ascending; the last one is `slots`."""
        return (*sorted({capacity for capacity in self.capacities if capacity < self.slots}), self.slots)
