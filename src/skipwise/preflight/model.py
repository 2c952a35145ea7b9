"""The preflight: what would waste a night of training, found in seconds before it.

Each check is one line: its name, whether it passed, what was measured, and the mend. They look at
the model as it will train, on a real batch: most ways to void a PoSE run leave the loss normal.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from skipwise.errors import Check
from skipwise.models.model_info import ModelInfo
from skipwise.pose.rope import Dynamic, Scaling


def check_model(
    model: Any, config: Any, info: ModelInfo, scaling: Scaling, target_length: int
) -> list[Check]:
    """What the loaded model really computes: frequencies, window, exact positions."""
    return [
        check_rope(model, info, scaling),
        _check_window(config, info, target_length),
        _check_exact(model, info, scaling, target_length),
    ]


def check_rope(model: Any, info: ModelInfo, scaling: Scaling) -> Check:
    """Every rotary module's frequencies and attention factor against `rope.py`."""
    want = scaling.inv_freq(info.rope_theta, info.rotary_dim)
    if isinstance(scaling, Dynamic):  # grows with what it has seen: nothing yet
        want = scaling.inv_freq(info.rope_theta, info.rotary_dim, info.original_length)
    name = "rope"
    modules = rotary_modules(model)
    if not modules:
        return Check(name=name, passed=False, detail="no rotary embedding was found in the model")
    for module, prefix in modules:
        have = getattr(module, f"{prefix}inv_freq").detach().cpu()
        if have.dtype != torch.float32:
            return Check(
                name=name,
                passed=False,
                detail=f"inv_freq is {have.dtype}: load with dtype=, a cast ruins positions",
            )
        have64 = have.double().numpy()
        if have64.shape != want.shape:
            return Check(
                name=name,
                passed=False,
                detail=f"inv_freq has {len(have64)} pairs, and the config says {len(want)}",
            )
        if not np.allclose(have64, want, rtol=1e-5, atol=0):
            worst = int(np.abs(have64 / want - 1).argmax())
            return Check(
                name=name,
                passed=False,
                detail=f"inv_freq is not {scaling.name} by {scaling.factor:g}: pair {worst} of "
                f"{len(want)} has {have64[worst]:.4g}, not {want[worst]:.4g}; load the weights "
                "into the scaled config, or try another rope.type",
            )
        factor = getattr(module, f"{prefix}attention_scaling", None)
        if factor is not None and abs(float(factor) - scaling.attention_factor) > 1e-6:
            return Check(
                name=name,
                passed=False,
                detail=f"the attention factor is {float(factor):.6f}, not "
                f"{scaling.attention_factor:.6f}",
            )
    return Check(
        name=name,
        passed=True,
        detail=f"{scaling.name}: slowest pair 1/{1 / want[-1]:.4g}, attention factor "
        f"{scaling.attention_factor:.4f}, as computed apart",
    )


def rotary_modules(model: Any) -> list[tuple[Any, str]]:
    """(module, prefix of its buffers) of the full-attention rotary embeddings."""
    found = []
    for module in model.modules():
        if hasattr(module, "full_attention_inv_freq"):
            found.append((module, "full_attention_"))
        elif hasattr(module, "inv_freq"):
            found.append((module, ""))
    return found


def _check_window(config: Any, info: ModelInfo, target_length: int) -> Check:
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False or info.hybrid:
        window = None
    layers = getattr(config, "layer_types", None)
    if layers and "sliding_attention" not in layers:
        window = None
    blocks = window is not None and window < target_length
    return Check(
        name="attention window",
        passed=not blocks,
        detail=f"sliding_window {window:,} hides everything further back: set it to null"
        if blocks
        else "sliding layers are local by design; the full ones see all"
        if info.hybrid
        else "every layer sees the whole context",
    )


def _check_exact(model: Any, info: ModelInfo, scaling: Scaling, target_length: int) -> Check:
    """cos at the last positions against float64: a cast of inv_freq or positions shows here."""
    (module, prefix), *_ = rotary_modules(model) or [(None, "")]
    if module is None:
        return Check(name="positions", passed=False, detail="no rotary embedding was found")
    inv_freq = getattr(module, f"{prefix}inv_freq")
    positions = torch.arange(target_length - 8, target_length, device=inv_freq.device)[None]
    probe = torch.zeros(1, device=inv_freq.device)
    arguments = {"layer_type": "full_attention"} if prefix else {}
    with torch.no_grad():
        turned = module(probe, positions, **arguments)
    cos = turned.real if isinstance(turned, torch.Tensor) else turned[0]  # DeepSeek V2: complex
    pairs = info.rotary_dim // 2
    angles = np.outer(positions[0].cpu().numpy(), scaling.inv_freq(info.rope_theta, pairs * 2))
    want = np.cos(angles) * scaling.attention_factor
    have = cos[0, :, :pairs].double().cpu().numpy()
    if not np.allclose(have, want, atol=1e-1) and cos.shape[-1] >= 2 * pairs:
        have = cos[0, :, 0 : 2 * pairs : 2].double().cpu().numpy()  # interleaved layout
    error = float(np.abs(have - want).max())
    # float32 angles at position p are exact to about p * 2**-24
    bound = max(1e-4, 4 * target_length * 2.0**-24)
    return Check(
        name="positions",
        passed=error <= bound,
        detail=f"exact to {error:.0e} at position {target_length - 1:,}"
        if error <= bound
        else f"off by {error:.1e} at position {target_length - 1:,}: the rotary angles lost "
        "precision",
    )
