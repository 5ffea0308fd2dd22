"""A wheel holds `splitserve/`, with everything that the installed package needs, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_wheel_contains_only_splitserve(tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = tmp_path / "source"
    for name in tracked.splitlines():
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        elif (ROOT / name).exists():
            target.write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta; print(build_meta.build_wheel('..'))"
    subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"splitserve"}
    expected = {path.replace("splitserve/", "", 1) for path in names if ".dist-info/" not in path}
    for file in (
        "kernels/paged_attention.py",
        "router/status_page.html",
        "router/v1/splitserve.proto",
        "deploy/alerts/splitserve.yaml",
        "deploy/dashboards/splitserve.json",
        "deploy/topologies/cpu-demo.yaml",
        "deploy/topologies/topology.schema.json",
        "models/configs/deepseek-v3.json",
        "py.typed",
    ):
        assert file in expected
    assert len(names) == len(set(names))
