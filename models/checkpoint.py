"""Weights of a Hugging Face folder: one model.safetensors, or shards named by an index; memory-mapped."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from splitserve.cluster.errors import ModelLoadError
from splitserve.cluster.json_file import read_object

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
READABLE = ("F32", "F16", "BF16")


class Checkpoint:
    """Reads slices of tensors; nothing beyond a slice is ever in memory. Use as a context manager.

    Raises ModelLoadError naming the file or tensor that is missing, truncated, or of another shape or type.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}
        self._stack = ExitStack()
        index = folder / INDEX
        self._file_of = _read_index(index) if index.is_file() else None

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def read(self, name: str, shape: tuple[int, ...], dim: int, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` along `dim` (0 or 1) of tensor `name`, which must be of `shape`."""
        path, file = self._open(name)
        if name not in file.keys():  # noqa: SIM118 - not a mapping
            raise ModelLoadError(f"{path}: tensor {name} is missing; the weights are not those of config.json")
        stored = file.get_slice(name)
        if (found := tuple(stored.get_shape())) != shape:
            raise ModelLoadError(f"{path}: {name}: found shape {list(found)}; config.json asks for {list(shape)}")
        if (dtype := stored.get_dtype()) not in READABLE:
            raise ModelLoadError(f"{path}: {name}: found dtype {dtype}; expected one of {', '.join(READABLE)}")
        part: torch.Tensor = stored[:, start:stop] if dim else stored[start:stop]
        return part

    def _open(self, name: str) -> tuple[Path, Any]:
        if self._file_of is None:
            file_name = SINGLE_FILE
        elif name in self._file_of:
            file_name = self._file_of[name]
        else:
            raise ModelLoadError(f"{self._folder / INDEX}: tensor {name} is missing; the download is incomplete")
        path = self._folder / file_name
        if file_name not in self._files:
            if not path.is_file():
                raise ModelLoadError(f"{path}: no such file; the model folder needs its weights as safetensors")
            try:
                self._files[file_name] = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{path}: truncated or not safetensors ({error}); fetch it again") from error
        return path, self._files[file_name]


def _read_index(path: Path) -> dict[str, str]:
    match read_object(path):
        case {"weight_map": dict(weight_map)} if all(_is_file_name(file) for file in weight_map.values()):
            return weight_map
    raise ModelLoadError(f"{path}: weight_map: expected an object of tensor names and file names")


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) < 200 and value == Path(value).name
