from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from splitserve.cluster.errors import ModelLoadError
from splitserve.models.config import (
    LinearRope,
    Llama3Rope,
    ModelConfig,
    RopeConfig,
    YarnRope,
)
from splitserve.models.parameters import local_shape, parameters, total_parameters, weight_bytes

DEEPSEEK_V3: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "models" / "configs" / "deepseek-v3.json").read_text()
)
DEEPSEEK_V2_LITE = DEEPSEEK_V3 | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "first_k_dense_replace": 1,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 27,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "quantization_config": None,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "topk_method": "greedy",
    "vocab_size": 102400,
}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 256,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 130,
}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": False, "sliding_window": 128}
QWEN3 = LLAMA | {"architectures": ["Qwen3ForCausalLM"], "head_dim": 16}


def without(raw: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in raw.items() if name != key}


def test_defaults_of_a_llama() -> None:
    config = ModelConfig.from_hf(without(LLAMA, "num_key_value_heads"))
    assert (config.num_kv_heads, config.head_dim, config.rope) == (8, 8, RopeConfig(10000.0))
    assert (config.qkv_bias, config.output_bias, config.mlp_bias, config.qk_norm) == (False,) * 4
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((), None, "float32")
    assert (config.mla, config.moe, config.tie_word_embeddings) == (None, None, False)


def test_what_sets_the_families_apart() -> None:
    biased = ModelConfig.from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    assert (biased.qkv_bias, biased.output_bias, biased.mlp_bias) == (True, True, True)
    qwen2 = ModelConfig.from_hf(QWEN2)
    assert (qwen2.qkv_bias, qwen2.output_bias, qwen2.qk_norm) == (True, False, False)
    qwen3 = ModelConfig.from_hf(QWEN3)
    assert (qwen3.qkv_bias, qwen3.qk_norm, qwen3.head_dim) == (False, True, 16)


def test_tokens_and_dtype() -> None:
    config = ModelConfig.from_hf(LLAMA | {"eos_token_id": [2, 7], "bos_token_id": 0, "torch_dtype": "bfloat16"})
    assert (config.eos_token_ids, config.bos_token_id, config.dtype) == ((2, 7), 0, "bfloat16")
    config = ModelConfig.from_hf(LLAMA | {"eos_token_id": 2, "dtype": "float16", "torch_dtype": None})
    assert (config.eos_token_ids, config.dtype) == ((2,), "float16")


LLAMA3 = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("keys", "rope"),
    [
        ({"rope_theta": 500000}, RopeConfig(500000.0)),
        ({"rope_scaling": None}, RopeConfig(10000.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, RopeConfig(5e5)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeConfig(10000.0, LinearRope(2.0))),
        (
            {"rope_theta": 5e5, "rope_scaling": LLAMA3 | {"rope_type": "llama3"}},
            RopeConfig(5e5, Llama3Rope(8.0, 1.0, 4.0, 64)),
        ),
        (
            {"rope_parameters": LLAMA3 | {"rope_type": "llama3", "rope_theta": 5e5}},
            RopeConfig(5e5, Llama3Rope(8.0, 1.0, 4.0, 64)),
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            RopeConfig(10000.0, YarnRope(4.0, 256, 32.0, 1.0, None, None, None)),
        ),
    ],
)
def test_both_spellings_of_rope(keys: dict[str, Any], rope: RopeConfig) -> None:
    assert ModelConfig.from_hf(LLAMA | keys).rope == rope


def test_deepseek_v3() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    assert config.kv_bytes_per_token("bfloat16") == 70_272
    assert total_parameters(config) == 671_026_419_200
    assert config.rope.scaling == YarnRope(40.0, 4096, 32.0, 1.0, 1.0, 1.0, None)
    assert config.mla is not None
    assert config.mla.latent_dim == 576
    assert config.moe is not None
    assert (config.moe.num_experts, config.moe.top_k, config.moe.first_k_dense) == (256, 8, 3)
    # One byte a linear weight, four for each 128 x 128 of them, two for each of the others.
    embeddings_and_router = 2 * 129280 * 7168 + 58 * 256 * 7168
    assert weight_bytes(config, 1, 1, 2) == pytest.approx(
        671_026_419_200 * (1 + 4 / 128**2) + embeddings_and_router, rel=1e-5
    )


