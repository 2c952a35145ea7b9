"""The sampler that a recipe's `method` names, and what the `auto` values of `positions` become."""

from __future__ import annotations

import dataclasses
from typing import Any

from skipwise.config.recipe import PositionSettings, Recipe
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import SAMPLERS, Sampler


def resolve_auto(recipe: Recipe) -> Recipe:
    """The recipe without `auto` in `positions`.

    Baselines are trained as published. Other samplers get the text at the chunk's own positions,
    and importance weights where they have several chunks and the attention takes a mask.
    research/study has the measurements.
    """
    positions = recipe.positions
    sampler = SAMPLERS.get(recipe.method)
    ours = not getattr(sampler, "is_baseline", True)
    if positions.content == "auto":
        content = "aligned" if ours else getattr(sampler, "content", "uniform")
        positions = dataclasses.replace(positions, content=content)
    if positions.key_weights == "auto":
        chunks = getattr(sampler, "has_chunks", False) and positions.num_chunks > 1
        weights = "importance" if ours and chunks and recipe.load.takes_mask else "none"
        positions = dataclasses.replace(positions, key_weights=weights)
    return dataclasses.replace(recipe, positions=positions)


def example_length(recipe: Recipe, original_length: int) -> int:
    """M, tokens per example; an `auto` that nothing has chosen for yet is the original length."""
    return original_length if recipe.train_length in (None, "auto") else recipe.train_length


def make_sampler(recipe: Recipe, original_length: int) -> Sampler:
    """The position sampler that `method` names.

    Raises:
        SkipwiseError: `method: none`, or a `positions` key that the sampler does not take.
    """
    recipe = resolve_auto(recipe)
    sampler: Any = SAMPLERS.get(recipe.method)
    if sampler is None:
        raise SkipwiseError("method: none rescales RoPE and trains nothing: there are no positions")
    settings = dataclasses.asdict(recipe.positions)
    default = resolve_auto(dataclasses.replace(recipe, positions=PositionSettings())).positions
    values = {"train_length": example_length(recipe, original_length), **settings}
    values["target_length"] = recipe.target_length
    taken = [field.name for field in dataclasses.fields(sampler)]
    if recipe.train_length == "auto" and sampler.is_baseline:
        raise SkipwiseError(
            f"train_length: auto chooses among lengths of method: pose, not {recipe.method}\n"
            "leave it out, or type a length such as train_length=8k"
        )
    if recipe.method == "pose" and recipe.train_length == recipe.target_length > original_length:
        raise SkipwiseError(
            f"train_length: {recipe.train_length} is the target length, which leaves no skips\n"
            "type method=full for full-length training, or a shorter train_length"
        )
    if "train_length" not in taken and recipe.train_length not in (None, recipe.target_length):
        raise SkipwiseError(
            f"train_length: {recipe.train_length} does not take effect: method: {recipe.method} "
            f"trains on {recipe.target_length} tokens, the target length\nleave one of them out"
        )
    others = [key for key in settings if key not in (*taken, "key_weights")]
    unused = [key for key in others if settings[key] != getattr(default, key)]
    if settings["key_weights"] != "none" and not sampler.has_chunks:
        raise SkipwiseError(
            f"positions.key_weights: {settings['key_weights']} needs chunks, and method: "
            f"{recipe.method} has none"
        )
    if unused:
        raise SkipwiseError(
            f"method: {recipe.method} does not take positions.{' or positions.'.join(unused)}\n"
            "leave that out, or type method=pose"
        )
    return sampler(**{key: values[key] for key in taken if key in values})
