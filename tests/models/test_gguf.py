"""GGUF conversion: tiny files written here, and SmolLM2's against transformers' own reading of it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, pre_tokenizers

from splitserve.cluster.errors import ModelLoadError
from splitserve.models.config import ModelConfig
from splitserve.models.gguf_convert import convert_gguf, gguf_name
from splitserve.models.gguf_tokenizer import build_tokenizer
from splitserve.models.resolve import SMOLLM2, resolve_model

TinyModels = Callable[[str], tuple[Path, Any]]
BYTES = [chr(code) for code in (*range(33, 127), *range(161, 173), *range(174, 256))]
BYTES += [chr(256 + index) for index in range(256 - len(BYTES))]
PIECES = [*BYTES, "Ġt", "he", "Ġthe", "12", "<|start|>", "<|end|>", "<think>", "hello"]
MERGES = ["Ġ t", "h e", "Ġt he", "1 2"]


def write_gguf(path: Path, model: Any, architecture: str, **changes: Any) -> Path:
    """`model` as a GGUF file; `changes` replace metadata or, with None, leave them out."""
    config, writer = model.config, gguf.GGUFWriter(path, architecture)
    tokens = PIECES + [f"<unused{index}>" for index in range(config.vocab_size - len(PIECES))]
    kinds = [3 if token in ("<|start|>", "<|end|>") else 4 if token == "<think>" else 1 for token in tokens]
    metadata = {
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.key_length": config.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": 0.5,
        f"{architecture}.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": tokens.index("<|start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
    } | changes
    for key, value in metadata.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.numpy()
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = len(data) // config.head_dim
            data = data.reshape(heads, 2, config.head_dim // 2, -1).swapaxes(1, 2).reshape(data.shape)
        if "up_proj.weight" in name:
            kind = gguf.GGMLQuantizationType.F16
            writer.add_tensor(gguf_name(name), gguf.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(name), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "converted").mkdir()
    return tmp_path / "converted"


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("llama", "llama"), ("llama-linear-rope-mqa", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_weights_come_back(tiny: TinyModels, tmp_path: Path, target: Path, name: str, architecture: str) -> None:
    _, model = tiny(name)
    convert_gguf(write_gguf(tmp_path / "model.gguf", model, architecture), target)
    converted, expected = load_file(target / "model.safetensors"), dict(model.named_parameters())
    assert converted.keys() == expected.keys()
    for key, tensor in converted.items():
        stored = expected[key].half().float() if "up_proj.weight" in key else expected[key]
        assert torch.equal(tensor, stored), key
    config = ModelConfig.from_hf(json.loads((target / "config.json").read_text()))
    assert config.architecture == type(model).__name__
    assert config.tie_word_embeddings == model.config.tie_word_embeddings
    assert (config.qkv_bias, config.qk_norm) == (name == "qwen2", name == "qwen3")
    assert config.rms_norm_eps == 0.5
    assert config.eos_token_ids == (PIECES.index("<|end|>"),)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert (settings["bos_token"], settings["eos_token"]) == ("<|start|>", "<|end|>")


FAULTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "architecture": ("gemma3", {}, "general.architecture: found gemma3; expected one of llama, qwen2, qwen3"),
    "missing key": ("llama", {"llama.embedding_length": None}, "llama.embedding_length is missing"),
    "wrong shape": ("llama", {"llama.feed_forward_length": 145}, r"found shape \(144, 96\).*ask for \(145, 96\)"),
    "missing tensor": ("llama", {"llama.block_count": 4}, "tensor blk.3.attn_norm.weight is missing"),
    "tokenizer": ("llama", {"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: found 'llama'; expected gpt2"),
    "words": ("llama", {"tokenizer.ggml.pre": "tekken"}, "tokenizer.ggml.pre: found 'tekken'; expected one of gpt-2"),
    "scaling": ("llama", {"llama.rope.scaling.type": "yarn"}, "rope.scaling.type: found 'yarn'"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(tiny: TinyModels, tmp_path: Path, target: Path, fault: str) -> None:
    architecture, changes, message = FAULTS[fault]
    path = write_gguf(tmp_path / "model.gguf", tiny("llama")[1], architecture, **changes)
    with pytest.raises(ModelLoadError, match=message):
        convert_gguf(path, target)


@pytest.mark.parametrize("kept", [0, 3, 100, 5_000, 200_000])
def test_truncated_files_are_refused(tiny: TinyModels, tmp_path: Path, target: Path, kept: int) -> None:
    path = write_gguf(tmp_path / "model.gguf", tiny("llama")[1], "llama")
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ModelLoadError, match="truncated or not GGUF"):
        convert_gguf(path, target)


def fields(**changes: Any) -> dict[str, Any]:
    kinds = [3 if token in ("<|start|>", "<|end|>") else 4 if token == "<think>" else 1 for token in PIECES]
    found = {"model": "gpt2", "pre": "gpt-2", "tokens": PIECES, "token_type": kinds, "merges": MERGES} | changes
    return {f"tokenizer.ggml.{key}": value for key, value in found.items()}


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_tokens_keep_their_ids_and_special_ones_stay_whole(pre: str) -> None:
    tokenizer = build_tokenizer(fields(pre=pre), "file")
    ids = tokenizer.encode("a the<|end|><think>12é").ids
    twelve = ["12"] if pre in ("gpt-2", "llama-bpe") else ["1", "2"]
    expected = ["a", "Ġthe", "<|end|>", "<think>", *twelve, "Ã", "©"]
    assert ids == [PIECES.index(token) for token in expected]
    assert tokenizer.decode(ids) == "a the<think>12é"
    assert tokenizer.get_vocab_size() == len(PIECES)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_only_llama3_takes_a_word_whole_without_its_merges(pre: str) -> None:
    ids = build_tokenizer(fields(pre=pre), "file").encode("hello").ids
    expected = ["hello"] if pre == "llama-bpe" else ["he", "l", "l", "o"]
    assert ids == [PIECES.index(token) for token in expected]


def test_bos_is_added_where_the_file_says_so() -> None:
    start = PIECES.index("<|start|>")
    with_bos = build_tokenizer(fields(bos_token_id=start, add_bos_token=True), "file")
    without = build_tokenizer(fields(bos_token_id=start, add_bos_token=False), "file")
    assert with_bos.encode("the").ids == [start, *without.encode("the").ids]
    assert with_bos.encode("the", add_special_tokens=False).ids == without.encode("the").ids


def test_smollm2_is_what_transformers_reads() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = resolve_model(SMOLLM2)
    source = Path(json.loads((folder / "source.json").read_text())["source"])
    oracle = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    converted = load_file(folder / "model.safetensors")
    assert converted.keys() == dict(oracle.named_parameters()).keys()
    assert all(torch.equal(converted[name], weight) for name, weight in oracle.named_parameters())
    config = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert (config.rms_norm_eps, config.rope.theta) == (oracle.config.rms_norm_eps, 100_000.0)

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    assert tokenizer.get_vocab() == theirs.get_vocab()
    without_digits = [text for text in texts() if not any(map(str.isnumeric, text))]
    assert len(without_digits) > 100
    for text in without_digits:
        assert tokenizer.encode(text).ids == theirs(text)["input_ids"], repr(text)
    # The model was trained on single digits, split off before anything else; transformers does not read that from GGUF.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = [digits, theirs.backend_tokenizer.pre_tokenizer]
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
    for text in texts():
        ids = tokenizer.encode(text).ids
        assert ids == theirs(text)["input_ids"], repr(text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == text


def texts() -> list[str]:
    source = Path(__file__).read_text()
    alphabet = "ab ZÄéß12٣ \n\t.,'s_-()[]{}#你好🙂👩‍👩‍👧\u200b\u00a0<|im_start|>"
    rng = random.Random(0)
    made = ["".join(rng.choices(alphabet, k=rng.randint(0, 80))) for _ in range(400)]
    return [source, "<|im_start|>user\nHi<|im_end|>\n", "1234567 0.5e-3 ١٢٣", "  x  ", *source.splitlines(), *made]
