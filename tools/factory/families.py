"""The model families the factory can make: for each the config of a small member and how its originals name experts.

Parameter names and shapes are *not* here: they are read off the mlx-lm model class (see ``layout``), so a family is its
config and the little that mlx-lm's ``sanitize`` knows about original checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

__all__ = ["FAMILIES", "Family", "Sizes", "resolve_sizes"]

Config = dict[str, Any]

GLU_NAMES = {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"}
SMALLEST_VOCAB = 320
LARGEST_VOCAB = 500_000


@dataclass(frozen=True)
class Sizes:
    """The sizes of a checkpoint. 0 stands for "derived": heads from hidden, kv_heads from heads, dense_width from
    hidden.

    ``layers`` counts all layers (for nemotron_h, blocks of the pattern), MoE or not; ``expert_width`` is the inner
    width of one expert, ``dense_width`` that of dense and shared MLPs.
    """

    hidden: int = 64
    layers: int = 3
    n_experts: int = 16
    top_k: int = 4
    expert_width: int = 64
    vocab: int = 512
    heads: int = 0
    kv_heads: int = 0
    dense_width: int = 0

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads


@dataclass(frozen=True)
class Family:
    """What the factory has to be told about one model family.

    ``per_expert`` maps mlx-lm's projection names to those in original files with one tensor per expert, or is empty
    where ``sanitize`` stacks nothing; ``stacks_quantized`` says whether it stacks scales and biases as well;
    ``fused_from`` lists the expert encodings of the original *fused* form, which ``sanitize`` splits.
    ``offset_norms`` and ``splits_kv_b`` mark what else it derives when given original names.
    """

    name: str
    config: Callable[[Sizes], Config]
    sizes: Sizes = field(default_factory=Sizes)
    per_expert: dict[str, str] = field(default_factory=dict)
    stacks_quantized: bool = False
    fused_from: tuple[str, ...] = ()
    least_layers: int = 1
    only_top_k: int = 0
    offset_norms: tuple[str, ...] = ()
    splits_kv_b: bool = False


def resolve_sizes(family: Family, changes: dict[str, int]) -> Sizes:
    """The family's defaults with ``changes`` applied and zeros filled in; ValueError names what is wrong."""
    known = [f.name for f in fields(Sizes)]
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{name}: not a size; the sizes are {', '.join(known)}.")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r}: has to be a whole number of at least 1.")
    sizes = replace(family.sizes, **changes)
    # Heads of 64 like most published models, but at least four, so that small ones have several too.
    sizes = replace(sizes, heads=sizes.heads or max(4, sizes.hidden // 64))
    sizes = replace(
        sizes,
        kv_heads=sizes.kv_heads or (sizes.heads // 2 if sizes.heads % 2 == 0 else sizes.heads),
        dense_width=sizes.dense_width or 2 * sizes.hidden,
    )
    _check(family, sizes)
    return sizes


def _check(family: Family, sizes: Sizes) -> None:
    if sizes.hidden % sizes.heads or sizes.head_dim % 8:
        raise ValueError(f"hidden={sizes.hidden}: has to be a multiple of 8 times heads, which is {sizes.heads}.")
    if sizes.heads % sizes.kv_heads:
        raise ValueError(f"kv_heads={sizes.kv_heads}: has to divide heads, which is {sizes.heads}.")
    if sizes.layers < family.least_layers:
        raise ValueError(f"layers={sizes.layers}: {family.name} needs at least {family.least_layers}.")
    if sizes.top_k > sizes.n_experts:
        raise ValueError(f"top_k={sizes.top_k}: at most n_experts, which is {sizes.n_experts}.")
    if family.only_top_k and sizes.top_k != family.only_top_k:
        raise ValueError(f"top_k={sizes.top_k}: {family.name} routes each token to {family.only_top_k} expert(s) only.")
    if not SMALLEST_VOCAB <= sizes.vocab <= LARGEST_VOCAB:
        raise ValueError(f"vocab={sizes.vocab}: has to be from {SMALLEST_VOCAB} to {LARGEST_VOCAB}.")


def _common(s: Sizes) -> Config:
    """The keys that all families but llama4's outer config share."""
    return {
        "hidden_size": s.hidden,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "num_experts_per_tok": s.top_k,
        "vocab_size": s.vocab,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 32768,
        # A tied head finds the current token's own embedding again and repeats it for ever.
        "tie_word_embeddings": False,
    }


def _qwen3_moe(s: Sizes) -> Config:
    return _common(s) | {
        "head_dim": s.head_dim,
        "intermediate_size": s.dense_width,
        "moe_intermediate_size": s.expert_width,
        "num_experts": s.n_experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }


def _mixtral(s: Sizes) -> Config:
    return _common(s) | {"intermediate_size": s.expert_width, "num_local_experts": s.n_experts}


def _gpt_oss(s: Sizes) -> Config:
    kinds = ("sliding_attention", "full_attention")
    return _common(s) | {
        "head_dim": s.head_dim,
        "intermediate_size": s.expert_width,
        "num_local_experts": s.n_experts,
        # The released model's; transformers warns of any other when it looks at the config for the tokenizer.
        "max_position_embeddings": 131072,
        # Short, so that a test's text runs past the window and the rotating cache wraps.
        "sliding_window": 32,
        "layer_types": [kinds[i % 2] for i in range(s.layers)],
    }


def _deepseek_v3(s: Sizes) -> Config:
    return _common(s) | {
        "num_key_value_heads": s.heads,
        "intermediate_size": s.dense_width,
        "moe_intermediate_size": s.expert_width,
        "n_routed_experts": s.n_experts,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "q_lora_rank": s.hidden // 2,
        "kv_lora_rank": s.hidden // 2,
        "qk_nope_head_dim": s.head_dim,
        "qk_rope_head_dim": s.head_dim // 2,
        "v_head_dim": s.head_dim,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "rope_scaling": None,
    }


def _olmoe(s: Sizes) -> Config:
    return _common(s) | {"intermediate_size": s.expert_width, "num_experts": s.n_experts, "norm_topk_prob": False}


def _qwen3_next(s: Sizes) -> Config:
    return _qwen3_moe(s) | {
        "shared_expert_intermediate_size": s.expert_width,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": min(4, s.layers),
        # Metal's kernel for gated delta nets wants head sizes that are multiples of 32.
        "linear_num_key_heads": max(1, s.hidden // 64),
        "linear_num_value_heads": 2 * max(1, s.hidden // 64),
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
    }


def _llama4(s: Sizes) -> Config:
    text = _common(s) | {
        "model_type": "llama4_text",
        "head_dim": s.head_dim,
        "attention_bias": False,
        "attention_chunk_size": 128,
        "interleave_moe_layer_step": 2,
        "intermediate_size": s.expert_width,
        "intermediate_size_mlp": s.dense_width,
        "num_local_experts": s.n_experts,
        "rope_scaling": None,
        "use_qk_norm": True,
    }
    return {"text_config": text, "tie_word_embeddings": False}


def _nemotron_h(s: Sizes) -> Config:
    return _common(s) | {
        "hybrid_override_pattern": list(("ME*E" * s.layers)[: s.layers]),
        "head_dim": s.head_dim,
        "attention_bias": False,
        "intermediate_size": s.dense_width,
        "moe_intermediate_size": s.expert_width,
        "moe_shared_expert_intermediate_size": s.expert_width,
        "n_routed_experts": s.n_experts,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "mlp_bias": False,
        "use_bias": False,
        "layer_norm_epsilon": 1e-6,
        "mamba_num_heads": s.heads,
        "mamba_head_dim": s.head_dim,
        "mamba_proj_bias": False,
        "ssm_state_size": 32,  # Metal's state-space kernel works in steps of 32
        "conv_kernel": 4,
        "use_conv_bias": True,
        "n_groups": 1,
    }


# The norms that mlx-lm shifts by one when it sees qwen3_next's original names.
QWEN3_NEXT_NORMS = (
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    "model.norm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
)

_ALL = (
    Family("qwen3_moe", _qwen3_moe, per_expert=GLU_NAMES),
    Family(
        "mixtral",
        _mixtral,
        Sizes(n_experts=8, top_k=2),
        per_expert={"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
        stacks_quantized=True,
    ),
    Family("gpt_oss", _gpt_oss, Sizes(layers=4), fused_from=("mxfp4",), least_layers=2),
    Family("deepseek_v3", _deepseek_v3, per_expert=GLU_NAMES, stacks_quantized=True, least_layers=2, splits_kv_b=True),
    Family("olmoe", _olmoe, per_expert=GLU_NAMES, stacks_quantized=True),
    Family(
        "qwen3_next",
        _qwen3_next,
        Sizes(layers=4),
        per_expert=GLU_NAMES,
        least_layers=2,
        offset_norms=QWEN3_NEXT_NORMS,
    ),
    Family(
        "llama4",
        _llama4,
        Sizes(layers=4, n_experts=8, top_k=1),
        fused_from=("float32", "bfloat16"),
        least_layers=4,  # mlx-lm's forward asks for the cache of layer 3
        only_top_k=1,
    ),
    Family(
        "nemotron_h", _nemotron_h, Sizes(layers=6), per_expert={"fc1": "up_proj", "fc2": "down_proj"}, least_layers=3
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
