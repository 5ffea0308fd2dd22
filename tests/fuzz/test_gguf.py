"""GGUF files: converted, or refused as what they are; a header's promises cost nothing until they are kept."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import gguf
import pytest
from hypothesis import given

from splitserve.cluster.errors import ModelLoadError
from splitserve.models.gguf_convert import MAX_ARRAY, convert_gguf
from tests.fuzz.mutate import bounded, corpus, fuzz, mutated

SEEDS = [path.read_bytes() for path in corpus("gguf") if path.suffix == ".gguf"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def check(folder: Path, content: bytes) -> bool:
    """Whether it was converted."""
    source, target = folder / "model.gguf", folder / "converted"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    source.write_bytes(content)
    try:
        with bounded():
            convert_gguf(source, target)
    except ModelLoadError as error:
        complaint = str(error)
    else:
        return True
    assert str(source) in complaint
    return False


@pytest.mark.parametrize("path", corpus("gguf"), ids=lambda path: path.name)
def test_corpus(path: Path, folder: Path) -> None:
    assert check(folder, path.read_bytes()) == (path.suffix == ".gguf")


@fuzz
@given(content=mutated(SEEDS))
def test_spoilt_bytes(folder: Path, content: bytes) -> None:
    check(folder, content)


def test_an_array_longer_than_any_vocabulary(folder: Path) -> None:
    """Each of its elements, a byte here, would become objects of some hundred bytes."""
    length = MAX_ARRAY + 1
    field = struct.pack("<Q1sIIQ", 1, b"a", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, length)
    assert not check(folder, b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field + bytes(length))
