"""How a model and its KV cache are cut over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from splitserve.cluster.codec import message

MAX_TP = 1024
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@message
@dataclass(frozen=True)
class KvLayout:
    """KV cache of one engine: what each of its `tp` ranks holds of every layer.

    A rank's layer is one tensor [planes, num_pages, heads_per_rank, page_size, head_dim]. `planes` is 2 (K and V)
    for multi-head and grouped-query attention, and 1 for MLA, whose single latent (kv_lora_rank + qk_rope_head_dim
    wide) is whole on every rank.
    """

    tp: int
    num_layers: int
    planes: Literal[1, 2]
    num_kv_heads: int
    head_dim: int
    page_size: int
    dtype: Literal["float32", "bfloat16", "float16"]

    def __post_init__(self) -> None:
        if min(self.tp, self.num_layers, self.num_kv_heads, self.head_dim, self.page_size) < 1:
            raise ValueError(f"every size of a KvLayout must be at least 1: {self}")
        if self.tp > MAX_TP:
            raise ValueError(f"tp={self.tp}: an engine has at most {MAX_TP} ranks")
        if not self.is_latent and self.num_kv_heads % self.tp and self.tp % self.num_kv_heads:
            raise ValueError(f"{self.num_kv_heads} KV heads do not divide over tp={self.tp}")

    @property
    def is_latent(self) -> bool:
        return self.planes == 1

    @property
    def heads_per_rank(self) -> int:
        return 1 if self.is_latent else max(1, self.num_kv_heads // self.tp)

    def heads(self, rank: int) -> range:
        """Global KV heads that `rank` holds; replicated when there are more ranks than heads."""
        first = 0 if self.is_latent else rank * self.num_kv_heads // self.tp
        return range(first, first + self.heads_per_rank)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in one rank's cache, all layers."""
        return self.num_layers * self.planes * self.heads_per_rank * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def bytes_per_page(self) -> int:
        return self.bytes_per_token * self.page_size


def head_range(num_heads: int, tp: int, rank: int) -> range:
    """Query heads of `rank`: contiguous and equal; `num_heads` must divide by `tp`."""
    per_rank = num_heads // tp
    return range(rank * per_rank, (rank + 1) * per_rank)
