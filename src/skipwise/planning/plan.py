"""Plan a run from its recipe and the model's config: memory, operations, hours, which GPU."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from skipwise.config import recipe as recipes
from skipwise.config.recipe import Recipe
from skipwise.config.samplers import resolve_auto
from skipwise.errors import SkipwiseError
from skipwise.models.model_info import ModelInfo
from skipwise.planning import flops
from skipwise.planning.architecture import Architecture
from skipwise.planning.gpus import UTILISATION, Gpu, common_gpus, find_gpu
from skipwise.planning.job import KNOWN_OPTIMIZERS, Job, make_job, make_jobs, read_model
from skipwise.planning.memory import (
    GIB,
    Memory,
    fits,
    largest_micro_batch,
    predict_memory,
    with_micro_batch,
)
from skipwise.planning.remedies import first_change
from skipwise.planning.train_lengths import (
    LengthOption,
    choose_length,
    length_options,
    with_train_length,
)

_USUAL = "A100-80GB"  # the GPU of figures that are of one, where none is named


@dataclass(frozen=True, kw_only=True)
class GpuFit:
    """The run on one model of GPU."""

    gpu: Gpu
    micro_batch_size: int
    memory: Memory
    fits: bool
    hours: float | None  # None if the GPU's rate is not known
    change: str | None  # what to type to make it fit: empty if it fits, None if nothing helps


@dataclass(frozen=True, kw_only=True)
class TrainingCost:
    """One column of the plan: a stage of the run, or a full-length run to compare with."""

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
    costs: tuple[TrainingCost, ...]  # first stage; full length with as many examples, or tokens
    full_length: TrainingCost | None  # the full-length stage, if the recipe has one
    gpus: tuple[GpuFit, ...]
    lengths: tuple[int, ...]  # context lengths of the evaluation
    options: tuple[LengthOption, ...]  # training lengths; none for baselines
    options_gpu: Gpu | None  # that they are planned for
    choice: tuple[int, str] | None  # the length that `train_length: auto` takes, and why
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The measurements of a few training steps (pipeline/profile.py)."""

    on_cpu: bool
    device: str
    runtime_bytes: int  # resident memory before the model is loaded; 0 on a GPU
    peak_bytes: int  # resident memory of the process, or allocated memory of the GPU
    seconds_per_step: float  # with the recipe's global batch
    tokens_per_second: float


def make_plan(
    recipe: Recipe, *, num_gpus: int = 1, gpu: Gpu | None = None, cpu: Gpu | None = None
) -> Plan:
    """Make the plan of a recipe.

    Args:
        gpu: the GPU to plan for. Defaults to the common ones, with a micro batch of 1 for `auto` in
            the figures that are of no GPU in particular.
        cpu: the CPU of this machine, if it is to be in the table too.

    Raises:
        SkipwiseError: the recipe cannot extend the model, or does not train, or its batch does not
            divide evenly.
    """
    if num_gpus < 1:
        raise SkipwiseError(f"--gpus is {num_gpus}: give 1 or more")
    info, architecture = read_model(recipe)
    recipe = resolve_auto(recipe)
    options, options_gpu, choice = [], gpu or find_gpu(_USUAL), None
    if recipe.method == "pose":
        options = length_options(recipe, info, architecture, options_gpu, num_gpus)
        chosen, why = choose_length(options)
        choice = chosen.length, why
        if recipe.train_length == "auto":
            recipe = with_train_length(recipe, chosen.length, info.original_length, num_gpus)
    shape = recipe, info, architecture
    job, last = _sized_jobs(*shape, num_gpus, gpu)
    memory = predict_memory(job)
    rows = []
    for one in (gpu,) if gpu else (*common_gpus(), *([cpu] if cpu else [])):
        first, long = _sized_jobs(*shape, num_gpus, one)
        stages = [stage for stage in (first, long) if stage]
        most = max((predict_memory(stage) for stage in stages), key=lambda m: m.total)
        hours = [flops.hours(stage, one) for stage in stages]
        row = GpuFit(
            gpu=one,
            micro_batch_size=first.batch_size,
            memory=most,
            fits=fits(most, one),
            hours=None if None in hours else sum(h for h in hours if h),
            change=first_change(*shape, one, num_gpus),
        )
        rows.append(row)
    return Plan(
        recipe=recipe,
        info=info,
        architecture=architecture,
        job=job,
        memory=memory,
        costs=_costs(recipe, info, job, memory, num_gpus, gpu),
        full_length=None if last is None else _cost("full-length stage", last),
        gpus=tuple(rows),
        lengths=recipes.context_lengths(recipe, info.original_length),
        options=tuple(options),
        options_gpu=options_gpu if options else None,
        choice=choice,
        notes=_notes(recipe, architecture, job),
    )


