"""One estimate of a run before its first long phase: the plan's operations at a measured rate.

The rate is that of the pass that was timed before training (training/setup.py). Where none was
timed, as under an engine that shards, there is no estimate.
"""

from __future__ import annotations

import dataclasses
import sys

from skipwise.config.machine import world_size
from skipwise.config.progress import format_time
from skipwise.config.recipe import Recipe, context_lengths
from skipwise.config.run_folder import RunFolder
from skipwise.evaluation.evaluator import find_tasks
from skipwise.planning.flops import step_flops
from skipwise.planning.job import Job, make_jobs, read_model
from skipwise.planning.memory import with_micro_batch


def estimate_run(recipe: Recipe, run: RunFolder, num_processes: int = 0) -> None:
    """Print what training and evaluation will take, and write it to run.json."""
    batch = run.metadata().get("batch", {})
    if "tried" not in batch or "estimate" in run.metadata():
        return
    size, processes = batch["micro_batch_size"], num_processes or world_size()
    shape = read_model(recipe)
    first, last = make_jobs(with_micro_batch(recipe, size), *shape, num_gpus=processes)
    per_example = batch["tried"][str(size)]
    rate = step_flops(first) / first.global_batch_size / per_example  # of a process
    training = first.num_steps * first.global_batch_size * per_example / processes
    if last is not None:
        training += last.num_steps * step_flops(last) / rate / processes
    operations = _evaluation_flops(recipe, first, shape[0].original_length)
    seconds = {"training": round(training, 1), "evaluation": round(operations / rate, 1)}
    run.update(estimate=seconds)
    parts = ", ".join(f"{name} {format_time(value)}" for name, value in seconds.items())
    total = format_time(sum(seconds.values()))
    print(f"about {total} on this machine: {parts}", file=sys.stderr, flush=True)


def compare_estimate(run: RunFolder) -> None:
    """Write to run.json what the estimated phases took. A stage that was resumed counts in part."""
    metadata = run.metadata()
    if "estimate" not in metadata:
        return
    stages = metadata.get("stages", {})
    trained = [metadata.get(key, {}).get("seconds") or 0.0 for key in ("training", "finish")]
    evaluated = [stages.get(f"evaluate {when}", 0.0) for when in ("before", "after")]
    took = {"training": round(sum(trained), 1), "evaluation": round(sum(evaluated), 1)}
    run.update(estimate={**metadata["estimate"], "took": took})


def _evaluation_flops(recipe: Recipe, job: Job, original_length: int) -> float:
    """Forward operations of all tasks, at all lengths, on the base, the untrained and the result.

    Prompts that share a haystack are counted once. Tasks of lm-eval are left out: their prompts
    are not known yet.
    """
    settings, total = recipe.eval, 0.0
    plain = dataclasses.replace(
        job, lora=None, checkpointing=False, chunked=False, importance=False, distilled_fraction=0.0
    )
    for length in context_lengths(recipe, original_length):
        tokens = 0.0
        for task in find_tasks(settings.tasks):
            count = task.num_samples(settings) or 0
            shared = settings.needles_per_haystack if task.name == "needle" else 1
            tokens += count * length / shared if task.lengths != "none" else 0
        one = dataclasses.replace(plain, length=length)
        total += tokens * step_flops(one) / one.tokens_per_step / 3  # forward alone
    return total * (3 if settings.untrained else 2)
