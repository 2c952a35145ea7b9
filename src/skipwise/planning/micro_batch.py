"""`training.micro_batch_size: auto`: the largest micro batch whose predicted memory fits.

Training tries real passes of the sizes up to it and takes the fastest (training/setup.py).
"""

from __future__ import annotations

import dataclasses

from skipwise.config.batch import micro_batches
from skipwise.config.recipe import Recipe
from skipwise.config.stages import first_stage
from skipwise.models.model_info import ModelInfo
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import Gpu
from skipwise.planning.job import make_job
from skipwise.planning.memory import GIB, predict_memory

_ENOUGH = 32_768  # tokens in a pass that keep any device busy
MARGIN = 0.90  # fraction of the memory to fill: docs/scaling.md has the plan's accuracy


def with_micro_batch(recipe: Recipe, size: int) -> Recipe:
    training = dataclasses.replace(recipe.training, micro_batch_size=size)
    return dataclasses.replace(recipe, training=training)


def largest_micro_batch(
    recipe: Recipe,
    info: ModelInfo,
    architecture: Architecture,
    gpu: Gpu,
    num_gpus: int = 1,
    runtime: float | None = None,
) -> int:
    """The largest size for `auto` that fits with a margin, at least 1; else the recipe's size.

    Args:
        runtime: see `predict_memory`.
    """
    recipe, (best, *more) = first_stage(recipe), micro_batches(recipe.training, num_gpus)
    for size in more:
        sized = with_micro_batch(recipe, size)
        job = make_job(sized, info, architecture, num_gpus=num_gpus, gpu=gpu)
        needed = predict_memory(job, runtime=runtime).total
        if needed > MARGIN * gpu.memory_gib * GIB or job.tokens > _ENOUGH:
            break
        best = size
    return best
