from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = {
    "vocab_size": 301,
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 3,
    "num_attention_heads": 12,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "eos_token_id": 1,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 16,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.7,
}
LATENT = {
    "num_key_value_heads": 4,
    "num_attention_heads": 4,
    "kv_lora_rank": 40,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "head_dim": 8,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}
# name: (model class, config class, what differs from SHAPE)
TINY_MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {"num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama3-rope-biases": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_parameters": LLAMA3,
            "attention_bias": True,
            "mlp_bias": True,
        },
    ),
    "llama-linear-rope-mqa": (
        LlamaForCausalLM,
        LlamaConfig,
        {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "deepseek-v2": (DeepseekV2ForCausalLM, DeepseekV2Config, LATENT | {"q_lora_rank": None, "rope_parameters": YARN}),
    "deepseek-v2-groups": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config,
        LATENT | {"q_lora_rank": 48, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek-v3": (
        DeepseekV3ForCausalLM,
        DeepseekV3Config,
        LATENT | {"q_lora_rank": 48, "n_group": 4, "topk_group": 2, "rope_parameters": YARN},
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {"num_key_value_heads": 6, "head_dim": 32}),
}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A random model of TINY_MODELS by name: its folder, and transformers' own model.

    Matrices are scaled by 1/sqrt(fan in), biases and norms are far from 0 and 1, so that each of them matters.
    """
    made: dict[str, tuple[Path, Any]] = {}

    def make(name: str) -> tuple[Path, Any]:
        if name not in made:
            model_class, config_class, changes = TINY_MODELS[name]
            torch.manual_seed(len(name))
            model = model_class(config_class(**{**SHAPE, **changes})).float().eval()
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() >= 2:
                    # A larger tied embedding would make every token predict itself.
                    tied = "embed" in parameter_name and model.config.tie_word_embeddings
                    torch.nn.init.normal_(parameter, std=(0.05 if tied else 1.0) * parameter.shape[-1] ** -0.5)
                elif "norm" in parameter_name:
                    torch.nn.init.uniform_(parameter, 0.5, 1.5)
                else:
                    torch.nn.init.normal_(parameter, std=0.1)
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("e_score_correction_bias"):
                    torch.nn.init.normal_(buffer, std=0.1)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            made[name] = folder, model
        return made[name]

    return make
