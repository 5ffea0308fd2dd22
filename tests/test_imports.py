"""Imports point one way, the light packages stay light, and a wheel holds nothing but `splitserve/`."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ALLOWED = {
    "cluster": set(),
    "kernels": {"cluster"},
    "models": {"cluster", "kernels"},
    "engine": {"cluster", "kernels", "models"},
    "kv_transfer": {"cluster", "kernels", "models", "engine"},
    "prefill_worker": {"cluster", "kernels", "models", "engine", "kv_transfer"},
    "decode_worker": {"cluster", "kernels", "models", "engine", "kv_transfer"},
    "router": {"cluster", "models"},
    "client": {"router.v1"},
    "deploy": {
        "cluster", "kernels", "models", "engine", "kv_transfer", "prefill_worker", "decode_worker", "router", "client",
    },
}  # fmt: skip


def imported_modules(file: Path) -> set[str]:
    """Modules below `splitserve` that a file imports, without the leading name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("splitserve.") for name in found if name.startswith("splitserve.")}


@pytest.mark.parametrize("folder", sorted(ALLOWED))
def test_imports_point_one_way(folder: str) -> None:
    files = [file for file in (ROOT / folder).rglob("*.py") if "_pb2" not in file.name]
    allowed = ALLOWED[folder] | {folder, "__version__"}
    for file in files:
        for module in imported_modules(file):
            assert any(f"{module}.".startswith(f"{name}.") for name in allowed), f"{file.name} imports {module}"


def test_every_code_folder_is_linked_and_ruled() -> None:
    links = {link.name for link in (ROOT / "splitserve").iterdir() if link.is_symlink()}
    assert links == set(ALLOWED)
    assert not (ROOT / "kernels" / "__init__.py").exists(), "would shadow Hugging Face's package of that name"


@pytest.mark.parametrize("module", ["splitserve.router.service", "splitserve.client", "splitserve.cluster.messages"])
def test_light_packages_load_no_tensors(module: str) -> None:
    script = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'ray') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
