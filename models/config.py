"""What a Hugging Face config.json says about a model, checked and frozen. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from splitserve.cluster.layout import KvLayout
from splitserve.models.config_keys import Keys

DENSE_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
MLA_ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class LinearRope:
    """Positions divided by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1: long wavelengths divided by `factor`, short ones kept, a smooth ramp between."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True)
class YarnRope:
    """YaRN (arXiv 2309.00071). `mscale` and `mscale_all_dim` are DeepSeek's; None where the config has none."""

    factor: float
    original_max_position: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None
    attention_factor: float | None


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base `theta` and how it is stretched, None for not at all."""

    theta: float = 10000.0
    scaling: LinearRope | Llama3Rope | YarnRope | None = None


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention. `q_lora_rank` is None where queries are projected directly."""

    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    @property
    def latent_dim(self) -> int:
        """Width of what the cache keeps of a token: the compressed KV and the shared rotary key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in every layer from `first_k_dense` on; each expert is `intermediate_size` wide.

    `scoring` to `routed_scaling_factor` are the fields of `kernels.moe_routing.Routing`.
    """

    num_experts: int
    num_shared_experts: int
    top_k: int
    intermediate_size: int
    first_k_dense: int
    router_bias: bool
    scoring: Literal["softmax", "sigmoid"]
    num_groups: int
    top_groups: int
    normalise: bool
    routed_scaling_factor: float


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and constants of one decoder-only model.

    `head_dim` is the width of a query and key head; with MLA that is its rotary and its other part together.
    `dtype` is the checkpoint's. `fp8_block` is (rows, columns) of the blocks that share a scale, None for weights
    that are not quantised.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    dtype: Dtype = "float32"
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None
    fp8_block: tuple[int, int] | None = None

    @property
    def rotary_dim(self) -> int:
        """Width of what the rotary embedding turns."""
        return self.mla.qk_rope_head_dim if self.mla else self.head_dim

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
        """Read the mapping of a config.json; `source` names the file in errors.

        Raises ModelLoadError, naming the key, for one that is missing, of the wrong type or asks for what is not
        supported.
        """
        keys = Keys(raw, source)
        architecture = _architecture(keys)
        _refuse_unsupported(keys, architecture)
        mla = _mla(keys) if architecture in MLA_ARCHITECTURES else None
        hidden_size, num_heads = keys.integer("hidden_size"), keys.integer("num_attention_heads")
        attention_bias = keys.boolean("attention_bias", False)
        max_position = keys.integer("max_position_embeddings")
        config = cls(
            architecture=architecture,
            vocab_size=keys.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=keys.integer("intermediate_size"),
            num_layers=keys.integer("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=keys.integer("num_key_value_heads", num_heads),
            head_dim=mla.qk_nope_head_dim + mla.qk_rope_head_dim if mla else _head_dim(keys, hidden_size, num_heads),
            rms_norm_eps=keys.number("rms_norm_eps"),
            rope=_rope(keys, max_position),
            max_position_embeddings=max_position,
            tie_word_embeddings=keys.boolean("tie_word_embeddings", False),
            qkv_bias=attention_bias or architecture == "Qwen2ForCausalLM",
            output_bias=attention_bias and architecture != "Qwen2ForCausalLM",
            mlp_bias=keys.boolean("mlp_bias", False) and architecture == "LlamaForCausalLM",
            qk_norm=architecture == "Qwen3ForCausalLM",
            eos_token_ids=keys.token_ids("eos_token_id"),
            bos_token_id=keys.integer("bos_token_id", minimum=0) if keys.has("bos_token_id") else None,
            dtype=_dtype(keys),
            mla=mla,
            moe=_moe(keys, architecture) if mla else None,
            fp8_block=_fp8_block(keys) if mla else None,
        )
        if config.num_heads % config.num_kv_heads:
            raise keys.error("num_key_value_heads", f"expected a divisor of the {num_heads} attention heads")
        return config

    def kv_layout(self, tp: int, page_size: int, dtype: Dtype) -> KvLayout:
        """KV cache of an engine of `tp` ranks. Raises ValueError where the KV heads do not divide over them."""
        if self.mla:
            return KvLayout(tp, self.num_layers, 1, 1, self.mla.latent_dim, page_size, dtype)
        return KvLayout(tp, self.num_layers, 2, self.num_kv_heads, self.head_dim, page_size, dtype)

    def kv_bytes_per_token(self, dtype: Dtype) -> int:
        """Bytes of one token's KV over all layers, one copy."""
        return self.kv_layout(1, 1, dtype).bytes_per_token


def _architecture(keys: Keys) -> str:
    supported = DENSE_ARCHITECTURES + MLA_ARCHITECTURES
    match keys.raw.get("architectures"):
        case [str(name)] if name in supported:
            return name
    raise keys.error("architectures", f"expected a list of one of {', '.join(supported)}")


def _refuse_unsupported(keys: Keys, architecture: str) -> None:
    """Refuse what would silently change the model's answers."""
    latent = architecture in MLA_ARCHITECTURES
    required: dict[str, tuple[object, ...]] = {
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "rope_interleaved": (False,),
        "partial_rotary_factor": (1, 1.0),
    }
    if latent:
        required |= {"attention_bias": (False,), "moe_layer_freq": (1,)}
    for key, allowed in required.items():
        if keys.has(key) and keys.raw[key] not in allowed:
            raise keys.error(key, f"only {allowed[0]!r} is supported")
    if not latent and keys.has("quantization_config"):
        raise keys.error("quantization_config", "quantised weights are not supported; use the unquantised model")
    if architecture == "LlamaForCausalLM" and keys.has("sliding_window"):
        raise keys.error("sliding_window", "sliding-window attention is not supported")
    layer_types = keys.raw.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise keys.error("layer_types", "only layers of full_attention are supported")


def _head_dim(keys: Keys, hidden_size: int, num_heads: int) -> int:
    # Qwen3 heads are wider than hidden_size / heads, so there is nothing to derive them from.
    derived = None if _architecture(keys) == "Qwen3ForCausalLM" or hidden_size % num_heads else hidden_size // num_heads
    head_dim = keys.integer("head_dim", derived)
    if head_dim % 2:
        raise keys.error("head_dim", f"rotary embedding needs an even head width, not {head_dim}")
    return head_dim


def _dtype(keys: Keys) -> Dtype:
    key = "dtype" if keys.has("dtype") else "torch_dtype"
    dtype = keys.raw[key] if keys.has(key) else "float32"
    if dtype not in get_args(Dtype):
        raise keys.error(key, f"expected one of {', '.join(get_args(Dtype))}")
    return cast(Dtype, dtype)


def _rope(keys: Keys, max_position: int) -> RopeConfig:
    """Both spellings: rope_theta beside rope_scaling, and the rope_parameters of transformers 5."""
    rope = keys.section("rope_parameters" if keys.has("rope_parameters") else "rope_scaling")
    theta = (rope if rope.has("rope_theta") else keys).number("rope_theta", 10000.0)
    kind_key = "rope_type" if rope.has("rope_type") else "type"
    scaling: LinearRope | Llama3Rope | YarnRope | None = None
    used: set[str] = set()
    match rope.raw.get(kind_key, "default"):
        case "default" | None:
            pass
        case "linear":
            scaling, used = LinearRope(rope.number("factor")), {"factor"}
        case "llama3":
            scaling, used = _llama3(rope), {"factor", "low_freq_factor", "high_freq_factor"}
        case "yarn":
            scaling = _yarn(rope, max_position)
            used = {"factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor"}
        case _:
            raise rope.error(kind_key, "expected default, linear, llama3 or yarn")
    known = used | {"rope_type", "type", "rope_theta", "original_max_position_embeddings", "partial_rotary_factor"}
    for key in rope.raw:
        if key not in known:
            raise rope.error(key, "this part of rotary scaling is not supported")
    if rope.raw.get("partial_rotary_factor", 1) != 1:
        raise rope.error("partial_rotary_factor", "only 1 is supported")
    return RopeConfig(theta, scaling)


def _llama3(rope: Keys) -> Llama3Rope:
    return Llama3Rope(
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_position=rope.integer("original_max_position_embeddings"),
    )


def _yarn(rope: Keys, max_position: int) -> YarnRope:
    return YarnRope(
        factor=rope.number("factor"),
        original_max_position=rope.integer("original_max_position_embeddings", max_position),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        attention_factor=rope.optional_number("attention_factor"),
    )


def _mla(keys: Keys) -> MlaConfig:
    return MlaConfig(
        q_lora_rank=keys.integer("q_lora_rank") if keys.has("q_lora_rank") else None,
        kv_lora_rank=keys.integer("kv_lora_rank"),
        qk_nope_head_dim=keys.integer("qk_nope_head_dim"),
        qk_rope_head_dim=keys.integer("qk_rope_head_dim"),
        v_head_dim=keys.integer("v_head_dim"),
    )


def _moe(keys: Keys, architecture: str) -> MoeConfig:
    is_v3 = architecture == "DeepseekV3ForCausalLM"
    methods = ("noaux_tc",) if is_v3 else ("greedy", "group_limited_greedy")
    method = keys.raw.get("topk_method") or methods[0]
    if method not in methods:
        raise keys.error("topk_method", f"expected {' or '.join(methods)}")
    grouped = method != "greedy"
    moe = MoeConfig(
        num_experts=keys.integer("n_routed_experts"),
        num_shared_experts=keys.integer("n_shared_experts", 0, minimum=0),
        top_k=keys.integer("num_experts_per_tok"),
        intermediate_size=keys.integer("moe_intermediate_size"),
        first_k_dense=keys.integer("first_k_dense_replace", 0, minimum=0),
        router_bias=is_v3,
        scoring="sigmoid" if is_v3 else "softmax",
        num_groups=keys.integer("n_group") if grouped else 1,
        top_groups=keys.integer("topk_group") if grouped else 1,
        normalise=keys.boolean("norm_topk_prob", is_v3),
        routed_scaling_factor=keys.number("routed_scaling_factor", 1.0),
    )
    _check_routing(keys, moe)
    return moe


def _check_routing(keys: Keys, moe: MoeConfig) -> None:
    if keys.has("scoring_func") and keys.raw["scoring_func"] != moe.scoring:
        raise keys.error("scoring_func", f"only {moe.scoring!r} is supported with this architecture")
    if moe.normalise and moe.scoring == "softmax":
        raise keys.error("norm_topk_prob", "only false is supported with this architecture")
    if moe.num_experts % moe.num_groups:
        raise keys.error("n_group", f"expected a divisor of the {moe.num_experts} routed experts")
    if moe.top_groups > moe.num_groups:
        raise keys.error("topk_group", f"expected at most the {moe.num_groups} groups")
    if moe.top_k > moe.num_experts // moe.num_groups * moe.top_groups:
        raise keys.error(
            "num_experts_per_tok", f"expected at most the {moe.num_experts} routed experts that can be chosen"
        )


def _fp8_block(keys: Keys) -> tuple[int, int] | None:
    if not keys.has("quantization_config"):
        return None
    quantization = keys.section("quantization_config")
    if quantization.raw.get("quant_method") != "fp8":
        raise quantization.error("quant_method", "only fp8 is supported")
    match quantization.raw.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
    raise quantization.error("weight_block_size", "expected two sizes, such as [128, 128]")