def test_deepseek_v2_lite() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V2_LITE)
    assert config.kv_bytes_per_token("bfloat16") == 31_104
    assert total_parameters(config) == 15_706_484_224
    assert config.mla is not None
    assert config.mla.q_lora_rank is None
    assert weight_bytes(config, 1, 1, 2) == 2 * 15_706_484_224


def test_kv_bytes_of_grouped_query_attention() -> None:
    config = ModelConfig.from_hf(LLAMA)
    assert config.kv_bytes_per_token("float32") == 2 * 2 * 2 * 8 * 4
    assert config.kv_layout(1, 16, "bfloat16").bytes_per_page == 16 * config.kv_bytes_per_token("bfloat16")


@pytest.mark.parametrize(
    ("raw", "key"),
    [
        *((without(LLAMA, key), key) for key in LLAMA if key != "num_key_value_heads"),
        *((without(DEEPSEEK_V3, key), key) for key in ("kv_lora_rank", "v_head_dim", "n_routed_experts")),
        *((LLAMA | {key: "8"}, key) for key in ("hidden_size", "rms_norm_eps", "num_key_value_heads", "rope_theta")),
        *((LLAMA | {key: True}, key) for key in ("vocab_size", "rms_norm_eps")),
        (LLAMA | {"rms_norm_eps": 10**400}, "rms_norm_eps"),
        (LLAMA | {"vocab_size": 0}, "vocab_size"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads"),
        (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings"),
        (LLAMA | {"architectures": ["MistralForCausalLM"]}, "architectures"),
        (LLAMA | {"architectures": "LlamaForCausalLM"}, "architectures"),
        (LLAMA | {"eos_token_id": "</s>"}, "eos_token_id"),
        (LLAMA | {"eos_token_id": [-1]}, "eos_token_id"),
        (LLAMA | {"torch_dtype": "float8"}, "torch_dtype"),
        (LLAMA | {"hidden_act": "gelu"}, "hidden_act"),
        (LLAMA | {"sliding_window": 4096}, "sliding_window"),
        (QWEN2 | {"use_sliding_window": True}, "use_sliding_window"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        (LLAMA | {"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        (LLAMA | {"head_dim": 7}, "head_dim"),
        (without(QWEN3, "head_dim"), "head_dim"),
        (LLAMA | {"rope_scaling": [1]}, "rope_scaling"),
        (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2}}, "rope_scaling.type"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "rope_scaling.low_freq_factor"),
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 2, "ramp": 1}}, "rope_scaling.ramp"),
        (LLAMA | {"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor"),
        (DEEPSEEK_V3 | {"quantization_config": {"quant_method": "int4"}}, "quantization_config.quant_method"),
        (DEEPSEEK_V3 | {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.weight_block_size"),
        (DEEPSEEK_V3 | {"num_experts_per_tok": 257}, "num_experts_per_tok"),
        (DEEPSEEK_V3 | {"attention_bias": True}, "attention_bias"),
        (DEEPSEEK_V3 | {"topk_method": "greedy"}, "topk_method"),
        (DEEPSEEK_V3 | {"scoring_func": "softmax"}, "scoring_func"),
        (DEEPSEEK_V3 | {"n_group": 7}, "n_group"),
        (DEEPSEEK_V3 | {"topk_group": 9}, "topk_group"),
        (DEEPSEEK_V3 | {"n_group": 64, "topk_group": 1}, "num_experts_per_tok"),
        (DEEPSEEK_V2_LITE | {"norm_topk_prob": True}, "norm_topk_prob"),
        (DEEPSEEK_V2_LITE | {"topk_method": "group_limited_greedy", "n_group": None}, "n_group"),
    ],
)
def test_faults_name_the_file_and_the_key(raw: dict[str, Any], key: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        ModelConfig.from_hf(raw, "some/config.json")
    assert str(caught.value).startswith(f"some/config.json: {key}: found ")


def test_weights_are_those_of_transformers() -> None:
    """Names and shapes of every weight, for each architecture, without allocating any."""
    transformers = pytest.importorskip("transformers")
    import torch

    biased = LLAMA | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    small_latent = {"kv_lora_rank": 24, "qk_nope_head_dim": 12, "qk_rope_head_dim": 4, "v_head_dim": 10}
    small_experts = {"n_routed_experts": 16, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
    small = LLAMA | small_latent | small_experts | {"num_key_value_heads": 8, "quantization_config": None}
    for raw in (LLAMA, biased, QWEN2, QWEN3, DEEPSEEK_V3 | small, DEEPSEEK_V2_LITE | small):
        raw = raw | {"model_type": raw["architectures"][0].removesuffix("ForCausalLM").lower()}
        raw["model_type"] = raw["model_type"].replace("deepseek", "deepseek_")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw))
        theirs = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        theirs |= {name: tuple(w.shape) for name, w in model.named_buffers() if name.endswith("correction_bias")}
        ours = {parameter.name: parameter.shape for parameter in parameters(ModelConfig.from_hf(raw))}
        assert _fuse_experts(ours) == theirs, raw["architectures"]


def _fuse_experts(ours: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """transformers stacks gate on up, and leaves `.weight` off the experts' names."""
    fused: dict[str, tuple[int, ...]] = {}
    for name, shape in ours.items():
        if ".experts.gate_proj" in name:
            fused[name.replace("gate_proj.weight", "gate_up_proj")] = (shape[0], 2 * shape[1], shape[2])
        elif ".experts.up_proj" not in name:
            fused[name.replace("experts.down_proj.weight", "experts.down_proj")] = shape
    return fused


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_every_rank_keeps_its_share(tp: int) -> None:
    """Shares add up to the model but for what is whole or repeated by design."""
    config = ModelConfig.from_hf(QWEN2)
    assert tp * weight_bytes(config, tp, 1, 4) >= weight_bytes(config, 1, 1, 4)
    shapes = {parameter.name: local_shape(parameter, config, tp, 1) for parameter in parameters(config)}
    layer = "model.layers.1"
    assert shapes["model.embed_tokens.weight"] == (-(-130 // tp), 64)
    assert shapes[f"{layer}.self_attn.q_proj.weight"] == (64 // tp, 64)
    assert shapes[f"{layer}.self_attn.k_proj.bias"] == (max(1, 2 // tp) * 8,)
    assert shapes[f"{layer}.self_attn.o_proj.weight"] == (64, 64 // tp)
    assert shapes[f"{layer}.mlp.down_proj.weight"] == (64, 96 // tp)
    assert shapes[f"{layer}.input_layernorm.weight"] == (64,)


def test_biases_after_a_sum_over_ranks_stay_whole() -> None:
    config = ModelConfig.from_hf(LLAMA | {"attention_bias": True, "mlp_bias": True})
    shapes = {parameter.name: local_shape(parameter, config, 2, 1) for parameter in parameters(config)}
    assert shapes["model.layers.0.self_attn.o_proj.bias"] == (64,)
    assert shapes["model.layers.0.mlp.down_proj.bias"] == (64,)
    assert shapes["model.layers.0.mlp.up_proj.bias"] == (48,)


def test_experts_divide_over_ep_alone() -> None:
    config = ModelConfig.from_hf(DEEPSEEK_V3)
    one, many = weight_bytes(config, 1, 1, 2), weight_bytes(config, 1, 64, 2)
    expert = 3 * 7168 * 2048
    assert one - many == 58 * (256 - 4) * (expert + 4 * expert // 128**2)


def test_config_needs_no_torch() -> None:
    code = "import sys, splitserve.models.parameters; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
