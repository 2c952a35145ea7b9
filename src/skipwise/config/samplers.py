"""The position sampler that a recipe names, and what its `auto` values become."""

from __future__ import annotations

import dataclasses

from skipwise.config.recipe import PositionSettings, Recipe
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import CREAM, FullLength, PoSE, RandPos, Sampler


def resolve_auto(recipe: Recipe) -> Recipe:
    """The recipe with the auto of `positions` decided, by its method.

    PoSE: text that stands where its positions say, and importance weights. research/study has the
    measurements. The baselines are as published.
    """
    positions, pose = recipe.positions, recipe.method == "pose"
    if positions.content == "auto":
        content = {"pose": "aligned", "cream": "contiguous"}.get(recipe.method, "uniform")
        positions = dataclasses.replace(positions, content=content)
    if positions.key_weights == "auto":
        masked = recipe.load.attn_implementation not in ("flash_attention_2", "flash_attention_3")
        weighted = pose and masked and positions.num_chunks > 1
        weights = "importance" if weighted else "none"
        positions = dataclasses.replace(positions, key_weights=weights)
    return dataclasses.replace(recipe, positions=positions)


def make_sampler(recipe: Recipe, original_length: int) -> Sampler:
    """The position sampler that `method` names; `none` trains nothing and has none."""
    recipe = resolve_auto(recipe)
    L, T = recipe.train_length or original_length, recipe.target_length
    settings = recipe.positions
    if recipe.method != "pose":
        plain = resolve_auto(dataclasses.replace(recipe, positions=PositionSettings())).positions
        kept = {"key_weights": settings.key_weights}
        if recipe.method == "cream":
            kept["content"] = settings.content
        if settings != dataclasses.replace(plain, **kept):
            raise SkipwiseError(
                "positions: settings of the PoSE sampler do not take effect with method: "
                f"{recipe.method}\nremove them, or type method=pose"
            )
        if settings.key_weights != "none" and recipe.method != "cream":
            raise SkipwiseError(
                f"positions.key_weights: {settings.key_weights} needs chunks, and method: "
                f"{recipe.method} has none"
            )
    match recipe.method:
        case "pose":
            values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(PoSE)[2:]}
            return PoSE(train_length=L, target_length=T, **values)
        case "full":
            return FullLength(target_length=T)
        case "randpos":
            return RandPos(train_length=L, target_length=T)
        case "cream":
            content = "aligned" if settings.content == "aligned" else "contiguous"
            return CREAM(train_length=L, target_length=T, content=content)
    raise SkipwiseError("method: none rescales RoPE and trains nothing: there are no positions")
