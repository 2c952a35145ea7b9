"""Checks that need only the config: no weights, no torch, under a second."""

from __future__ import annotations

import math

from skipwise.config.recipe import Recipe
from skipwise.config.samplers import make_sampler
from skipwise.errors import Check
from skipwise.models.convert import conversion_for
from skipwise.models.hf_config import complete, read_config
from skipwise.models.model_info import ModelInfo, read_model_info
from skipwise.models.scaled_config import auto_scalings, config_changes, scaling_for
from skipwise.pose.rope import Scaling, Unscaled, YaRN


def check_config(
    info: ModelInfo, scaling: Scaling, target_length: int, recipe: Recipe | None = None
) -> list[Check]:
    """The lengths, what `rope.type: auto` will do, and layers that skips cannot train."""
    measured = auto_scalings(recipe, info)[0] if recipe is not None else []
    L, factor = info.original_length, scaling.factor
    reach = L * factor / info.scaling.factor
    if isinstance(scaling, YaRN):  # L may differ from what the present scaling reaches
        reach = scaling.window(target_length)
    fits = target_length > L and abs(reach - target_length) < 1
    name = "scaled" if measured else scaling.name
    detail = f"the window grows from {L:,} to {target_length:,} tokens, {name} by {factor:g}"
    if not isinstance(info.scaling, Unscaled):
        detail += f" of which the model already has {info.scaling.factor:g}"
    if not fits:
        detail = (
            f"rope.factor {factor:g} extends {L:,} tokens to {reach:,.0f}, not to the target of "
            f"{target_length:,}: leave rope.factor out"
        )
    numbers = {"original_length": L, "target_length": target_length, "factor": factor}
    checks = [Check(name="lengths", passed=fits, detail=detail, numbers=numbers)]
    if measured:
        names = f"{', '.join(measured[:-1])} and {measured[-1]}"
        detail = (
            f"auto: extend will measure {names}, and take the best; checked with {scaling.name}"
        )
        checks.append(Check(name="rope.type", passed=True, detail=detail))
    if info.notes:
        checks.append(Check(name="config keys", passed=True, detail=info.notes))
    if info.recurrent:
        detail = (
            "skips train only the attention layers; method=full also shows longer texts to the "
            "recurrent layers"
        )
        checks.append(Check(name="recurrent layers", passed=True, detail=detail))
    return checks


def check_config_alone(recipe: Recipe) -> list[Check]:
    """Everything that can be checked in a folder that holds only a config.json.

    Raises:
        SkipwiseError: the model cannot be extended as the recipe says.
    """
    raw = read_config(recipe.model, recipe.load)
    conversion = conversion_for(raw, recipe.load.text_only)
    config = complete(conversion.config(raw) if conversion else raw)
    info = read_model_info(config, recipe.original_length)
    scaling = scaling_for(recipe, info)
    changes = config_changes(info, scaling, recipe.target_length)
    theta = info.rope_parameters.get("rope_theta", info.rope_theta)
    slowest = float(scaling.inv_freq(info.rope_theta, info.rotary_dim)[-1])
    converted = f"{conversion.source}, converted exactly to " if conversion else ""
    found = {
        "model": f"{converted}{info.family}; rope_theta is {theta:,.0f}, and RoPE "
        f"rotates {info.rotary_dim} of a head's {info.head_dim} dimensions",
        "rope": f"the lowest frequency turns once in {2 * math.pi / slowest:,.0f} tokens; the "
        f"attention factor is {scaling.attention_factor:.4f}",
        "attention window": _window(info),
    }
    numbers = {"slowest_inv_freq": slowest, "attention_factor": float(scaling.attention_factor)}
    if recipe.method != "none":
        length = make_sampler(recipe, info.original_length).train_length
        found["training"] = (
            f"{recipe.method} trains on {length:,} tokens per example, with positions up to "
            f"{recipe.target_length - 1:,}"
        )
        if length > 32768 and recipe.method != "full":
            found["training"] += "; train_length=8k uses fewer"
    rope = changes["rope_parameters"].items()
    keys = [f"{key}={value}" for key, value in changes.items() if key != "rope_parameters"]
    keys += [f"{key}={value}" for key, value in rope if key not in ("long_factor", "short_factor")]
    found["config"] = f"config.json gets {', '.join(keys)}"
    checks = [
        Check(name=name, passed=True, detail=detail, numbers=numbers if name == "rope" else {})
        for name, detail in found.items()
    ]
    return [checks[0], *check_config(info, scaling, recipe.target_length, recipe), *checks[1:]]


def _window(info: ModelInfo) -> str:
    if info.sliding_window is None:
        return "every layer sees the full context"
    if info.hybrid:
        return f"sliding layers keep their {info.sliding_window:,} tokens, full layers see all"
    return f"every layer has a sliding_window of {info.sliding_window:,}: it will be removed"
