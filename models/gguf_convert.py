"""GGUF -> Hugging Face folder: config.json, model.safetensors in float32, tokenizer.json, tokenizer_config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, BinaryIO

import gguf
import numpy as np
import numpy.typing as npt

from splitserve.cluster.errors import ModelLoadError
from splitserve.models.config import ModelConfig
from splitserve.models.config_keys import Keys
from splitserve.models.gguf_tokenizer import write_tokenizer
from splitserve.models.parameters import Parameter, parameters

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
CHUNK_ELEMENTS = 1 << 22  # dequantised at once, 16 MiB
MAX_ARRAY = 1 << 22  # elements of a metadata array; the longest ones list a vocabulary's merges

TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert_gguf(source: Path, folder: Path) -> None:
    """Convert `source` into the empty `folder`. Memory beyond the mapped file stays within a few chunks.

    Raises ModelLoadError for a file that is broken or asks for what is not supported.
    """
    file = GgufFile(source)
    raw = hugging_face_config(file)
    config = ModelConfig.from_hf(raw, str(source))
    (folder / "config.json").write_text(json.dumps(raw, indent=2))
    write_tokenizer(file.fields, folder, str(source))
    with (folder / "model.safetensors").open("wb") as output:
        _write_safetensors(file, config, output)


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Believes no length before the bytes are there: gguf's own reads past the end, as often as a header says."""

    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: str | None = None) -> Any:
        end = offset + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it has {len(self.data)} bytes and reads on to {end}")
        return super()._get(offset, dtype, count, override_order)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type == gguf.GGUFValueType.ARRAY:
            kind, length = int(self._get(orig_offs, np.uint32)[0]), int(self._get(orig_offs + 4, np.uint64)[0])
            if kind == gguf.GGUFValueType.ARRAY or length > MAX_ARRAY:
                raise ValueError(f"an array of {length} elements of type {kind}")
        return super()._get_field_parts(orig_offs, raw_type)


class GgufFile:
    """Metadata and tensors of a GGUF file by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            reader = _Reader(path)
            self.fields = {name: field.contents() for name, field in reader.fields.items()}
        except (ValueError, IndexError, KeyError, OverflowError) as error:
            raise ModelLoadError(f"{path}: truncated or not GGUF ({error}); fetch it again") from error
        self.keys = Keys(self.fields, str(path))
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self.fields.get("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise ModelLoadError(
                f"{path}: general.architecture: found {self.architecture}; expected one of {supported}"
            )

    def value(self, key: str) -> Any:
        """The architecture's value `key`, which must be there."""
        name = f"{self.architecture}.{key}"
        if name not in self.fields:
            raise ModelLoadError(f"{self.path}: {name} is missing; fetch another conversion of this model")
        return self.fields[name]

    def integer(self, key: str) -> int:
        """Like `value`, for a whole number of at least 1."""
        self.value(key)
        return self.keys.integer(f"{self.architecture}.{key}")

    def optional(self, key: str, default: Any) -> Any:
        return self.fields.get(f"{self.architecture}.{key}", default)


def hugging_face_config(file: GgufFile) -> dict[str, Any]:
    """The config.json that says the same as the file's metadata."""
    heads, hidden = file.integer("attention.head_count"), file.integer("embedding_length")
    names = file.tensors
    raw = {
        "architectures": [ARCHITECTURES[file.architecture]],
        "model_type": file.architecture,
        "vocab_size": len(file.keys.strings("tokenizer.ggml.tokens")),
        "hidden_size": hidden,
        "intermediate_size": file.value("feed_forward_length"),
        "num_hidden_layers": file.value("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.optional("attention.head_count_kv", heads),
        "head_dim": file.optional("attention.key_length", hidden // heads),
        "rms_norm_eps": file.value("attention.layer_norm_rms_epsilon"),
        "rope_theta": file.optional("rope.freq_base", 10000.0),
        "max_position_embeddings": file.value("context_length"),
        "tie_word_embeddings": "output.weight" not in names,
        "attention_bias": "blk.0.attn_q.bias" in names,
        "eos_token_id": _stop_tokens(file),
        "bos_token_id": file.fields.get("tokenizer.ggml.bos_token_id"),
        "dtype": "float32",
    }
    if scaling := _rope_scaling(file):
        raw["rope_scaling"] = scaling
    return raw


def _stop_tokens(file: GgufFile) -> list[int]:
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    return sorted({token for key in keys for token in file.keys.token_ids(key)})


def _rope_scaling(file: GgufFile) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        raise ModelLoadError(
            f"{file.path}: rope_freqs.weight: Llama 3 rope scaling is read from config.json only; use "
            "the model's Hugging Face folder"
        )
    match file.optional("rope.scaling.type", "none"):
        case "none":
            return None
        case "linear":
            return {"rope_type": "linear", "factor": file.value("rope.scaling.factor")}
        case kind:
            raise ModelLoadError(f"{file.path}: rope.scaling.type: found {kind!r}; expected none or linear")


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face weight."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{LAYER_NAMES[module]}.{kind}"


def _write_safetensors(file: GgufFile, config: ModelConfig, output: BinaryIO) -> None:
    """The format: 8 bytes of header length, a JSON header padded with spaces, then all tensors end to end."""
    listed: list[Parameter] = []
    offset = 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for parameter in parameters(config):  # metadata may promise any number: each is checked before the next is made
        _check(file, parameter)
        listed.append(parameter)
        end = offset + 4 * parameter.numel
        header[parameter.name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    output.write(len(encoded).to_bytes(8, "little") + encoded)
    for parameter in listed:
        tensor = file.tensors[gguf_name(parameter.name)]
        order = _row_order(parameter, file.architecture, config)
        step = max(1, CHUNK_ELEMENTS * parameter.shape[0] // parameter.numel)
        for start in range(0, len(order), step):
            rows = _dequantised(file, tensor, order[start : start + step])
            output.write(rows.astype("<f4", copy=False).tobytes())


def _check(file: GgufFile, parameter: Parameter) -> None:
    name = gguf_name(parameter.name)
    if name not in file.tensors:
        raise ModelLoadError(f"{file.path}: tensor {name} is missing; the file is incomplete")
    if (found := tuple(int(size) for size in reversed(file.tensors[name].shape))) != parameter.shape:
        raise ModelLoadError(f"{file.path}: {name}: found shape {found}; its metadata ask for {parameter.shape}")


def _dequantised(file: GgufFile, tensor: gguf.ReaderTensor, rows: npt.NDArray[np.int64]) -> Any:
    try:
        return gguf.dequantize(tensor.data[rows], tensor.tensor_type)
    except NotImplementedError as error:
        raise ModelLoadError(f"{file.path}: {tensor.name}: found {tensor.tensor_type.name}; convert to F16") from error


def _row_order(parameter: Parameter, architecture: str, config: ModelConfig) -> npt.NDArray[np.int64]:
    """Where each output row lies in the file.

    Llama files interleave the two halves of every Q and K head, for the other form of rotary embedding: within a
    head, row 2i is our row i and row 2i + 1 our row i + dim / 2.
    """
    rows = np.arange(parameter.shape[0])
    if architecture == "llama" and re.search(r"\.(q|k)_proj\.", parameter.name):
        rows = rows.reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).ravel()
    return rows
