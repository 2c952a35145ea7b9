"""Importance weights without an (L, L) mask: flex_attention, on a GPU.

With an additive (B, 1, L, L) mask, sdpa cannot use its fast kernels, and a training step takes a
third longer (docs/method.md). Here two numbers per token replace the mask
(`masks.pack_key_weights`), and the kernel adds a key's weight if the query is in another chunk. Any
other mask (of ones, or for a sliding layer) goes to transformers' sdpa unchanged.

Importing this module registers the attention with transformers under the name `masks.FLEX`.

Shapes:  B = batch, L = tokens per example, H = heads (K key-value heads), D = head_dim
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from skipwise.errors import SkipwiseError
from skipwise.models.attention.masks import FLEX, is_packed, unpack_key_weights

_HEAD_DIMS = (16, 32, 64, 128, 256)  # some versions of torch pad others, some refuse them
_LAYERS = {"full_attention", "sliding_attention"}
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "head_mask")  # they also change the logits


def flex_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with the signature that transformers calls.

    Args:
        query, key, value: (B, H, L, D), (B, K, L, D), (B, K, L, D).
        attention_mask: packed key weights, or None or another mask for plain sdpa.

    Returns:
        (B, L, H, D), and None for the attention weights.

    Raises:
        SkipwiseError: dropout, soft-capped logits or sinks, which `unsupported_by_model` finds in
            the config.
    """
    found = [name for name in _UNSUPPORTED if kwargs.get(name) is not None]
    if found:  # sdpa would ignore some of them
        raise SkipwiseError(_no_flex(f"this model's attention has {found[0]}"))
    if not is_packed(attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout > 0:
        raise SkipwiseError(_no_flex(f"attention dropout is {dropout:g}"))
    chunk_ids, key_weights = unpack_key_weights(attention_mask)
    length = chunk_ids.shape[1]
    assert query.shape[2] == key.shape[2] == length, "packed key weights with a KV cache"
    query, key, value = _to_autocast_dtype(query, key, value)
    eager = not query.is_cuda or torch.compiler.is_compiling()
    call = _weighted if eager else _compiled()
    blocks = _causal_blocks(length, query.device)
    out = call(query, key, value, chunk_ids, key_weights, blocks, scaling)
    return out.transpose(1, 2).contiguous(), None


def unsupported_by_machine() -> str:
    """Why flex_attention cannot train on this machine; empty if it can."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "flex_attention trains only on NVIDIA GPUs"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is too old for flex_attention"
    if importlib.util.find_spec("triton") is None:
        return "flex_attention needs Triton, which is not installed"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        return f"flex_attention trains from torch 2.7 on, and this is {torch.__version__}"
    return ""


def unsupported_by_model(config: Any) -> str:
    """Why a model's config rules this attention out; empty if it does not."""
    family = config.model_type
    if getattr(config, "attn_logit_softcapping", None):
        return f"{family} caps its attention logits"
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None:
        return f"transformers has no implementation of {family}"
    for kernel, able in (
        ("sdpa", model._supports_sdpa),
        ("flex_attention", model._supports_flex_attn and model._supports_attention_backend),
    ):
        if not able:  # sinks, returned attention weights, custom attention
            return f"transformers does not run {family} on {kernel}"
    for name in _DROPOUTS:
        if getattr(config, name, None):
            return f"flex_attention has no dropout, and {name} is {getattr(config, name):g}"
    others = set(getattr(config, "layer_types", None) or []) - _LAYERS
    if others:
        return f"{family} has layers of type {sorted(others)[0]}"
    if getattr(config, "kv_lora_rank", None):
        return f"the keys and values of {family} differ in width"
    if config.to_dict().get("per_layer_config"):
        return f"heads of {family} differ in width between layers"
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if dim not in _HEAD_DIMS:
        return f"head_dim is {dim}, and flex_attention takes {', '.join(map(str, _HEAD_DIMS))}"
    return ""


def _weighted(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    chunk_ids: torch.Tensor,
    key_weights: torch.Tensor,
    blocks: BlockMask,
    scale: float | None,
) -> torch.Tensor:
    """(B, H, L, D): causal attention; a key's weight is added for queries in other chunks.

    The same as with the mask of `masks.with_chunk_weights`.
    """

    def add_key_weight(score: Any, row: Any, head: Any, i: Any, j: Any) -> Any:
        own = chunk_ids[row, i] == chunk_ids[row, j]
        return score + torch.where(own, 0.0, key_weights[row, j])

    out = flex_attention(
        query,
        key,
        value,
        score_mod=add_key_weight,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # The kernel for short queries does not support every number of heads.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    assert isinstance(out, torch.Tensor)  # no log-sum-exp was requested
    return out


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    """Compiles once per shape. No eager fallback: it would hold (L, L) logits in float32."""
    return torch.compile(_weighted, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=8)
def _causal_blocks(length: int, device: torch.device) -> BlockMask:
    """The causal block mask, the same for every batch of this length."""

    def causal(row: Any, head: Any, i: Any, j: Any) -> Any:
        return i >= j

    return create_block_mask(causal, None, None, length, length, device=device)


def _to_autocast_dtype(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Cast to one dtype, because autocast casts the inputs of sdpa but not of flex_attention."""
    kind, dtype = tensors[0].device.type, tensors[-1].dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return [tensor.to(dtype) for tensor in tensors]


def _no_flex(reason: str) -> str:
    return (
        f"flex_attention cannot apply importance weights: {reason}\n"
        "type load.attn_implementation=sdpa, or eager"
    )


AttentionInterface.register(FLEX, flex_attention_forward)
AttentionMaskInterface.register(FLEX, sdpa_mask)
