"""Files of a model's folder: used, or refused by name when they are loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from splitserve.cluster.errors import InvalidRequest, ModelLoadError
from splitserve.models.checkpoint import INDEX, SINGLE_FILE, Checkpoint
from splitserve.models.resolve import load_model_config
from splitserve.router.tokenizer import Tokenizer
from tests.fuzz.mutate import bounded, changed, corpus, fuzz, mutated, seeds
from tests.router.tiny_tokenizers import byte_fallback, write_folder

CONFIGS = [json.loads(path.read_bytes()) for path in corpus("config") if path.suffix == ".json"]
TENSORS = {"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "the fox"}]


def dumped(tree: Any) -> bytes:
    return json.dumps(tree).encode()


def refused(call: Callable[[], object], *expected: type[Exception]) -> bool:
    """Whether `call` raises one of `expected`, with a message that can be shown, and within limits."""
    try:
        with bounded():
            call()
    except expected as error:
        return bool(str(error).encode())
    return False


def load(folder: Path) -> None:
    """What a router does with a folder, up to the answer's text. Only a conversation may be refused later on."""
    tokenizer = Tokenizer.load(folder)
    tokenizer.decode(list(range(min(tokenizer.vocab_size, 300))))
    tokenizer.encode("the fox\0")
    refused(lambda: tokenizer.encode_chat(TALK), InvalidRequest)


def read_all(folder: Path) -> None:
    for name, tensor in TENSORS.items():
        with Checkpoint(folder) as checkpoint:
            assert checkpoint.read(name, tuple(tensor.shape), 0, 1, 2).shape == tensor[1:2].shape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("path", corpus("config"), ids=lambda path: path.name)
def test_config_corpus(path: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(path.read_bytes())
    assert refused(lambda: load_model_config(str(tmp_path)), ModelLoadError) == (path.suffix != ".json")


@fuzz
@given(content=mutated(seeds("config")) | changed(CONFIGS).map(dumped))
def test_config(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "config.json").write_bytes(content)
    refused(lambda: load_model_config(str(folder)), ModelLoadError)


SETTINGS, TOKENIZERS = seeds("tokenizer_config"), [byte_fallback().to_str().encode()]


@pytest.mark.parametrize("path", corpus("tokenizer_config"), ids=lambda path: path.name)
def test_tokenizer_config_corpus(path: Path, folder: Path) -> None:
    check_file(folder, "tokenizer_config.json", path.read_bytes())


@pytest.mark.parametrize("path", corpus("tokenizer"), ids=lambda path: path.name)
def test_tokenizer_corpus(path: Path, folder: Path) -> None:
    check_file(folder, "tokenizer.json", path.read_bytes())


@fuzz
@given(content=mutated(SETTINGS[:2]) | changed([json.loads(SETTINGS[0]), json.loads(SETTINGS[1])]).map(dumped))
def test_tokenizer_config(folder: Path, content: bytes) -> None:
    check_file(folder, "tokenizer_config.json", content)


@fuzz
@given(content=mutated(TOKENIZERS) | changed([json.loads(text) for text in TOKENIZERS]).map(dumped))
def test_tokenizer(folder: Path, content: bytes) -> None:
    check_file(folder, "tokenizer.json", content)


@fuzz
@given(vocab_size=st.from_type(object) | st.integers())
def test_vocab_size(folder: Path, vocab_size: object) -> None:
    content = json.dumps({"vocab_size": vocab_size}, default=str)
    check_file(folder, "config.json", content.encode())


def check_file(folder: Path, name: str, content: bytes) -> None:
    """Load the folder with another file `name`, and put the right one back."""
    right = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    try:
        refused(lambda: load(folder), ModelLoadError)
    finally:
        (folder / name).write_bytes(right)


def header(length: int, content: bytes) -> bytes:
    return length.to_bytes(8, "little") + content


PROMISES = {
    "2^60 bytes of header": header(2**60, b"{}"),
    "2^60 elements": header(60, b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'),
    "shape overflows": header(72, b'{"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}'),
    "another shape": save({"a": torch.ones(3, 2), "b": TENSORS["b"]}),
    "deep": header(200_000, b"[" * 200_000),
    "empty": b"",
}


@pytest.mark.parametrize("content", PROMISES.values(), ids=PROMISES)
def test_promises_of_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / SINGLE_FILE).write_bytes(content)
    assert refused(lambda: read_all(tmp_path), ModelLoadError)


@fuzz
@given(content=mutated([save(TENSORS)]))
def test_safetensors(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / INDEX).unlink(missing_ok=True)
    (folder / SINGLE_FILE).unlink(missing_ok=True)  # a mapped file is not written over
    (folder / SINGLE_FILE).write_bytes(content)
    refused(lambda: read_all(folder), ModelLoadError)


INDEXES = [{"metadata": {"total_size": 32}, "weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}]
NAMES = st.sampled_from(["..", "", ".", "\0", "\ud800", "../x.safetensors", "/etc/passwd", "a" * 300, "x.safetensors"])


@fuzz
@given(content=mutated([dumped(index) for index in INDEXES]) | changed(INDEXES, NAMES).map(dumped))
def test_index(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.getbasetemp() / "indexed"
    folder.mkdir(exist_ok=True)
    (folder / "x.safetensors").write_bytes(save(TENSORS))
    (folder / INDEX).write_bytes(content)
    refused(lambda: read_all(folder), ModelLoadError)
