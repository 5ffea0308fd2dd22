"""Reads the JSON files of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from splitserve.cluster.errors import ModelLoadError

MAX_BYTES = 64 << 20  # the longest ones list a hundred thousand tensors: 10 MB


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelLoadError, naming the file, for anything else."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ModelLoadError(f"{path}: over {MAX_BYTES >> 20} MiB; fetch it again")
        content = json.loads(data.decode("utf-8"))
    except OSError as error:
        raise ModelLoadError(f"{path}: {error.strerror}; make it readable") from error
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path}: found {type(content).__name__}; expected an object")
    return content
