"""The scaling that a recipe asks for on a model, and the config keys it becomes. No torch.

A model that is scaled already is carried on, not scaled twice: its own scaling goes to the longer
target, so that at the new end of the window every pair turns as far as it did at the old end.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

from skipwise.config.recipe import Recipe
from skipwise.errors import SkipwiseError
from skipwise.models.model_info import ModelInfo
from skipwise.pose.rope import Linear, Llama3, Scaling, Unscaled, YaRN, make_scaling


def scaling_for(recipe: Recipe, info: ModelInfo) -> Scaling:
    """The RoPE scaling that the recipe asks for on this model.

    Raises:
        SkipwiseError: the target is not longer, the family does not take the type, the model's own
            scaling cannot be carried on, the scaling cannot be trained with.
    """
    L, T = info.original_length, recipe.target_length
    if T <= L:
        raise SkipwiseError(
            f"the target of {T:,} tokens is not longer than the model's {L:,}: type a longer --to"
        )
    if not isinstance(info.scaling, Unscaled):
        return _carried_on(recipe, info)
    name = recipe.rope.type
    if name == "auto":
        name = next(n for n in ("yarn", "longrope", "ntk") if n not in info.refused_types)
    if name in info.refused_types:
        taken = [n for n in ("yarn", "linear", "longrope", "ntk") if n not in info.refused_types]
        raise SkipwiseError(
            f"rope.type: {name} is not taken by the config of {info.family}\n"
            f"leave it out, or type rope.type={' or '.join(taken)}"
        )
    scaling = make_scaling(
        name,
        factor=recipe.rope.factor or T / L,
        original_length=L,
        theta=info.rope_theta,
        dim=info.rotary_dim,
        **recipe.rope.options,
    )
    if recipe.method != "none" and not scaling.trainable:
        raise SkipwiseError(
            f"rope.type: {name} depends on the longest position seen so far and cannot "
            "be trained with\ntype rope.type=yarn, or method=none to use it untrained"
        )
    return scaling


def config_changes(info: ModelInfo, scaling: Scaling, target_length: int) -> dict[str, Any]:
    """The config keys that change, `rope_parameters` being those of the full-attention layers.

    A window that every layer has (Mistral-7B-v0.1) would hide what lies further back: it goes. The
    windows of layers beside full ones stay, for those layers are local by design.
    """
    if isinstance(info.scaling, Unscaled):
        before = info.original_length
    else:  # the length that the carried scaling counts from
        before = getattr(scaling, "original_length", None) or round(
            info.original_length / info.scaling.factor
        )
    settings = scaling.to_config(
        theta=info.rope_theta,
        dim=info.rotary_dim,
        original_length=before,
        target_length=target_length,
    )
    if "partial_rotary_factor" in info.rope_parameters:
        share = info.rope_parameters["partial_rotary_factor"]
        settings["rope_parameters"]["partial_rotary_factor"] = share
    if info.sliding_window is not None and not info.hybrid:
        # some classes that list their layers want a number also where no layer is sliding
        settings["sliding_window"] = target_length if info.lists_layers else None
    return settings


def scaled_config(config: Any, info: ModelInfo, scaling: Scaling, target_length: int) -> Any:
    """A copy of transformers' config with the changes in it."""
    settings = config_changes(info, scaling, target_length)
    scaled = copy.deepcopy(config)
    if info.nested:
        full = settings.pop("rope_parameters")
        scaled.rope_parameters = {**config.rope_parameters, "full_attention": full}
    for key, value in settings.items():
        setattr(scaled, key, value)
    if "sliding_window" in settings:
        if getattr(scaled, "use_sliding_window", None):
            scaled.use_sliding_window = False
        if getattr(scaled, "layer_types", None):
            scaled.layer_types = ["full_attention"] * len(scaled.layer_types)
    if getattr(scaled, "head_dim", 0) is None:  # the scaled rotary modules do not work it out
        scaled.head_dim = info.head_dim
    return scaled


def _carried_on(recipe: Recipe, info: ModelInfo) -> Scaling:
    """The model's own scaling, reaching T instead of L."""
    present, rope = info.scaling, recipe.rope
    further = recipe.target_length / info.original_length
    what = f"this {info.family} model is scaled with {present.name} by {present.factor:g}"
    if not isinstance(present, Linear | YaRN | Llama3):
        before = getattr(present, "original_length", info.original_length)
        raise SkipwiseError(
            f"{what}, with factors searched for its own length: none are known for a longer one\n"
            f"extend the model it was made from; or, if that scaling was never trained, type "
            f"original_length={before}"
        )
    if rope.type not in ("auto", present.name):
        raise SkipwiseError(
            f"{what}, and its weights know those frequencies: {rope.type} on top would give others"
            f"\nleave rope.type out: {present.name} is carried on"
        )
    if rope.factor is not None or rope.options:
        raise SkipwiseError(
            f"{what}: it is carried on with its own options, by the factor that the lengths give\n"
            "leave rope.factor and rope.options out"
        )
    if isinstance(present, YaRN):
        default = dataclasses.replace(present, attention_factor=None)
        if present.attention_factor != default.attention_factor:
            raise SkipwiseError(
                f"{what} and an attention_factor of {present.attention_factor:g} of its own: what "
                "it should be at a longer target is not known\nextend the model it was made from"
            )
        factor = recipe.target_length / present.original_length
        return dataclasses.replace(default, factor=factor, attention_factor=None)
    return dataclasses.replace(present, factor=present.factor * further)
