"""Split a recipe into its training stages: skipped positions at M, then full length at T.

The full-length stage takes a fraction of `training.num_steps`, so the total number of tokens does
not change. Each stage is an ordinary recipe: training, planning and error hints need no special
case for it.

Letters: M = train_length, T = target_length, G = examples per step, P = training processes
"""

from __future__ import annotations

import dataclasses
import math

from skipwise.config.lengths import format_length
from skipwise.config.recipe import FullLengthSettings, PositionSettings, Recipe
from skipwise.config.samplers import example_length, resolve_auto
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import SAMPLERS


def is_full_length_stage(recipe: Recipe) -> bool:
    """Whether `full_length_stage` made this recipe."""
    return recipe.method == "full" and recipe.full_length.fraction > 0


def first_stage(recipe: Recipe) -> Recipe:
    """The stage before the full-length stage, or the recipe itself if it has no such stage.

    Raises:
        SkipwiseError: the fraction leaves no step, or does not apply to the method.
    """
    _check(recipe)
    if not recipe.full_length.fraction:
        return recipe
    steps = recipe.training.num_steps - _steps_taken(recipe)
    if steps < 1:
        raise SkipwiseError(
            f"full_length.fraction: {recipe.full_length.fraction:g} of "
            f"{recipe.training.num_steps} steps leaves none for the first stage\n"
            "type a smaller fraction, or method=full for full-length training alone"
        )
    return dataclasses.replace(
        recipe,
        full_length=FullLengthSettings(),
        training=dataclasses.replace(recipe.training, num_steps=steps),
    )


def full_length_stage(
    recipe: Recipe, original_length: int, num_processes: int = 1, batch: int | None = None
) -> Recipe | None:
    """The full-length stage: its length, steps, batch size and learning rate. None if unused.

    A step has about as many tokens as in the first stage: G = G_0 M / T examples, rounded down to
    a multiple of P, with a micro-batch of 1. The optimizer is new, so the learning rate warms up
    again, for as many tokens as before but at most a tenth of the steps, then decays linearly to 0.

    Args:
        batch: G of a stage that already started. Computed by default.

    Raises:
        SkipwiseError: the fraction is less than one step with one example per process (the message
            names one that is enough), or P does not divide the batch of a stage that started.
    """
    _check(recipe)
    if not recipe.full_length.fraction:
        return None
    training, P = recipe.training, num_processes
    M, T = example_length(recipe, original_length), recipe.target_length
    per_step = training.global_batch_size * M
    tokens = _steps_taken(recipe) * per_step
    if tokens < P * T:
        raise SkipwiseError(_too_small(recipe, math.ceil(P * T / per_step), P))
    if batch is not None and batch % P:
        able = ", ".join(str(n) for n in range(batch, 0, -1) if batch % n == 0)
        raise SkipwiseError(
            f"the full-length stage started with batches of {batch} examples, which {P} processes "
            f"cannot divide evenly\nuse one of these numbers of processes: {able}"
        )
    G = batch or max(P, min(per_step, tokens) // T // P * P)
    steps = max(1, round(tokens / (G * T)))
    warmup = math.ceil(training.warmup_steps * steps / training.num_steps)
    rate = recipe.full_length.learning_rate
    load, distillation = recipe.load, recipe.distillation
    if load.attn_implementation == "flex_attention":  # only for importance weights: none here
        load = dataclasses.replace(load, attn_implementation="auto")
    untaught = SAMPLERS[recipe.method].is_baseline or 2 * original_length <= M
    if untaught and distillation.weight == "auto":
        distillation = dataclasses.replace(distillation, weight=0.0)
    part = dataclasses.replace(
        recipe,
        method="full",
        train_length=T,
        positions=PositionSettings(),
        load=load,
        distillation=distillation,
        training=dataclasses.replace(
            training,
            num_steps=steps,
            global_batch_size=G,
            micro_batch_size=1,
            learning_rate=training.learning_rate / 3 if rate is None else rate,
            warmup_steps=min(warmup, steps // 10),
            lr_scheduler="linear",
            save_steps=max(1, round(training.save_steps * per_step / (G * T))),  # as many tokens
        ),
        trainer={k: v for k, v in recipe.trainer.items() if k != "lr_scheduler_kwargs"},
    )
    return resolve_auto(part)


def _steps_taken(recipe: Recipe) -> int:
    """Steps of the first stage that the full-length stage replaces."""
    steps = recipe.training.num_steps
    return steps - round(steps * (1 - recipe.full_length.fraction))


def _check(recipe: Recipe) -> None:
    share = recipe.full_length.fraction
    if share and recipe.method in ("full", "none"):
        reason = "is at full length already" if recipe.method == "full" else "trains nothing"
        raise SkipwiseError(
            f"full_length.fraction: {share:g} does not take effect: method: {recipe.method} "
            f"{reason}\nleave one of them out"
        )
    if not share and recipe.full_length != FullLengthSettings():
        raise SkipwiseError(
            "full_length.learning_rate does not take effect with full_length.fraction: 0\n"
            "type full_length.fraction=0.1, or full_length={}"
        )


def _too_small(recipe: Recipe, steps: int, num_processes: int) -> str:
    """The error message; `steps` steps of the first stage have as many tokens as one at T."""
    num_steps, T = recipe.training.num_steps, recipe.target_length
    examples = "an example" if num_processes == 1 else f"{num_processes} examples (one a process)"
    fix = f"type training.num_steps={10 * steps} or more, which allows a fraction of 0.1"
    if steps < num_steps:
        fraction = math.ceil(1000 * steps / num_steps) / 1000
        fix = f"type full_length.fraction={fraction:g} or more, or a larger training.num_steps"
    return (
        f"full_length.fraction: {recipe.full_length.fraction:g} of {num_steps} steps has fewer "
        f"tokens than {examples} of {format_length(T)}\n{fix}"
    )
