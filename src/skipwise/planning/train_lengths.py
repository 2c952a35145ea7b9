"""Training lengths between PoSE and full length: memory, time and expected distance, equal tokens.

An example of M tokens has M real keys. A longer M is closer to full length and dearer. `plan` shows
the options in a table, and `train_length: auto` takes the closest one that the hardware, the
documents and `training.max_cost` allow.

Letters: L = original_length, M = train_length, T = target_length, f = T / L
Source:  distances.json, measured by research/study (`python research/study/dial.py --evidence`)
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from skipwise.config.batch import micro_batch
from skipwise.config.lengths import format_length
from skipwise.config.recipe import (
    DistillationSettings,
    FullLengthSettings,
    PositionSettings,
    Recipe,
)
from skipwise.config.samplers import resolve_auto
from skipwise.errors import SkipwiseError
from skipwise.models.model_info import ModelInfo
from skipwise.planning import flops
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import Gpu
from skipwise.planning.job import Job, make_job
from skipwise.planning.memory import (
    MARGIN,
    Memory,
    largest_micro_batch,
    predict_memory,
    with_micro_batch,
)


@dataclass(frozen=True, kw_only=True)
class LengthOption:
    """One training length, at as many tokens a step as the recipe has with examples of L tokens."""

    length: int  # M
    job: Job
    memory: Memory
    hours: float | None
    cost: float  # operations, as a multiple of those at M = L
    behind: float | None  # perplexity at T over that of full length, less 1; None: not measured
    evidence: str  # where `behind` is from
    obstacle: str  # why auto cannot take it; empty if it can


def with_train_length(
    recipe: Recipe, length: int, original_length: int, num_gpus: int = 1
) -> Recipe:
    """The recipe with examples of M tokens, and as many tokens in a step as with L.

    The batch is rounded down to what the GPUs can share. M = T is `method: full`.

    Raises:
        SkipwiseError: a step has fewer tokens than one example for each GPU.
    """
    L, training = original_length, recipe.training
    size = training.micro_batch_size
    each = 1 if size == "auto" else max(1, micro_batch(training) * L // length)
    unit = num_gpus * each
    batch = training.global_batch_size * L // length // unit * unit
    if not batch:
        raise SkipwiseError(
            f"training.global_batch_size: {training.global_batch_size} examples of {L:,} tokens "
            f"are fewer than {unit} of {length:,}\ntype a larger one"
        )
    size = size if size == "auto" else each
    training = dataclasses.replace(training, global_batch_size=batch, micro_batch_size=size)
    recipe = dataclasses.replace(recipe, train_length=length, training=training)
    if length < recipe.target_length:
        return recipe
    load = recipe.load
    if load.attn_implementation == "flex_attention":  # only for importance weights: none here
        load = dataclasses.replace(load, attn_implementation="auto")
    off = {"full_length": FullLengthSettings(), "distillation": DistillationSettings()}
    positions = PositionSettings()
    return resolve_auto(
        dataclasses.replace(recipe, method="full", positions=positions, load=load, **off)
    )


def length_options(
    recipe: Recipe, info: ModelInfo, architecture: Architecture, gpu: Gpu, num_gpus: int = 1
) -> list[LengthOption]:
    """L, its doublings below T, and T.

    Args:
        recipe: of `method: pose`; its own train_length does not matter.
    """
    L, T = info.original_length, recipe.target_length
    lengths = [L << i for i in range(64) if L << i < T]
    found: list[LengthOption] = []
    for M in [*lengths, T]:
        obstacle = ""
        try:
            sized = with_train_length(recipe, M, L, num_gpus)
        except SkipwiseError as error:  # planned with one example a GPU, told of equal tokens
            obstacle = str(error).partition("\n")[0]
            training = dataclasses.replace(
                recipe.training, global_batch_size=recipe.training.global_batch_size * M
            )
            more = dataclasses.replace(recipe, training=training)
            sized = with_train_length(more, M, L, num_gpus)
        shape = sized, info, architecture
        size = largest_micro_batch(*shape, gpu, num_gpus)
        job = make_job(with_micro_batch(sized, size), *shape[1:], num_gpus=num_gpus, gpu=gpu)
        memory = predict_memory(job)
        per_token = flops.step_flops(job) / job.tokens_per_step
        cheapest = found[0].job if found else job
        cost = per_token / (flops.step_flops(cheapest) / cheapest.tokens_per_step)
        tokens = recipe.training.global_batch_size * L
        hours = flops.hours(job, gpu)
        behind, evidence = expected_distance(M, L, T)
        if memory.gib > MARGIN * gpu.memory_gib:
            obstacle = f"needs {memory.gib:,.1f} GiB of {gpu.memory_gib:,.1f}"
        elif M > L and cost > recipe.training.max_cost:
            obstacle = f"costs {cost:.2f} times L, over training.max_cost {_number(recipe)}"
        elif M == T and recipe.full_length.fraction:
            obstacle = "full_length.fraction asks for skips before full length"
        found.append(
            LengthOption(
                length=M,
                job=job,
                memory=memory,
                hours=None if hours is None else hours * tokens / job.tokens_per_step,
                cost=cost,
                behind=behind,
                evidence=evidence,
                obstacle=obstacle,
            )
        )
    return found


def choose_length(
    options: list[LengthOption], obstacle: Callable[[int], str] = lambda length: ""
) -> tuple[LengthOption, str]:
    """The option that is expected to be closest to full length, and one line that says why.

    L is always possible. A length whose distance was not measured is not taken.

    Args:
        obstacle: why the documents do not allow examples of M tokens; empty if they do.
    """
    first, *others = options
    reasons: dict[int, str] = {}
    best = first
    for option in others:
        why = option.obstacle or obstacle(option.length)
        if not why and option.behind is None:
            why = "was not measured at this factor"
        if why:
            reasons[option.length] = why
        elif best.behind is None or (option.behind or 0.0) < best.behind:
            best = option
    line = f"{best.length:,} tokens"
    if best.behind is not None:
        line += f", {describe_distance(best.behind)}"
        line += f" ({best.evidence})" if best.evidence else ""
    if best.cost > 1.005:
        line += f", at {best.cost:.2f} times the time of {first.length:,}"
    closer = [n for n in reasons if n > best.length]
    if closer:
        line += f"; {closer[0]:,} {reasons[closer[0]]}"
    return best, line


def describe_distance(behind: float) -> str:
    if behind == 0:
        return "full length"
    way = "behind" if behind > 0 else "ahead of"
    return f"{100 * abs(behind):.1f} % {way} full length"


@cache
def _distances() -> dict[tuple[float, float], tuple[float, str]]:
    """(f, M / L) -> (distance, evidence)"""
    file = Path(__file__).with_name("distances.json")
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {
        (row["factor"], row["lengths"]): (row["behind"], f"measured, {_seeds(row['seeds'])}")
        for row in rows
    }


def expected_distance(
    length: int, original_length: int, target_length: int
) -> tuple[float | None, str]:
    """How far perplexity at T is expected behind full length, and the evidence; None if unknown.

    A factor between two that were measured at the same M / L is interpolated in log f. Nothing is
    extrapolated.
    """
    f, multiple = target_length / original_length, length / original_length
    if length >= target_length:
        return 0.0, ""
    known = {n: value for (n, m), value in _distances().items() if m == multiple}
    if f in known:
        return known[f]
    below, above = [n for n in known if n < f], [n for n in known if n > f]
    if not below or not above:
        return None, ""
    low, high = max(below), min(above)
    part = math.log(f / low) / math.log(high / low)
    value = known[low][0] + part * (known[high][0] - known[low][0])
    return value, f"between f = {low:g} and {high:g}"


def _seeds(count: int) -> str:
    return f"{count} seed{'s' * (count != 1)}"


def _number(recipe: Recipe) -> str:
    return f"{recipe.training.max_cost:g}"


def describe_length(length: int, target_length: int) -> str:
    return "full length" if length >= target_length else f"PoSE, {format_length(length)}"
