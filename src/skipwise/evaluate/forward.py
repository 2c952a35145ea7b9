"""Forward passes of an evaluation, in memory that does not grow with vocabulary x length.

Long contexts go through the model in pieces with a key-value cache, and only the positions that
are asked for get logits. Positions are plain and a mask of ones is always sent.

Shapes:  B = batch, S = tokens, K = positions asked for, V = vocabulary
"""

from __future__ import annotations

import inspect
from typing import Any

import torch

PREFILL = 4096  # tokens of a row in one piece


def logits_at(
    model: Any, input_ids: torch.Tensor, positions: torch.Tensor, *, past: Any = None
) -> torch.Tensor:
    """Logits at some positions of a context.

    Args:
        input_ids: (B, S) the tokens after `past`.
        positions: (K,) indices in `input_ids`, ascending.
        past: key-value cache of the tokens before; None: there are none.

    Returns:
        (B, K, V) in the model's dtype.
    """
    first = int(positions[0])
    start = 0
    if past is None and input_ids.shape[1] > PREFILL:
        past = new_cache(model)
    if past is not None:
        while input_ids.shape[1] - start > PREFILL and start < first:
            step = min(PREFILL, first - start)
            prefill(model, input_ids[:, start : start + step], past)
            start += step
    return _forward(model, input_ids[:, start:], past, positions - start)


def prefill(model: Any, input_ids: torch.Tensor, past: Any) -> None:
    """Put tokens (B, S) into the cache."""
    for start in range(0, input_ids.shape[1], PREFILL):
        piece = input_ids[:, start : start + PREFILL]
        _forward(model, piece, past, torch.tensor([piece.shape[1] - 1]))


def new_cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def can_share(past: Any) -> bool:
    """Whether a cache holds every key, so that a prefix of it serves several rows."""
    return not any(getattr(layer, "is_sliding", False) for layer in past.layers)


def _forward(
    model: Any, input_ids: torch.Tensor, past: Any, positions: torch.Tensor
) -> torch.Tensor:
    before = past.get_seq_length() if past is not None else 0
    rows, tokens = input_ids.shape
    device = input_ids.device
    positions = positions.to(device)
    arguments: dict[str, Any] = {
        "input_ids": input_ids,
        "position_ids": torch.arange(before, before + tokens, device=device).expand(rows, -1),
        "attention_mask": torch.ones(rows, before + tokens, dtype=torch.long, device=device),
        "past_key_values": past,
        "use_cache": past is not None,
    }
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        return model(**arguments, logits_to_keep=positions).logits
    return model(**arguments).logits[:, positions]
