"""The preflight: checks that take seconds and find what would waste a night of training.

Each check is one line: its name, whether it passed, and what was found or how to fix it. The checks
run the model as it will train, because most mistakes that ruin a PoSE run leave the loss normal.
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
    """What the loaded model computes: frequencies, attention window, accurate positions.

    Weights that are not finite are found here, because no probe reaches every expert and token.
    """
    checks = [check_rope(model, info, scaling), _check_window(config, info, target_length)]
    pairs = [getattr(module, f"{prefix}inv_freq") for module, prefix in rotary_modules(model)]
    widths = {int(inv_freq.count_nonzero()) for inv_freq in pairs}
    if widths <= {(info.rotary_dim + 1) // 2}:  # else there is nothing to compare with
        checks.append(_check_exact(model, info, scaling, target_length))
    for name, parameter in model.named_parameters():
        own = type(parameter.data) is torch.Tensor and not parameter.is_meta  # no engine's shard
        if own and parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            detail = f"{name} holds numbers that are not finite: the checkpoint is broken"
            return [*checks, Check(name="weights", passed=False, detail=detail)]
    return checks


def check_rope(model: Any, info: ModelInfo, scaling: Scaling) -> Check:
    """Every rotary module's frequencies and attention factor against `pose.rope`."""
    want = scaling.inv_freq(info.rope_theta, info.rotary_dim)
    if isinstance(scaling, Dynamic):  # it grows with the longest input so far: none yet
        want = scaling.inv_freq(info.rope_theta, info.rotary_dim, info.original_length)
    modules = rotary_modules(model)
    problem = "" if modules else "no rotary embedding was found in the model"
    for module, prefix in modules:
        factor = getattr(module, f"{prefix}attention_scaling", None)
        inv_freq = getattr(module, f"{prefix}inv_freq").detach().cpu()
        problem = problem or _rope_problem(inv_freq, factor, want, scaling)
    detail = (
        f"the model's frequencies and attention factor are {scaling.name} by {scaling.factor:g}"
    )
    slowest, factor = float(want[-1]), float(scaling.attention_factor)
    numbers = {"slowest_inv_freq": slowest, "attention_factor": factor}
    return Check(name="rope", passed=not problem, detail=problem or detail, numbers=numbers)


def _rope_problem(inv_freq: torch.Tensor, factor: Any, want: np.ndarray, scaling: Scaling) -> str:
    """What is wrong with a module's frequencies and attention factor; empty if nothing is."""
    if inv_freq.dtype != torch.float32:
        return f"inv_freq is {inv_freq.dtype}: load with dtype=, because a cast ruins positions"
    have = np.trim_zeros(inv_freq.double().numpy(), "b")  # proportional: pairs that do not rotate
    if have.shape != want.shape:
        return f"inv_freq has {len(have)} frequencies, and the config says {len(want)}"
    if not np.allclose(have, want, rtol=1e-5, atol=0):
        worst = int(np.abs(have / want - 1).argmax())
        return (
            f"inv_freq is not {scaling.name} by {scaling.factor:g}: frequency {worst} of "
            f"{len(want)} is {have[worst]:.4g}, not {want[worst]:.4g}; load the weights "
            "into the scaled config, or try another rope.type"
        )
    if factor is not None and abs(float(factor) - scaling.attention_factor) > 1e-6:
        return f"the attention factor is {float(factor):.6f}, not {scaling.attention_factor:.6f}"
    return ""


def rotary_modules(model: Any) -> list[tuple[Any, str]]:
    """(module, prefix of its buffers) for each full-attention rotary embedding."""
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
    detail = "every layer sees the full context"
    if blocks:
        detail = f"sliding_window {window:,} hides everything further back: set it to null"
    elif info.hybrid:
        detail = "sliding layers are local by design, full layers see the full context"
    return Check(name="attention window", passed=not blocks, detail=detail)


def _check_exact(model: Any, info: ModelInfo, scaling: Scaling, target_length: int) -> Check:
    """cos at the last positions against float64: finds a cast of inv_freq or of positions."""
    (module, prefix), *_ = rotary_modules(model) or [(None, "")]
    if module is None:
        return Check(name="positions", passed=False, detail="no rotary embedding was found")
    inv_freq = getattr(module, f"{prefix}inv_freq")
    positions = torch.arange(target_length - 8, target_length, device=inv_freq.device)[None]
    probe = torch.zeros(1, device=inv_freq.device)
    arguments = {"layer_type": "full_attention"} if prefix else {}
    with torch.no_grad():
        rotary = module(probe, positions, **arguments)
    cos = rotary.real if isinstance(rotary, torch.Tensor) else rotary[0]  # DeepSeek V2: complex
    pairs = info.rotary_dim // 2
    angles = np.outer(positions[0].cpu().numpy(), scaling.inv_freq(info.rope_theta, pairs * 2))
    want = np.cos(angles) * scaling.attention_factor
    have = cos[0, :, :pairs].double().cpu().numpy()
    if not np.allclose(have, want, atol=1e-1) and cos.shape[-1] >= 2 * pairs:
        have = cos[0, :, 0 : 2 * pairs : 2].double().cpu().numpy()  # interleaved layout
    error = float(np.abs(have - want).max())
    # float32 angles at position p are accurate to about p * 2**-24
    bound = max(1e-4, 4 * target_length * 2.0**-24)
    last = f"{target_length - 1:,}"
    detail = f"rotary angles up to position {last} are as accurate as float32 allows"
    if error > bound:
        detail = f"cosines at position {last} are off by {error:.1e}: the angles lost precision"
    return Check(name="positions", passed=error <= bound, detail=detail, numbers={"error": error})
