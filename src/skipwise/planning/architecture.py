"""Count a model's parameters from its config alone.

A decoder layer is a list of matrices (attention, MLP, experts) and some vectors (norms, sinks).
families.py lists the traits of each family; any other decoder is counted like a Llama and reported
as an estimate. Tests compare the counts with transformers' own models.

Letters:  d = hidden_size, H / K = attention / key-value heads, h = head_dim,
          F = intermediate_size, V = vocab_size, E / k = experts / experts per token
Source:   transformers 5, models/*/modeling_*.py
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.planning.families import FAMILIES, Family, Switch


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A weight (rows_out, rows_in), with one copy per expert."""

    name: str
    rows_in: int
    rows_out: int
    bias: bool = False
    copies: int = 1
    active: int = 1  # copies that each token uses
    linear: bool = True  # a torch.nn.Linear, which LoRA and nf4 apply to; experts are not

    @property
    def size(self) -> int:
        return self.copies * self.weight + self.copies * self.rows_out * self.bias

    @property
    def weight(self) -> int:
        """Numbers in one copy, without its bias."""
        return self.rows_in * self.rows_out


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A type of decoder layer, and the number of layers of this type."""

    count: int
    matrices: tuple[Matrix, ...]
    vectors: int  # numbers in norms, sinks and other vectors
    norms: int  # norms over hidden_size
    mlp_width: int  # numbers per token between the MLP's matrices: F, or k experts' F

    @property
    def size(self) -> int:
        return sum(m.size for m in self.matrices) + self.vectors

    @property
    def active(self) -> int:
        """Weights that multiply each token."""
        return sum(m.weight * m.active for m in self.matrices)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Counts and widths of a causal language model."""

    family: str
    exact: bool  # counted by the family's own traits, not like a Llama
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int  # of queries and keys
    value_dim: int  # of values
    kv_width: int  # numbers per token in a layer's KV cache
    vocab_size: int
    intermediate_size: int
    gated: bool
    num_experts: int
    experts_per_token: int
    tied: bool
    embedding: int
    head: int  # 0 if tied
    final: int  # norm before the head
    layers: tuple[Layer, ...]
    sliding_layers: int  # of num_layers, if some layers are full
    sliding_window: int | None
    fused_qkv: bool
    fused_gate: bool
    rms_norm: bool
    composed_gelu: bool  # an activation of several operations, which all save tensors
    softcap: bool  # of the logits, as in Gemma 2
    qk_norm: bool
    stored_bytes: int  # per number in the checkpoint

    @property
    def num_parameters(self) -> int:
        return self.embedding + self.layer_parameters + self.final + self.head

    @property
    def layer_parameters(self) -> int:
        return sum(layer.count * layer.size for layer in self.layers)

    @property
    def active_parameters(self) -> int:
        """Weights that multiply each token: with the head, without the embedding lookup."""
        inside = sum(layer.count * layer.active for layer in self.layers)
        return inside + self.vocab_size * self.hidden_size

    @property
    def vectors(self) -> int:
        """Numbers in norms, biases and other vectors."""
        matrices = sum(count * m.copies * m.weight for count, m in self.matrices())
        return self.layer_parameters + self.final - matrices

    def matrices(self) -> Iterator[tuple[int, Matrix]]:
        """(number of layers, matrix) for each matrix but the head."""
        for layer in self.layers:
            for matrix in layer.matrices:
                yield layer.count, matrix


_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_TOP = ("num_experts_per_tok", "moe_topk", "moe_k")
_EXPERTS_OF_FULL_WIDTH = {  # experts have intermediate_size, whatever else the config says
    "hunyuan_v1_moe", "mixtral", "phimoe", "granitemoe", "granitemoeshared", "olmoe", "flex_olmo",
    "minimax_m2", "gpt_oss",
}  # fmt: skip
_DENSE_FIRST = ("first_k_dense_replace", "moe_layer_start_index")


