"""How the weights of each decoder family differ from Llama's.

Source: transformers 5, models/*/modeling_*.py; tests/test_plan.py compares counts with its models.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Switch = bool | tuple[str, bool]  # always on or off, or a config key and its class default


@dataclass(frozen=True, kw_only=True)
class Family:
    """The traits of a family. The defaults are Llama's."""

    gated: bool = True
    qkv_bias: Switch = False
    out_bias: Switch = False
    mlp_bias: Switch = False
    head_bias: Switch = False
    fused_qkv: bool = False
    fused_gate: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"  # one weight for all heads, or one per head
    qk_norm_if: str | None = None  # the config key that enables it
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
    "olmo2": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="full"),
    "olmo3": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="full"),
    "olmoe": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="full", experts=True),
    "flex_olmo": Family(qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="full", experts=True),
    "cohere": Family(
        qkv_bias=_BIASED, out_bias=_BIASED, norms=1, qk_norm="full", qk_norm_if="use_qk_norm"
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
    "minimax_m2": Family(qk_norm="full", experts=True),
    "gpt_oss": Family(
        qkv_bias=("attention_bias", True), out_bias=("attention_bias", True), extra="sinks",
        experts=True, expert_bias=True,
    ),
    "apertus": Family(
        gated=False, qkv_bias=_BIASED, out_bias=_BIASED, qk_norm="head", extra="apertus"
    ),
}  # fmt: skip
