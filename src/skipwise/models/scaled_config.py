"""The scaling that a recipe asks for on a model, and the config keys it becomes. No torch.

A model that is already scaled is not scaled twice: its own scaling is extended to the longer
target, so that pairs reach the same angles at the end of the new window as at that of the old.
"""

from __future__ import annotations

import copy
from typing import Any

from skipwise.config.recipe import Recipe
from skipwise.errors import SkipwiseError
from skipwise.models.model_info import LENGTHS, PROPORTIONAL, ModelInfo
from skipwise.pose.rope import SCALINGS, Scaling, Unscaled, keeps_length, make_scaling, scalings_for
from skipwise.pose.rope_config import CARRIED


def scaling_for(recipe: Recipe, info: ModelInfo) -> Scaling:
    """The RoPE scaling that the recipe asks for on this model.

    Raises:
        SkipwiseError: the target is not longer, the family does not take the type, the model's own
            scaling cannot be extended, the scaling cannot be trained with.
    """
    L, T = info.original_length, recipe.target_length
    if T <= L:
        raise SkipwiseError(
            f"the target of {T:,} tokens is not longer than the model's {L:,}: type a longer --to"
        )
    if not isinstance(info.scaling, Unscaled):
        return _extended(recipe, info)
    taken = scalings_for(info.refused_types)
    name = taken[0] if recipe.rope.type == "auto" else recipe.rope.type
    if name in info.refused_types:
        raise SkipwiseError(
            f"the config of {info.family} does not take rope.type: {name}\n"
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
            f"rope.type: {name} changes its frequencies with the length of the text and cannot be "
            "trained with\ntype rope.type=yarn, or method=none to use it untrained"
        )
    return scaling


def auto_scalings(recipe: Recipe, info: ModelInfo) -> tuple[list[str], str]:
    """The scalings that `rope.type: auto` measures, the default first; why it measures none."""
    if recipe.rope.type != "auto" or not isinstance(info.scaling, Unscaled):
        return [], "the recipe or the model has its scaling already"
    names = [n for n in scalings_for(info.refused_types) if SCALINGS[n].auto_candidate]
    if len(names) < 2:
        return [], "the only one that the family takes"
    spare = recipe.attention_temperature == "auto" or bool(recipe.data.eval_sources)
    if recipe.method == "none" and not spare:  # the evaluation reads all of the text
        return [], "not measured: no text to spare"
    return names, ""


def config_changes(info: ModelInfo, scaling: Scaling, target_length: int) -> dict[str, Any]:
    """The config keys that change; `rope_parameters` are those of the full-attention layers.

    A sliding window in every layer (Mistral-7B-v0.1) would hide tokens further back, so it is
    removed. In hybrid models the windows stay, because those layers are local by design.
    """
    before = info.original_length
    if not isinstance(info.scaling, Unscaled):  # the length that the extended scaling counts from
        before = getattr(scaling, "original_length", None) or round(before / info.scaling.factor)
    lengths = {"original_length": before, "target_length": target_length}
    settings = scaling.to_config(theta=info.rope_theta, dim=info.rotary_dim, **lengths)
    if scaling.keeps_length and not keeps_length(scaling, info.family):
        settings["max_position_embeddings"] = target_length
    parameters, trained = settings["rope_parameters"], info.rope_parameters
    parameters |= {key: trained[key] for key in CARRIED if key in trained}
    if info.rope_type == PROPORTIONAL:
        theta = parameters["rope_theta"] ** (info.head_dim / info.rotary_dim)
        parameters |= {"rope_type": PROPORTIONAL, "rope_theta": theta}
    if "llama_4_scaling_beta" in trained:  # its steps are as long as before
        length = trained.get("original_max_position_embeddings", before)
        parameters.setdefault("original_max_position_embeddings", length)
    if info.sliding_window is not None and not info.hybrid:
        # some classes that list their layers need a number even if no layer is sliding
        settings["sliding_window"] = target_length if info.lists_layers else None
    return settings


def scaled_config(config: Any, info: ModelInfo, scaling: Scaling, target_length: int) -> Any:
    """A copy of transformers' config with these changes."""
    settings = config_changes(info, scaling, target_length)
    scaled = copy.deepcopy(config)
    if info.nested:
        full = settings.pop("rope_parameters")
        scaled.rope_parameters = {**config.rope_parameters, "full_attention": full}
    length = settings["max_position_embeddings"]
    settings |= {key: length for key in LENGTHS if isinstance(getattr(config, key, None), int)}
    for key, value in settings.items():
        setattr(scaled, key, value)
    key = "original_max_position_embeddings"  # at the top level it wins over the one inside
    if key not in settings and getattr(scaled, key, None):
        inside = scaled.rope_parameters.get("full_attention", scaled.rope_parameters)
        setattr(scaled, key, inside.get(key) or info.original_length)
    if "sliding_window" in settings:
        if hasattr(scaled, "interleaved_sliding_window"):  # vLLM's own key for the same window
            delattr(scaled, "interleaved_sliding_window")
        if getattr(scaled, "use_sliding_window", None):
            scaled.use_sliding_window = False
        if getattr(scaled, "layer_types", None):
            scaled.layer_types = ["full_attention"] * len(scaled.layer_types)
    if scaled.to_dict().get("head_dim", 0) is None:  # scaled rotary modules do not compute it
        scaled.head_dim = info.head_dim
    return scaled


def _extended(recipe: Recipe, info: ModelInfo) -> Scaling:
    """The model's own scaling, extended from L to T."""
    present, rope = info.scaling, recipe.rope
    what = f"this {info.family} model is scaled with {present.name} by {present.factor:g}"
    try:
        extended = present.extended(info.original_length, recipe.target_length)
    except SkipwiseError as error:
        before = getattr(present, "original_length", info.original_length)
        raise SkipwiseError(
            f"{what}: {error}\nextend the model it was made from; or, if that scaling was never "
            f"trained, type original_length={before}"
        ) from error
    if rope.type not in ("auto", present.name):
        raise SkipwiseError(
            f"{what} and was trained with those frequencies: {rope.type} on top would change them\n"
            f"leave rope.type out: {present.name} is extended"
        )
    if rope.factor is not None or rope.options:
        raise SkipwiseError(
            f"{what}: that is extended with its own options, by the factor that the lengths give\n"
            "leave rope.factor and rope.options out"
        )
    return extended
