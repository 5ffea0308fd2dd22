from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "ray", "numpy"}


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("splitserve.router.service", HEAVY),
        ("splitserve.client", HEAVY | {"zmq", "pydantic", "tokenizers", "jinja2", "msgpack"}),
    ],
)
def test_importing_stays_light(module: str, forbidden: set[str]) -> None:
    code = f"import json, sys, {module}; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert module in loaded
    assert not forbidden & set(loaded)
