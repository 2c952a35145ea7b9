"""The checks that a config decides alone, in a blink: no weights, no torch."""

from __future__ import annotations

from skipwise.config.recipe import Recipe
from skipwise.config.samplers import make_sampler
from skipwise.errors import Check
from skipwise.models.convert import conversion_for
from skipwise.models.hf_config import complete, read_config
from skipwise.models.model_info import ModelInfo, read_model_info
from skipwise.models.scaled_config import config_changes, scaling_for
from skipwise.pose.rope import Scaling, Unscaled


def check_config(info: ModelInfo, scaling: Scaling, target_length: int) -> list[Check]:
    """What the config decides of any run: the lengths, and what kind of layers there are."""
    L = info.original_length
    reach = L * scaling.factor / info.scaling.factor
    fits = target_length > L and abs(reach - target_length) < 1
    carried = (
        "" if isinstance(info.scaling, Unscaled) else f", carried on from {info.scaling.factor:g}"
    )
    lengths = Check(
        name="lengths",
        passed=fits,
        detail=f"{L:,} to {target_length:,} tokens, {scaling.name} by {scaling.factor:g}{carried}"
        if fits
        else f"rope.factor {scaling.factor:g} x {L:,} is {reach:,.0f} tokens, not the target's "
        f"{target_length:,}: leave rope.factor out",
    )
    if not info.recurrent:
        return [lengths]
    state = Check(
        name="recurrent layers",
        passed=True,
        detail="skips train the attention layers only; recurrent ones see no longer text than "
        "before: compare with method=full if they should",
    )
    return [lengths, state]


def check_config_alone(recipe: Recipe) -> list[Check]:
    """All that a folder with nothing but a config.json tells, and what it does not.

    Raises:
        SkipwiseError: the model cannot be extended as asked.
    """
    raw = read_config(recipe.model, recipe.load)
    conversion = conversion_for(raw, recipe.load.text_only)
    info = read_model_info(
        complete(conversion.config(raw) if conversion else raw), recipe.original_length
    )
    scaling = scaling_for(recipe, info)
    changes = config_changes(info, scaling, recipe.target_length)
    inv_freq = scaling.inv_freq(info.rope_theta, info.rotary_dim)
    checks = [
        Check(
            name="model",
            passed=True,
            detail=(f"{conversion.source}, to be converted exactly to " if conversion else "")
            + f"{info.family}, rope_theta {info.rope_theta:,.0f}, "
            f"{info.rotary_dim // 2} pairs of {info.head_dim} dimensions",
        ),
        *check_config(info, scaling, recipe.target_length),
        Check(
            name="rope",
            passed=True,
            detail=f"slowest pair 1/{1 / inv_freq[-1]:.4g}, attention factor "
            f"{scaling.attention_factor:.4f}",
        ),
        Check(name="attention window", passed=True, detail=_window(info)),
    ]
    if recipe.method != "none":
        sampler = make_sampler(recipe, info.original_length)
        checks.append(
            Check(
                name="training",
                passed=True,
                detail=f"{recipe.method}, {sampler.train_length:,} tokens an example, positions up "
                f"to {recipe.target_length - 1:,}"
                + (
                    "; train_length=8k trains with fewer"
                    if sampler.train_length > 32768 and recipe.method != "full"
                    else ""
                ),
            )
        )
    keys = ", ".join(f"{key}={value}" for key, value in changes.items() if key != "rope_parameters")
    written = ", ".join(
        f"{k}={v}"
        for k, v in changes["rope_parameters"].items()
        if k != "long_factor" and k != "short_factor"
    )
    checks.append(Check(name="config", passed=True, detail=f"{keys}, rope: {written}"))
    return checks


def _window(info: ModelInfo) -> str:
    if info.sliding_window is None:
        return "every layer sees the whole context"
    if info.hybrid:
        return f"sliding layers keep their {info.sliding_window:,} tokens, the full ones see all"
    return f"sliding_window {info.sliding_window:,} in every layer: it will be taken out"
