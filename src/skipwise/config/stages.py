"""A recipe to the two trainings it may consist of: skipping positions at L, then a finish at T.

The finish takes its share out of `training.num_steps`, so that a run with it reads as many tokens
as one without. Each part is a recipe of its own: what trains, plans and explains a failure takes it
like any other.

Letters: L = train_length, T = target_length, G = examples of a step, P = processes that train
"""

from __future__ import annotations

import dataclasses
import math

from skipwise.config.lengths import format_length
from skipwise.config.recipe import (
    DistillationSettings,
    FullLengthSettings,
    PositionSettings,
    Recipe,
)
from skipwise.config.samplers import resolve_auto
from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import SAMPLERS


def is_full_length_stage(recipe: Recipe) -> bool:
    """Whether this is the recipe of a finish, which `full_length_stage` has made."""
    return recipe.method == "full" and recipe.full_length.fraction > 0


def first_stage(recipe: Recipe) -> Recipe:
    """The recipe of what comes before the finish; without a finish the recipe itself.

    Raises:
        SkipwiseError: a share that leaves no step, or that the method cannot have.
    """
    _check(recipe)
    if not recipe.full_length.fraction:
        return recipe
    steps = recipe.training.num_steps - _steps_taken(recipe)
    if steps < 1:
        raise SkipwiseError(
            f"full_length.fraction: {recipe.full_length.fraction:g} of "
            f"{recipe.training.num_steps} steps leaves none before it\n"
            "type a smaller fraction, or method=full for full-length training alone"
        )
    return dataclasses.replace(
        recipe,
        full_length=FullLengthSettings(),
        training=dataclasses.replace(recipe.training, num_steps=steps),
    )


def full_length_stage(
    recipe: Recipe,
    original_length: int,
    num_processes: int = 1,
    batch: int | None = None,
) -> Recipe | None:
    """The recipe of the finish: full length, its steps, batch and rate; None: there is none.

    A step has about the tokens of a step before it: G = G_0 L / T examples, one a device at a time,
    a multiple of P. The optimizer is new, so the rate warms up again, for as many tokens as
    before but a tenth of the steps at most, and then falls linearly to 0.

    Args:
        batch: G of a finish that was begun; None: as said.

    Raises:
        SkipwiseError: the share's tokens are no step of one example a process; it says which share
            would be. The processes cannot share the batch of a finish that was begun.
    """
    _check(recipe)
    if not recipe.full_length.fraction:
        return None
    training, P = recipe.training, num_processes
    L, T = recipe.train_length or original_length, recipe.target_length
    per_step = training.global_batch_size * L
    tokens = _steps_taken(recipe) * per_step
    if tokens < P * T:
        raise SkipwiseError(_too_small(recipe, math.ceil(P * T / per_step), P))
    if batch is not None and batch % P:
        able = ", ".join(str(n) for n in range(batch, 0, -1) if batch % n == 0)
        raise SkipwiseError(
            f"the finish was begun with batches of {batch} examples, which {P} processes cannot "
            f"share\ngo on with one of these: {able}"
        )
    G = batch or max(P, min(per_step, tokens) // T // P * P)
    steps = max(1, round(tokens / (G * T)))
    warmup = math.ceil(training.warmup_steps * steps / training.num_steps)
    rate = recipe.full_length.learning_rate
    taught = not SAMPLERS[recipe.method].is_baseline or recipe.distillation.weight != "auto"
    attention = recipe.load.attn_implementation
    if attention == "flex_attention":  # for importance weights, which there are none of
        attention = "auto"
    part = dataclasses.replace(
        recipe,
        method="full",
        train_length=T,
        positions=PositionSettings(),
        load=dataclasses.replace(recipe.load, attn_implementation=attention),
        distillation=recipe.distillation if taught else DistillationSettings(weight=0.0),
        training=dataclasses.replace(
            training,
            num_steps=steps,
            global_batch_size=G,
            micro_batch_size=1,
            learning_rate=training.learning_rate / 3 if rate is None else rate,
            warmup_steps=min(warmup, steps // 10),
            lr_scheduler="linear",
            save_steps=max(1, round(training.save_steps * per_step / (G * T))),  # tokens between
        ),
        trainer={k: v for k, v in recipe.trainer.items() if k != "lr_scheduler_kwargs"},
    )
    return resolve_auto(part)


def _steps_taken(recipe: Recipe) -> int:
    """Steps of training that the finish has the tokens of."""
    steps = recipe.training.num_steps
    return steps - round(steps * (1 - recipe.full_length.fraction))


def _check(recipe: Recipe) -> None:
    share = recipe.full_length.fraction
    if share >= 1:
        raise SkipwiseError(f"full_length.fraction is {share:g}: give a share of training, 0 .. 1")
    if share and recipe.method in ("full", "none"):
        reason = "is at full length already" if recipe.method == "full" else "trains nothing"
        raise SkipwiseError(
            f"full_length.fraction: {share:g} does not take effect: method: {recipe.method} "
            f"{reason}\n"
            "leave one of them out"
        )
    if not share and recipe.full_length != FullLengthSettings():
        raise SkipwiseError(
            "full_length.learning_rate does not take effect with full_length.fraction: 0\n"
            "type full_length.fraction=0.1, or full_length={}"
        )


def _too_small(recipe: Recipe, steps: int, num_processes: int) -> str:
    """What to type; `steps` of training have the tokens of one step of the finish."""
    num_steps, T = recipe.training.num_steps, recipe.target_length
    examples = "an example" if num_processes == 1 else f"{num_processes} examples, one a process,"
    mend = f"type training.num_steps={10 * steps} or more, for a share of 0.1"
    if steps < num_steps:
        share = math.ceil(1000 * steps / num_steps) / 1000
        mend = f"type full_length.fraction={share:g} or more, or a larger training.num_steps"
    return (
        f"full_length.fraction: {recipe.full_length.fraction:g} of {num_steps} steps has fewer "
        f"tokens than {examples} of {format_length(T)}\n{mend}"
    )