def read_architecture(config: Mapping[str, Any]) -> Architecture:
    """Count a config: the result of `hf_config.complete`, or transformers' `to_dict()`.

    Raises:
        SkipwiseError: the config lacks a size.
    """
    family = str(config.get("model_type", "unknown"))
    traits = FAMILIES.get(family, Family(experts=_first_present(config, _EXPERTS, 0) > 1))
    d = _required(config, "hidden_size", "d_model", "n_embd")
    count = _required(config, "num_hidden_layers", "n_layer", "num_layers")
    H = _required(config, "num_attention_heads", "n_head", "n_heads")
    K, h = _kv_heads(config, family, H), config.get("head_dim") or d // H
    V = _required(config, "vocab_size")
    F = _first_present(config, ("ffn_hidden_size", "intermediate_size", "n_inner"), 0) or 4 * d
    latent = bool(config.get("kv_lora_rank"))
    if latent:
        h = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    value_dim = config.get("v_head_dim", h) if latent else h
    experts = _first_present(config, _EXPERTS, 0) if traits.experts else 0
    dense = min(count, _first_present(config, _DENSE_FIRST, 0)) if experts else count
    attention = _latent(config, d, H) if latent else _attention(config, traits, d, H, K, h)
    layers = []
    for number, sparse in ((dense, False), (count - dense, True)):
        if not number:
            continue
        norms = _num_norms(config, traits, family)
        vectors = _vectors(config, traits, d, H, K, h, F, norms)
        mlp, width = _mlp(config, traits, d, F)
        if sparse:
            mlp, width = _experts(config, traits, family, d, F)
            vectors += experts if family == "ernie4_5_moe" else 0  # the router's offsets
        counts = {"count": number, "vectors": vectors, "norms": norms, "mlp_width": width}
        layers.append(Layer(matrices=(*attention, *mlp), **counts))
    tied = bool(config.get("tie_word_embeddings", False))
    norm = traits.norm_weight * (1 + traits.norm_bias) * d
    kinds = list(config.get("layer_types") or [])
    window = config.get("sliding_window")
    sliding = kinds.count("sliding_attention") if window and "full_attention" in kinds else 0
    if sliding and len(kinds) != count:  # config.json does not list the layers
        sliding = _sliding_layers(config, count)
    return Architecture(
        family=family,
        exact=family in FAMILIES
        and not config.get("mlp_only_layers")
        and config.get("decoder_sparse_step") in (None, 1),
        hidden_size=d,
        num_layers=count,
        num_heads=H,
        num_kv_heads=K,
        head_dim=h,
        value_dim=value_dim,
        kv_width=H * (h + value_dim) if latent else 2 * K * h,
        vocab_size=V,
        intermediate_size=F,
        gated=traits.gated,
        num_experts=experts,
        experts_per_token=_first_present(config, _TOP, 2) if experts else 0,
        tied=tied,
        embedding=V * d,
        head=(0 if tied else V * d) + V * _is_on(config, traits.head_bias),
        final=norm,
        layers=tuple(layers),
        sliding_layers=sliding,
        sliding_window=window,
        fused_qkv=traits.fused_qkv,
        fused_gate=traits.fused_gate,
        rms_norm=not traits.norm_bias,
        composed_gelu=str(config.get("hidden_act")) in ("gelu_new", "gelu_fast"),
        softcap=bool(config.get("final_logit_softcapping")),
        qk_norm=traits.qk_norm != "none" and bool(config.get(traits.qk_norm_if or "", True)),
        stored_bytes=4 if "32" in str(config.get("dtype") or config.get("torch_dtype")) else 2,
    )


def _attention(
    config: Mapping[str, Any], traits: Family, d: int, H: int, K: int, h: int
) -> list[Matrix]:
    bias, out_bias = _is_on(config, traits.qkv_bias), _is_on(config, traits.out_bias)
    out = Matrix(name="o", rows_in=H * h, rows_out=d, bias=out_bias)
    if traits.fused_qkv:
        return [Matrix(name="qkv", rows_in=d, rows_out=(H + 2 * K) * h, bias=bias), out]
    sizes = (("q", H), ("k", K), ("v", K))
    qkv = [Matrix(name=name, rows_in=d, rows_out=heads * h, bias=bias) for name, heads in sizes]
    return [*qkv, out]


