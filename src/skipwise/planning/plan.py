"""A recipe to a plan: what the run will hold, cost and need, from a config alone."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from skipwise.config.recipe import (
    DistillationSettings,
    FullLengthSettings,
    PositionSettings,
    Recipe,
    context_lengths,
)
from skipwise.config.samplers import resolve_auto
from skipwise.errors import SkipwiseError
from skipwise.models.model_info import ModelInfo
from skipwise.planning import flops
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import GPUS, UTILISATION, Gpu
from skipwise.planning.job import KNOWN_OPTIMIZERS, Job, make_job, make_jobs, read_model
from skipwise.planning.memory import GIB, Memory, fits, predict_memory
from skipwise.planning.remedies import first_change


@dataclass(frozen=True, kw_only=True)
class OnGpu:
    """The run on one kind of GPU."""

    gpu: Gpu
    memory: Memory
    fits: bool
    hours: float
    change: str | None  # what to type to make it fit; "": nothing; None: nothing is enough


@dataclass(frozen=True, kw_only=True)
class Side:
    """The run or its finish, or the full-length run beside it."""

    name: str
    job: Job
    examples_per_step: float
    memory: Memory
    flops_per_step: float

    @property
    def tokens_per_step(self) -> float:
        return self.examples_per_step * self.job.length


@dataclass(frozen=True, kw_only=True)
class Plan:
    recipe: Recipe
    info: ModelInfo
    architecture: Architecture
    job: Job
    memory: Memory
    sides: tuple[Side, ...]  # the run; full length at as many examples, at as many tokens
    finish: Side | None  # the run's last part, where it has one
    gpus: tuple[OnGpu, ...]
    lengths: tuple[int, ...]  # of the evaluation
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a few steps took (measure.py)."""

    on_cpu: bool
    device: str
    runtime_bytes: int  # resident before the model is there; of a GPU 0
    peak_bytes: int  # resident memory of the process, or what a GPU's allocator handed out
    seconds_per_step: float  # of the recipe's global batch
    tokens_per_second: float


def make_plan(recipe: Recipe, *, num_gpus: int = 1, gpu: Gpu | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        gpu: the only kind to look at; None: all of the table.

    Raises:
        SkipwiseError: the model cannot be extended so, the batch cannot be shared, no training.
    """
    if num_gpus < 1:
        raise SkipwiseError("--gpus: 1 or more")
    if recipe.training.num_steps < 1:
        raise SkipwiseError("training.num_steps is 0: there is nothing to plan")
    info, architecture = read_model(recipe)
    recipe = resolve_auto(recipe)
    job, last = make_jobs(recipe, info, architecture, num_gpus=num_gpus, gpu=gpu)
    memory = predict_memory(job)
    rows = []
    for one in (gpu,) if gpu else GPUS:
        parts = make_jobs(recipe, info, architecture, num_gpus=num_gpus, gpu=one)
        its = [part for part in parts if part]
        found = max((predict_memory(part) for part in its), key=lambda m: m.total)
        rows.append(
            OnGpu(
                gpu=one,
                memory=found,
                fits=fits(found, one),
                hours=sum(flops.hours(part, one) for part in its),
                change=first_change(recipe, info, architecture, one, num_gpus),
            )
        )
    return Plan(
        recipe=recipe,
        info=info,
        architecture=architecture,
        job=job,
        memory=memory,
        sides=_sides(recipe, info, job, memory, num_gpus, gpu),
        finish=None if last is None else _side("its finish", last),
        gpus=tuple(rows),
        lengths=context_lengths(recipe, info.original_length),
        notes=_notes(recipe, architecture, job),
    )


def _sides(
    recipe: Recipe,
    info: ModelInfo,
    job: Job,
    memory: Memory,
    num_gpus: int,
    gpu: Gpu | None,
) -> tuple[Side, ...]:
    own = _side(recipe.method, job, memory)
    if recipe.method == "full":
        return (own,)
    full = dataclasses.replace(
        recipe,
        method="full",
        train_length=None,
        positions=PositionSettings(),
        full_length=FullLengthSettings(),
        distillation=DistillationSettings(weight=0.0),
    )
    long = make_job(full, info, job.architecture, num_gpus=num_gpus, gpu=gpu)
    same = _side("full, same examples", long)
    fewer = job.length / long.length
    return (
        own,
        same,
        dataclasses.replace(
            same,
            name="full, same tokens",
            examples_per_step=same.examples_per_step * fewer,
            flops_per_step=same.flops_per_step * fewer,
        ),
    )


def _side(name: str, job: Job, memory: Memory | None = None) -> Side:
    return Side(
        name=name,
        job=job,
        examples_per_step=job.global_batch_size,
        memory=memory or predict_memory(job),
        flops_per_step=flops.step_flops(job),
    )


def _notes(recipe: Recipe, architecture: Architecture, job: Job) -> tuple[str, ...]:
    found = []
    if not architecture.exact:
        found.append(
            f"{architecture.family} is counted like a Llama of its sizes: parameters and all that "
            "follows are an estimate"
        )
    if architecture.num_experts:
        found.append("memory and time of experts depend on their kernels: an estimate")
    if job.optimizer not in KNOWN_OPTIMIZERS:
        found.append(f"trainer.optim {job.optimizer} is taken for AdamW: 8 bytes a trained number")
    if recipe.load.dtype == "auto" and not job.bf16:
        found.append("this GPU has no bf16: the arithmetic is float32")
    return tuple(found)


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan for other programs; sizes in bytes unless a key says otherwise."""
    a, job = plan.architecture, plan.job
    return {
        "family": a.family,
        "counts_are_exact": a.exact,
        "original_length": plan.info.original_length,
        "train_length": job.length,
        "target_length": plan.recipe.target_length,
        "method": plan.recipe.method,
        "engine": job.engine,
        "num_gpus": job.num_gpus,
        "parameters": {
            "total": a.num_parameters,
            "embedding": a.embedding,
            "layers": a.layer_parameters,
            "head": a.head,
            "active": a.active_parameters,
            "trainable": job.trainable_parameters,
        },
        "memory": {
            "phase": plan.memory.phase,
            "total": plan.memory.total,
            "parts": plan.memory.parts,
            "host": plan.memory.host,
        },
        "evaluation": [
            {
                "context_length": length,
                "cache": flops.cache_bytes(a, length),
                "peak": flops.evaluation_bytes(a, length),
            }
            for length in plan.lengths
        ],
        "training": [
            {
                "name": side.name,
                "length": side.job.length,
                "examples_per_step": side.examples_per_step,
                "tokens_per_step": side.tokens_per_step,
                "flops_per_step": side.flops_per_step,
                "num_steps": side.job.num_steps,
                "memory": side.memory.total,
            }
            for side in (*plan.sides, *([plan.finish] if plan.finish else []))
        ],
        "num_steps": job.num_steps,
        "num_tokens": job.num_steps * job.tokens_per_step,
        "utilisation": UTILISATION,
        "gpus": [
            {
                "name": row.gpu.name,
                "memory_gib": row.gpu.memory_gib,
                "needs_gib": row.memory.total / GIB,
                "fits": row.fits,
                "hours": row.hours,
                "change": row.change,
            }
            for row in plan.gpus
        ],
        "notes": list(plan.notes),
    }
