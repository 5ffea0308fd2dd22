"""The trained model as a Hugging Face folder, in the format of DeepSeek-V3: config.json and one file of weights.

The main model's weights are those that transformers reads. Behind them, as the layer of the number
`num_hidden_layers`, come the MTP module's own; its embedding and head are the main model's and not stored again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from examples.tiny_moe.network import EPS, Shape, TinyMoe
from examples.tiny_moe.tokens import END

BIAS = "e_score_correction_bias"
WEIGHTS = "model.safetensors"


def hf_config(shape: Shape) -> dict[str, object]:
    """What config.json says of `shape`."""
    sizes = asdict(shape)
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        **sizes,
        "num_key_value_heads": shape.num_attention_heads,
        "num_nextn_predict_layers": 1,
        "head_dim": shape.qk_rope_head_dim,
        "rms_norm_eps": EPS,
        "hidden_act": "silu",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "rope_interleave": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "bos_token_id": END,
        "eos_token_id": END,
    }


def named_tensors(model: TinyMoe) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight under its name in the checkpoint: experts one by one, routers' biases float32, the rest bfloat16."""
    for name, tensor in model.state_dict().items():
        if name.endswith(BIAS):
            yield f"model.{name}", tensor.float()
        elif ".experts." in name:
            stem, kind = name.rsplit(".", 1)
            for expert, weight in enumerate(tensor.bfloat16()):
                yield f"model.{stem}.{expert}.{kind}.weight", weight
        else:
            yield f"model.{name}", tensor.bfloat16()


def save(model: TinyMoe, folder: Path) -> None:
    """Write config.json, generation_config.json and the weights into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(model.shape), indent=2) + "\n")
    generation = {"bos_token_id": END, "eos_token_id": END, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tensors = {name: tensor.contiguous().cpu() for name, tensor in named_tensors(model)}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def load(folder: Path) -> TinyMoe:
    """The saved model in float32. Raises KeyError naming a tensor that is missing."""
    config = json.loads((folder / "config.json").read_text())
    model = TinyMoe(Shape(**{name: config[name] for name in asdict(Shape())}))
    saved = load_file(folder / WEIGHTS)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".experts." in name:
                stem, kind = name.rsplit(".", 1)
                for expert, weight in enumerate(tensor):
                    weight.copy_(saved[f"model.{stem}.{expert}.{kind}.weight"])
            else:
                tensor.copy_(saved[f"model.{name}"])
    return model
