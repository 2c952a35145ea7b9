"""Whether a run learns from its own base, and with which weight. No torch.

On the first chunk of an example the text is whole and the positions are 0, 1, 2, ..: the base's own
prediction is right there, and w KL(base || model) beside the next-token loss keeps the skill at
short length that new positions cost (loss.py has the loss, models/teacher.py the base).
"""

from __future__ import annotations

import dataclasses

from skipwise.config.recipe import SHARDED_ENGINES, DistillationSettings, Recipe
from skipwise.config.stages import is_full_length_stage
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import SAMPLERS

WEIGHT = 3.0  # w of auto; measured at 3.4 M parameters and f = 8 (docs/method.md)


def distillation_weight(
    recipe: Recipe, *, router_loss: bool = False, engine: str = "", lacks: str = ""
) -> tuple[float, str]:
    """(w, why it is 0 although the recipe says auto).

    Args:
        router_loss: the model adds a loss of its experts' router.
        engine: that was brought up; none given: the recipe's.
        lacks: why this model's loss cannot be computed in slices.

    Raises:
        SkipwiseError: the recipe gives a number, and it cannot be done.
    """
    asked = recipe.distillation.weight
    if asked == 0:
        return 0.0, ""
    why, mend = _obstacle(recipe, router_loss, engine or recipe.engine, lacks)
    if asked == "auto":
        sampler = SAMPLERS.get(recipe.method)
        if sampler is not None and sampler.has_chunks and sampler.is_baseline:
            return 0.0, f"method: {recipe.method} is a baseline and trains as published"
        return (0.0, why) if why else (WEIGHT, "")
    if why:
        raise SkipwiseError(
            f"distillation.weight: {asked:g}: {why}\ntype distillation.weight=0{mend}"
        )
    return asked, ""


def shards(engine: str) -> bool:
    """Whether an engine takes the weights apart, and the teacher needs its own."""
    return engine in SHARDED_ENGINES or "launcher" in engine


def in_one_process(recipe: Recipe) -> Recipe:
    """The recipe for this process alone, without what its own engine would shard or not do.

    Raises:
        SkipwiseError: as `distillation_weight`.
    """
    taught = recipe.distillation
    if shards(recipe.engine) or not distillation_weight(recipe)[0]:
        taught = DistillationSettings(weight=0.0)
    return dataclasses.replace(recipe, engine="auto", distillation=taught)


def _obstacle(recipe: Recipe, router_loss: bool, engine: str, lacks: str) -> tuple[str, str]:
    """(what stands in the way, what else to type); two empty texts: nothing."""
    sampler = SAMPLERS.get(recipe.method)
    if not (sampler is not None and sampler.has_chunks) and not is_full_length_stage(recipe):
        return f"method: {recipe.method} has no first chunk to learn on", ", or method=pose"
    if recipe.lora is not None and recipe.lora.quantization != "none" and shards(engine):
        return (
            f"engine: {engine} would take weights that are not quantised for the teacher",
            ", or --engine ddp" if engine in SHARDED_ENGINES else "",
        )
    if recipe.trainer.get("use_liger_kernel"):
        return "trainer.use_liger_kernel replaces the loss", ", or leave that out"
    if recipe.training.loss == "full":
        return "its loss is computed in slices, and training.loss is full", ", or leave that out"
    if router_loss:
        return "this model adds the loss of its router (output_router_logits)", ""
    if lacks:
        return f"its loss is computed in slices, which {lacks}", ""
    return "", ""
