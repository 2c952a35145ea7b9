"""Whether a run learns from its own base model, and with which weight. No torch.

The first chunk of an example is ordinary text at positions 0, 1, 2, ..., where the base model
predicts well. Adding w KL(base || model) there to the next-token loss preserves quality at short
context (training/chunked_loss.py computes the loss, training/teacher.py holds the base model).
"""

from __future__ import annotations

import dataclasses

from skipwise.config.recipe import SHARDED_ENGINES, DistillationSettings, Recipe
from skipwise.config.stages import is_full_length_stage
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import SAMPLERS

WEIGHT = 3.0  # w for auto; measured at 3.4 M parameters and f = 8 (docs/method.md)


def distillation_weight(
    recipe: Recipe,
    *,
    original_length: int | None = None,
    router_loss: bool = False,
    engine: str = "",
    lacks: str = "",
) -> tuple[float, str]:
    """(w, the reason if auto becomes 0).

    Args:
        original_length: L of the model. Defaults to the recipe's, if it has one.
        router_loss: the model adds a loss for its expert router.
        engine: the running engine. Defaults to the recipe's.
        lacks: why this model's loss cannot be computed in slices.

    Raises:
        SkipwiseError: the recipe gives a number, but distillation is not possible.
    """
    asked = recipe.distillation.weight
    if asked == 0:
        return 0.0, ""
    why, fix = _obstacle(recipe, router_loss, engine or recipe.engine, lacks)
    if asked == "auto":
        sampler = SAMPLERS.get(recipe.method)
        if sampler is not None and sampler.has_chunks and sampler.is_baseline:
            return 0.0, f"method: {recipe.method} is a baseline and trains as published"
        L, M = original_length or recipe.original_length, recipe.train_length
        if not why and L and isinstance(M, int) and M >= 2 * L and recipe.method != "full":
            why = f"examples of {M:,} tokens, 2 x {L:,} or more, gain nothing from it"
        return (0.0, why) if why else (WEIGHT, "")
    if why:
        raise SkipwiseError(
            f"distillation.weight: {asked:g}: {why}\ntype distillation.weight=0{fix}"
        )
    return asked, ""


def shards(engine: str) -> bool:
    """Whether an engine shards the weights, so that the teacher needs a copy of its own."""
    return engine in SHARDED_ENGINES or "launcher" in engine


def in_one_process(recipe: Recipe) -> Recipe:
    """The recipe for a single process: engine auto, and no distillation if the engine shards."""
    taught = recipe.distillation
    if shards(recipe.engine) or not distillation_weight(recipe)[0]:
        taught = DistillationSettings(weight=0.0)
    return dataclasses.replace(recipe, engine="auto", distillation=taught)


def _obstacle(recipe: Recipe, router_loss: bool, engine: str, lacks: str) -> tuple[str, str]:
    """(why distillation is not possible, what else to type); both empty if it is."""
    sampler = SAMPLERS.get(recipe.method)
    if not (sampler is not None and sampler.has_chunks) and not is_full_length_stage(recipe):
        return f"method: {recipe.method} has no first chunk to learn on", ", or method=pose"
    if recipe.lora is not None and recipe.lora.quantization != "none" and shards(engine):
        return (
            f"engine: {engine} would need a teacher that is not quantised",
            ", or --engine ddp" if engine in SHARDED_ENGINES else "",
        )
    if recipe.trainer.get("use_liger_kernel"):
        return "trainer.use_liger_kernel replaces the loss", ", or leave that out"
    if recipe.training.loss == "full":
        return "its loss is computed in slices, and training.loss is full", ", or leave that out"
    if router_loss:
        return "this model adds a router loss (output_router_logits)", ""
    if lacks:
        return f"its loss is computed in slices, which {lacks}", ""
    return "", ""
