"""Which class runs which architecture."""

from __future__ import annotations

from splitserve.models.config import DENSE_ARCHITECTURES
from splitserve.models.llama import LlamaModel

DECODERS: dict[str, type[LlamaModel]] = dict.fromkeys(DENSE_ARCHITECTURES, LlamaModel)