def _latent(config: Mapping[str, Any], d: int, H: int) -> list[Matrix]:
    """Multi-head latent attention: DeepSeek-V2, arXiv 2405.04434, section 2.1."""
    rank, q_rank = config["kv_lora_rank"], config.get("q_lora_rank")
    nope, rope, value = (config[k] for k in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
    queries = H * (nope + rope)
    found = [
        Matrix(name="kv_a", rows_in=d, rows_out=rank + rope),
        Matrix(name="kv_b", rows_in=rank, rows_out=H * (nope + value)),
        Matrix(name="o", rows_in=H * value, rows_out=d),
    ]
    if not q_rank:
        return [Matrix(name="q", rows_in=d, rows_out=queries), *found]
    down = Matrix(name="q_a", rows_in=d, rows_out=q_rank)
    return [down, Matrix(name="q_b", rows_in=q_rank, rows_out=queries), *found]


def _mlp(
    config: Mapping[str, Any], traits: Family, d: int, F: int, name: str = ""
) -> tuple[list[Matrix], int]:
    """(matrices of a plain or gated MLP, its width F)."""
    bias = _is_on(config, traits.mlp_bias)
    down = Matrix(name=f"{name}down", rows_in=F, rows_out=d, bias=bias)
    if not traits.gated:
        return [Matrix(name=f"{name}up", rows_in=d, rows_out=F, bias=bias), down], F
    if traits.fused_gate:
        return [Matrix(name=f"{name}gate_up", rows_in=d, rows_out=2 * F, bias=bias), down], F
    names = (f"{name}gate", f"{name}up")
    return [*(Matrix(name=n, rows_in=d, rows_out=F, bias=bias) for n in names), down], F


def _experts(
    config: Mapping[str, Any], traits: Family, family: str, d: int, F: int
) -> tuple[list[Matrix], int]:
    """(router, experts and shared experts; numbers per token between them)."""
    E, k = _first_present(config, _EXPERTS, 0), _first_present(config, _TOP, 2)
    width = config.get("moe_intermediate_size") or F
    if isinstance(width, list):  # Hunyuan has one per layer
        width = width[0]
    if family in _EXPERTS_OF_FULL_WIDTH:
        width = F
    inside = {"copies": E, "active": k, "linear": False, "bias": traits.expert_bias}
    found = [
        Matrix(name="router", rows_in=d, rows_out=E, bias=traits.expert_bias, linear=False),
        Matrix(name="experts_gate_up", rows_in=d, rows_out=2 * width, **inside),
        Matrix(name="experts_down", rows_in=width, rows_out=d, **inside),
    ]
    shared = _shared_width(config, family, width)
    if family == "qwen2_moe":
        found.append(Matrix(name="shared_gate", rows_in=d, rows_out=1))
    if shared:
        found += _mlp(config, traits, d, shared, "shared_")[0]
    return found, k * width + shared


def _shared_width(config: Mapping[str, Any], family: str, width: int) -> int:
    """F of the expert that every token uses, or 0 without one."""
    match family:
        case "qwen2_moe":
            return config.get("shared_expert_intermediate_size") or 0
        case "granitemoeshared":
            return config.get("shared_intermediate_size") or 0
        case "deepseek_v2" | "deepseek_v3" | "glm4_moe" | "dots1":
            return (config.get("n_shared_experts") or 0) * width
        case "ernie4_5_moe":
            return (config.get("moe_num_shared_experts") or 0) * width
        case "hunyuan_v1_moe":
            number = config.get("num_shared_expert") or 1
            return (number[0] if isinstance(number, list) else number) * width
    return 0


def _vectors(
    config: Mapping[str, Any], traits: Family, d: int, H: int, K: int, h: int, F: int, norms: int
) -> int:
    """Numbers of a layer that are in no matrix."""
    weights = 1 + traits.norm_bias
    found = norms * d * weights * traits.norm_weight
    by_default = config.get("model_type") == "persimmon"
    switched = traits.qk_norm_if is None or bool(config.get(traits.qk_norm_if, by_default))
    if traits.qk_norm == "head" and switched:
        found += 2 * h * weights
    if traits.qk_norm == "full" and switched:
        found += (H + K) * h
    if config.get("kv_lora_rank"):
        found += config["kv_lora_rank"] + (config.get("q_lora_rank") or 0)
    # bitnet: norms inside attention and MLP; apertus: in its activation
    extra = {"none": 0, "bitnet": d + F, "diffllama": 4 * h, "sinks": H, "apertus": 2}
    return found + extra[traits.extra]


def _num_norms(config: Mapping[str, Any], traits: Family, family: str) -> int:
    if family == "stablelm" and config.get("use_parallel_residual"):
        return 1
    if family == "falcon":
        if config.get("new_decoder_architecture"):
            return config.get("num_ln_in_parallel_attn") or 2
        return 1 if config.get("parallel_attn", True) else 2
    return traits.norms


def _kv_heads(config: Mapping[str, Any], family: str, H: int) -> int:
    if family == "falcon" and not config.get("new_decoder_architecture"):
        return 1 if config.get("multi_query", True) else H
    if family in ("gpt_neox", "persimmon"):
        return H
    return _first_present(config, ("num_key_value_heads", "num_kv_heads"), H)


def _sliding_layers(config: Mapping[str, Any], count: int) -> int:
    """The class's pattern of layers, with another period if config.json has a key for it."""
    pattern = config.get("layer_pattern") or ["sliding_attention", "full_attention"]
    keys = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")
    every = _first_present(config, keys, len(pattern))
    first = 0 if pattern[0] == "full_attention" else every - 1
    return sum(i % every != first for i in range(count))


def _is_on(config: Mapping[str, Any], switch: Switch) -> bool:
    return switch if isinstance(switch, bool) else bool(config.get(*switch))


def _first_present(config: Mapping[str, Any], keys: tuple[str, ...], default: Any) -> Any:
    return next((config[key] for key in keys if config.get(key) is not None), default)


def _required(config: Mapping[str, Any], *keys: str) -> int:
    value = _first_present(config, keys, None)
    if not isinstance(value, int) or value < 1:
        family = config.get("model_type", "unknown")
        raise SkipwiseError(f"the config of this {family} model is incomplete: it has no {keys[0]}")
    return value
