"""What sets each family of decoders apart from Llama, as far as its weights go.

Source: transformers 5, models/*/modeling_*.py; tests/test_plan.py compares counts with its models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Said = bool | tuple[str, bool]  # always so, or as a config key says, with the class's default


@dataclass(frozen=True, kw_only=True)
class Family:
    """What sets a family apart from Llama."""

    gated: bool = True
    qkv_bias: Said = False
    out_bias: Said = False
    mlp_bias: Said = False
    head_bias: Said = False
    fused_qkv: bool = False
    fused_gate: bool = False
    qk_norm: Literal["none", "head", "whole"] = "none"  # a weight a head's dimension, or each head
    qk_norm_if: str | None = None  # config key that switches it on
    norms: int = 2
    norm_weight: bool = True
    norm_bias: bool = False
    extra: Literal["none", "bitnet", "diffllama", "sinks", "apertus"] = "none"
    experts: bool = False
    expert_bias: bool = False


_BIASED = ("attention_bias", False)
FAMILIES: dict[str, Family] = {
    "llama": Family(qkv_bias=_BIASED, out_bias=_BIASED, mlp_bias=("mlp_bias", False)),
    "mistral": Family(),
    "ministral": Family(),
    "mixtral": Family(experts=True),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=("qkv_bias", True), experts=True),
    "qwen3": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="head"),
    "qwen3_moe": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="head", experts=True),
    "gemma": Family(qkv_bias=_BIASED, out_bias=_BIASED),
    "gemma2": Family(qkv_bias=_BIASED, out_bias=_BIASED, norms=4),
    "gemma3_text": Family(qkv_bias=_BIASED, out_bias=_BIASED, norms=4, qk_norm="head"),
    "vaultgemma": Family(qkv_bias=_BIASED, out_bias=_BIASED),
    "phi": Family(
        gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True, norms=1,
        norm_bias=True, qk_norm="head", qk_norm_if="qk_layernorm",
    ),
    "phi3": Family(fused_qkv=True, fused_gate=True),
    "phimoe": Family(
        qkv_bias=_BIASED, out_bias=_BIASED, head_bias=("lm_head_bias", False), norm_bias=True,
        experts=True,
    ),
    "gpt_neox": Family(
        gated=False, qkv_bias=("attention_bias", True), out_bias=("attention_bias", True),
        mlp_bias=True, fused_qkv=True, norm_bias=True,
    ),
    "persimmon": Family(
        gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, fused_qkv=True, norm_bias=True,
        qk_norm="head", qk_norm_if="qk_layernorm",
    ),
    "falcon": Family(
        gated=False, qkv_bias=("bias", False), out_bias=("bias", False), mlp_bias=("bias", False),
        fused_qkv=True, norm_bias=True,
    ),
    "nemotron": Family(
        gated=False, qkv_bias=_BIASED, out_bias=_BIASED, mlp_bias=("mlp_bias", False),
        norm_bias=True,
    ),
    "olmo": Family(qkv_bias=_BIASED, out_bias=_BIASED, norm_weight=False),
    "olmo2": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="whole"),
    "olmo3": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="whole"),
    "olmoe": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="whole", experts=True),
    "flex_olmo": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="whole", experts=True),
    "cohere": Family(
        qkv_bias=_BIASED, out_bias=_BIASED, norms=1, qk_norm="whole", qk_norm_if="use_qk_norm"
    ),
    "stablelm": Family(qkv_bias=("use_qkv_bias", False), norm_bias=True),
    "glm": Family(qkv_bias=("attention_bias", False), fused_gate=True),
    "glm4": Family(qkv_bias=("attention_bias", False), fused_gate=True, norms=4),
    "glm4_moe": Family(
        qkv_bias=_BIASED, qk_norm="head", qk_norm_if="use_qk_norm", experts=True
    ),
    "smollm3": Family(qkv_bias=_BIASED, out_bias=_BIASED, mlp_bias=("mlp_bias", False)),
    "starcoder2": Family(
        gated=False, qkv_bias=("use_bias", True), out_bias=("use_bias", True),
        mlp_bias=("use_bias", True), norm_bias=True,
    ),
    "granite": Family(qkv_bias=_BIASED, out_bias=_BIASED, mlp_bias=("mlp_bias", False)),
    "granitemoe": Family(qkv_bias=_BIASED, out_bias=_BIASED, experts=True),
    "granitemoeshared": Family(qkv_bias=_BIASED, out_bias=_BIASED, experts=True),
    "deepseek_v2": Family(experts=True),
    "deepseek_v3": Family(experts=True),
    "minicpm3": Family(),
    "arcee": Family(
        gated=False, qkv_bias=_BIASED, out_bias=_BIASED, mlp_bias=("mlp_bias", False)
    ),
    "helium": Family(qkv_bias=_BIASED),
    "hunyuan_v1_dense": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="head"),
    "hunyuan_v1_moe": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="head", experts=True),
    "ernie4_5": Family(
        qkv_bias=("use_bias", False), out_bias=("use_bias", False), mlp_bias=("use_bias", False)
    ),
    "ernie4_5_moe": Family(
        qkv_bias=("use_bias", False), out_bias=("use_bias", False), mlp_bias=("use_bias", False),
        experts=True,
    ),
    "dots1": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="head", experts=True),
    "seed_oss": Family(
        qkv_bias=("attention_bias", True), out_bias=("attention_out_bias", False),
        mlp_bias=("mlp_bias", False),
    ),
    "bitnet": Family(qkv_bias=_BIASED, out_bias=_BIASED, extra="bitnet"),
    "diffllama": Family(qkv_bias=_BIASED, out_bias=_BIASED, extra="diffllama"),
    "nanochat": Family(gated=False, qkv_bias=_BIASED, out_bias=_BIASED, norm_weight=False),
    "jais2": Family(
        gated=False, qkv_bias=("attention_bias", True), out_bias=("attention_bias", True),
        mlp_bias=("mlp_bias", True), norm_bias=True,
    ),
    "minimax_m2": Family(qk_norm="whole", experts=True),
    "gpt_oss": Family(
        qkv_bias=("attention_bias", True), out_bias=("attention_bias", True), extra="sinks",
        experts=True, expert_bias=True,
    ),
    "apertus": Family(
        gated=False, qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="head", extra="apertus"
    ),
}  # fmt: skip