def _sized_jobs(
    recipe: Recipe, info: ModelInfo, architecture: Architecture, num_gpus: int, gpu: Gpu | None
) -> tuple[Job, Job | None]:
    """The jobs of the stages, with the micro batch that `auto` becomes on this GPU."""
    if gpu is not None:
        size = largest_micro_batch(recipe, info, architecture, gpu, num_gpus)
        recipe = with_micro_batch(recipe, size)
    return make_jobs(recipe, info, architecture, num_gpus=num_gpus, gpu=gpu)


def _costs(
    recipe: Recipe, info: ModelInfo, job: Job, memory: Memory, num_gpus: int, gpu: Gpu | None
) -> tuple[TrainingCost, ...]:
    own = _cost(recipe.method, job, memory)
    if recipe.method == "full":
        return (own,)
    full = dataclasses.replace(
        recipe,
        method="full",
        train_length=None,
        positions=recipes.PositionSettings(),
        full_length=recipes.FullLengthSettings(),
        distillation=recipes.DistillationSettings(weight=0.0),
    )
    long = make_job(full, info, job.architecture, num_gpus=num_gpus, gpu=gpu)
    same_examples = _cost("full, same examples", long)
    ratio = job.length / long.length
    same_tokens = dataclasses.replace(
        same_examples,
        name="full, same tokens",
        examples_per_step=same_examples.examples_per_step * ratio,
        flops_per_step=same_examples.flops_per_step * ratio,
    )
    return own, same_examples, same_tokens


def _cost(name: str, job: Job, memory: Memory | None = None) -> TrainingCost:
    return TrainingCost(
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
            f"{architecture.family} is counted like a Llama of the same size, so all figures are "
            "estimates"
        )
    if architecture.num_experts:
        found.append("memory and time of experts are estimates: they depend on the kernels")
    if job.optimizer not in KNOWN_OPTIMIZERS:
        found.append(f"trainer.optim={job.optimizer} is unknown and counted like AdamW")
    if recipe.load.dtype == "auto" and not job.bf16:
        where = "CPU" if job.on_cpu else "GPU"
        found.append(f"this {where} has no bf16, so training computes in float32")
    return tuple(found)


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """The plan for `--json`; sizes are in bytes unless the key says otherwise."""
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
        "memory": {key: getattr(plan.memory, key) for key in ("phase", "total", "parts", "host")},
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
                "name": cost.name,
                "length": cost.job.length,
                "examples_per_step": cost.examples_per_step,
                "tokens_per_step": cost.tokens_per_step,
                "flops_per_step": cost.flops_per_step,
                "num_steps": cost.job.num_steps,
                "memory": cost.memory.total,
            }
            for cost in (*plan.costs, *([plan.full_length] if plan.full_length else []))
        ],
        "train_lengths": [
            {
                "train_length": option.length,
                "memory": option.memory.total,
                "hours": option.hours,
                "relative_time": option.cost,
                "behind_full_length": option.behind,
                "evidence": option.evidence,
                "obstacle": option.obstacle,
                "auto": plan.choice is not None and option.length == plan.choice[0],
            }
            for option in plan.options
        ],
        "num_steps": job.num_steps,
        "num_tokens": job.num_steps * job.tokens_per_step,
        "utilisation": UTILISATION,
        "gpus": [
            {
                "name": row.gpu.name,
                "memory_gib": row.gpu.memory_gib,
                "micro_batch_size": row.micro_batch_size,
                "needs_gib": row.memory.total / GIB,
                "fits": row.fits,
                "hours": row.hours,
                "change": row.change,
            }
            for row in plan.gpus
        ],
        "notes": list(plan.notes),
    }
