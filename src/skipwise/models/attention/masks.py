"""Attention masks under skips: sliding windows in hybrid models, and importance weights.

A hybrid model (Gemma 2 and 3, Cohere 2, Olmo 3, gpt-oss) has sliding layers, which see W tokens,
and full layers. Its sliding window counts tokens, so right after a skip a sliding layer would see
tokens from before the skip, at distances up to T that it never sees at inference. Here the window
counts positions, so tokens before the skip are hidden if they are W or more positions away, as in
a real text of that length. docs/method.md has the measurement behind this choice.

Shapes:  B = batch, L = tokens per example, W = sliding_window
"""

from __future__ import annotations

from typing import Any, TypeGuard

import torch

FLEX = "skipwise_flex"  # the name under which flex.py registers with transformers
_FULL, _SLIDING = "full_attention", "sliding_attention"


def is_hybrid(config: Any) -> bool:
    """Whether a model has both sliding and full layers."""
    types = set(getattr(config, "layer_types", None) or [])
    return {_FULL, _SLIDING} <= types and bool(getattr(config, "sliding_window", None))


def with_layer_masks(config: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with a mask for each layer type if the model is hybrid, else unchanged.

    Args:
        config: of the loaded model; its attention implementation decides the form of the masks.
        batch: `position_ids` (B, L), and `attention_mask`: ones (B, L), or for the full layers an
            additive mask (B, 1, L, L) or packed key weights.
    """
    if not is_hybrid(config) or isinstance(batch.get("attention_mask"), dict | None):
        return batch
    from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

    mask, positions = batch["attention_mask"], batch["position_ids"]
    rows, length = positions.shape
    window = config.sliding_window

    def near(row: Any, head: Any, query: Any, key: Any) -> Any:
        return positions[row, query] - positions[row, key] < window

    arguments: dict[str, Any] = {
        "config": config,
        "inputs_embeds": torch.empty(rows, length, 0, device=positions.device),
        "past_key_values": None,
    }
    padding = mask if mask.dim() == 2 else torch.ones_like(positions)
    masks = {
        **dict.fromkeys(config.layer_types),  # state layers: no padding to hide
        _FULL: create_causal_mask(attention_mask=mask, **arguments),
        _SLIDING: create_sliding_window_causal_mask(
            attention_mask=padding, and_mask_function=near, **arguments
        ),
    }
    return {**batch, "attention_mask": masks}


def with_chunk_weights(batch: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The batch with the additive mask of importance weights, on the batch's device.

    Args:
        batch: with `chunk_ids` and `key_weights` (B, L); returned unchanged without them.
        dtype: of the computation and of the mask (B, 1, L, L).
    """
    if "chunk_ids" not in batch:
        return batch
    batch = dict(batch)
    chunks, weights = batch.pop("chunk_ids"), batch.pop("key_weights").to(dtype)
    rows, length = chunks.shape
    mask = weights[:, None, :].expand(rows, length, length).contiguous()  # by query, by key
    mask.masked_fill_(chunks[:, :, None] == chunks[:, None, :], 0.0)
    index = torch.arange(length, device=chunks.device)
    mask.masked_fill_(index[None, :] > index[:, None], torch.finfo(torch.bfloat16).min)
    return {**batch, "attention_mask": mask[:, None]}


def pack_key_weights(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `chunk_ids` and `key_weights` packed into `attention_mask`, for flex.py.

    The mask is (B, 1, 2, L) int32, with the bits of the float weights: transformers passes a 4D
    mask to every layer unchanged, and FSDP2 and DeepSpeed cast floating-point inputs but not
    integers.
    """
    if "chunk_ids" not in batch:
        return batch
    batch = dict(batch)
    chunks, weights = batch.pop("chunk_ids"), batch.pop("key_weights")
    packed = torch.stack([chunks.int(), weights.float().view(torch.int32)], 1)
    return {**batch, "attention_mask": packed[:, None]}


def is_packed(mask: Any) -> TypeGuard[torch.Tensor]:
    """Whether a mask comes from `pack_key_weights`; other masks are boolean or floating-point."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.dtype == torch.int32


def unpack_key_weights(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`chunk_ids` (B, L) int32 and `key_weights` (B, L) float32."""
    chunks, weights = mask[:, 0].unbind(1)
    return chunks.contiguous(), weights.contiguous().view(torch.float32)


def sliding_reach(config: Any, batch: dict[str, Any]) -> int:
    """The largest distance in positions that sliding layers see in this batch."""
    positions = batch["position_ids"]
    index = torch.arange(positions.shape[1], device=positions.device)
    mask = batch.get("attention_mask")
    if isinstance(mask, dict):
        visible = mask[_SLIDING][:, 0]
        visible = visible if visible.dtype == torch.bool else visible == 0
    else:  # the model makes its own by token count; it uses an additive mask unchanged
        near = index[:, None] - index < config.sliding_window
        visible = torch.ones_like(near) if mask is not None and mask.dim() == 4 else near
        visible = (visible & (index[:, None] >= index)).expand(len(positions), -1, -1)
    distances = positions[:, :, None] - positions[:, None, :]  # (B, L, L)
    return int(torch.where(visible, distances, 0).max())
