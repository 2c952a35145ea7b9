"""Importance weights without a mask of pairs: flex_attention, on a GPU.

An additive (B, 1, L, L) mask leaves sdpa's fast kernels and costs a third of a training step
(docs/method.md). Here two numbers a token take the place of the mask (`masks.pack_key_weights`),
and the kernel adds a key's weight where the query is in another chunk. Everything else that reaches
this attention, a mask of ones or a sliding layer's, goes to transformers' sdpa unchanged.

Importing this module makes it known to transformers, by the name of `masks.FLEX`.

Shapes:  B = batch, L = tokens of an example, H = heads (K of keys), D = their width
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

_WIDTHS = (16, 32, 64, 128, 256)  # of a head: others are padded, or refused, by torch's version
_LAYERS = {"full_attention", "sliding_attention"}
_DROPOUTS = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
_BEYOND = ("softcap", "s_aux", "position_bias", "head_mask")  # what changes logits besides


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
    """Attention as transformers calls it.

    Args:
        query, key, value: (B, H, L, D), (B, K, L, D) twice.
        attention_mask: the carrier; None or another mask for plain sdpa.

    Returns:
        (B, L, H, D), and no weights.

    Raises:
        SkipwiseError: dropout, capped logits or sinks; `unsupported_by_model` finds these in the
            config.
    """
    beyond = [name for name in _BEYOND if kwargs.get(name) is not None]
    if beyond:  # sdpa would ignore some of them
        raise SkipwiseError(_no_flex(f"this model's attention has {beyond[0]}"))
    if not is_packed(attention_mask):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout > 0:
        raise SkipwiseError(_no_flex(f"attention dropout is {dropout:g}"))
    chunk_ids, key_weights = unpack_key_weights(attention_mask)
    length = chunk_ids.shape[1]
    assert query.shape[2] == key.shape[2] == length, "a cache beside the carrier"
    query, key, value = _as_sdpa_casts(query, key, value)
    eager = not query.is_cuda or torch.compiler.is_compiling()
    call = _weighted if eager else _compiled()
    blocks = _causal_blocks(length, query.device)
    out = call(query, key, value, chunk_ids, key_weights, blocks, scaling)
    return out.transpose(1, 2).contiguous(), None


def unsupported_by_machine() -> str:
    """Why flex_attention does not train here; "": it does."""
    if not torch.cuda.is_available() or torch.version.hip:
        return "flex_attention trains on NVIDIA GPUs alone"
    if torch.cuda.get_device_capability() < (8, 0):
        return f"{torch.cuda.get_device_name()} is too old for flex_attention"
    if importlib.util.find_spec("triton") is None:
        return "flex_attention needs Triton, which this torch came without"
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7):
        return f"flex_attention does not train in torch {torch.__version__}, from 2.7 it does"
    return ""


def unsupported_by_model(config: Any) -> str:
    """Why a model cannot have this attention, by its config; "": it can."""
    family = config.model_type
    if getattr(config, "attn_logit_softcapping", None):
        return f"{family} caps its attention logits"
    model: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model is None:
        return f"the code of {family} is not transformers' own"
    for kernel, able in (
        ("sdpa", model._supports_sdpa),
        ("flex_attention", model._supports_flex_attn and model._supports_attention_backend),
    ):
        if not able:  # sinks, weights that it returns, an attention of its own
            return f"transformers does not run {family} on {kernel}"
    for name in _DROPOUTS:
        if getattr(config, name, None):
            return f"flex_attention has no dropout, and {name} is {getattr(config, name):g}"
    others = set(getattr(config, "layer_types", None) or []) - _LAYERS
    if others:
        return f"{family} has layers of {sorted(others)[0]}"
    if getattr(config, "kv_lora_rank", None):
        return f"the keys and values of {family} differ in width"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width not in _WIDTHS:
        return f"heads are {width} wide, and flex_attention is for {', '.join(map(str, _WIDTHS))}"
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
    """(B, H, L, D): causal attention with `positions.additive_mask`'s weights on the logits.

    What a later chunk adds, 0 inside a chunk, so that a query sees its own neighbours as they are.
    """

    def weigh(score: Any, row: Any, head: Any, i: Any, j: Any) -> Any:
        own = chunk_ids[row, i] == chunk_ids[row, j]
        return score + torch.where(own, 0.0, key_weights[row, j])

    out = flex_attention(
        query,
        key,
        value,
        score_mod=weigh,
        block_mask=blocks,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        # The kernel for short queries takes not every number of heads.
        kernel_options={"FORCE_USE_FLEX_ATTENTION": True},
    )
    assert isinstance(out, torch.Tensor)  # and no log-sum-exp, which was not asked for
    return out


@functools.cache
def _compiled() -> Callable[..., torch.Tensor]:
    """Once a shape. Never eager where that fails: it would hold all pairs in float32."""
    return torch.compile(_weighted, dynamic=False, fullgraph=True)


@functools.lru_cache(maxsize=8)
def _causal_blocks(length: int, device: torch.device) -> BlockMask:
    """Which blocks of pairs are worth computing: the same for every batch of this length."""

    def causal(row: Any, head: Any, i: Any, j: Any) -> Any:
        return i >= j

    return create_block_mask(causal, None, None, length, length, device=device)


def _as_sdpa_casts(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """In one dtype, autocast's where it is on: it knows sdpa, and not flex_attention."""
    kind, dtype = tensors[0].device.type, tensors[-1].dtype
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    return [tensor.to(dtype) for tensor in tensors]


def _no_flex(reason: str) -> str:
    return (
        f"importance weights through flex_attention: {reason}\n"
        "type load.attn_implementation=sdpa, or eager"
    )


AttentionInterface.register(FLEX, flex_attention_forward)
AttentionMaskInterface.register(FLEX, sdpa_mask)
