"""A recipe to transformers' TrainingArguments, with the micro batch and the dtype to train in."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import TrainingArguments

from skipwise.config.batch import accumulation, micro_batches
from skipwise.config.machine import available_memory, world_size
from skipwise.config.recipe import SHARDED_ENGINES, Recipe
from skipwise.config.run_folder import RunFolder, write_json
from skipwise.errors import SkipwiseError
from skipwise.models.load import best_device, compute_dtype
from skipwise.models.prepared import PreparedModel
from skipwise.planning.gpus import Gpu
from skipwise.planning.job import read_model
from skipwise.planning.memory import GIB
from skipwise.planning.micro_batch import largest_micro_batch, with_micro_batch
from skipwise.training.checkpoints import trained_micro_batch
from skipwise.training.distributed.engines import engine_arguments, of_main_process, on_cpu

_OWNED = {
    "output_dir": "--out",
    "max_steps": "training.num_steps",
    "num_train_epochs": "training.num_steps",
    "per_device_train_batch_size": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "learning_rate": "training.learning_rate",
    "lr_scheduler_type": "training.lr_scheduler",
    "warmup_steps": "training.warmup_steps",
    "weight_decay": "training.weight_decay",
    "max_grad_norm": "training.max_grad_norm",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "activation_checkpointing": "training.gradient_checkpointing",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.save_total_limit",
    "logging_steps": "nothing: every step is logged",
    "seed": "seed",
    "bf16": "load.dtype",
    "fp16": "load.dtype",
    "remove_unused_columns": "nothing: the data set has no columns to remove",
    "label_smoothing_factor": "nothing: the loss is the model's own",
}


def training_arguments(
    recipe: Recipe,
    run: RunFolder,
    dtype: torch.dtype,
    engine: str = "one process",
    engine_options: dict[str, bool] | None = None,
) -> TrainingArguments:
    """The recipe as TrainingArguments, with its `trainer:` section on top.

    Args:
        engine_options: further arguments of `engine_arguments`.

    Raises:
        SkipwiseError: a key that Skipwise sets itself or that TrainingArguments does not have, or
            a global batch that the devices cannot share.
    """
    known = {f.name for f in fields(TrainingArguments)}
    for key in recipe.trainer:
        if key in _OWNED:
            raise SkipwiseError(f"trainer.{key} is set by {_OWNED[key]}")
        if key not in known:
            raise SkipwiseError(
                f"trainer.{key} is not an argument of transformers' TrainingArguments"
            )
    if engine == "zero3-offload" and "optim" in recipe.trainer:
        raise SkipwiseError(
            "trainer.optim: engine zero3-offload has its own optimizer, on the CPU\n"
            "leave it out, or type --engine zero3"
        )
    settings = recipe.training
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    values: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "max_steps": settings.num_steps,
        "per_device_train_batch_size": settings.micro_batch_size,
        "gradient_accumulation_steps": accumulation(settings, world_size()),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "save_steps": settings.save_steps,
        "save_total_limit": None,  # the Trainer removes by time; see checkpoints.remove_old
        "seed": recipe.seed,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": on_cpu(),
        "remove_unused_columns": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # the filter would hide a loss that is not finite
        "disable_tqdm": True,
        "log_level_replica": "error",
        "dataloader_pin_memory": not on_cpu(),
        "report_to": ["tensorboard"] if tensorboard else [],
        **engine_arguments(engine, on_cpu(), **(engine_options or {})),
    }
    try:
        return TrainingArguments(**{**values, **recipe.trainer})
    except (ValueError, ImportError, TypeError) as error:
        raise SkipwiseError(f"transformers refuses the training settings: {error}") from error


def resolve_micro_batch(
    prepared: PreparedModel, run: RunFolder, engine: str, dtype: torch.dtype
) -> tuple[PreparedModel, list[int]]:
    """The model with a number for `training.micro_batch_size: auto`.

    Returns:
        the model; the sizes to try before training. Those of a run that has tried, or trained, are
        its own and the smaller ones, the largest first.
    """
    settings, recipe = prepared.recipe.training, prepared.recipe
    if settings.micro_batch_size != "auto":
        return prepared, [settings.micro_batch_size]
    own = run.metadata().get("batch", {}).get("micro_batch_size") or trained_micro_batch(run)
    own, room = of_main_process((own, device_memory()))
    device = Gpu(
        name="", memory_gib=room, tflops=None, bf16=dtype == torch.bfloat16, is_cpu=on_cpu()
    )
    sizes = micro_batches(settings, world_size())
    if own is not None:
        sizes = [size for size in reversed(sizes) if size <= own] or [1]
        return replace(prepared, recipe=with_micro_batch(recipe, sizes[0])), sizes
    planned = recipe if engine in SHARDED_ENGINES else replace(recipe, engine="ddp")
    try:
        shape = read_model(recipe)
        size = largest_micro_batch(planned, *shape, device, world_size(), runtime=0)
    except SkipwiseError:  # a config from which the plan cannot count
        size = 1
    sizes = [one for one in sizes if one <= size]
    return replace(prepared, recipe=with_micro_batch(recipe, size)), sizes


def take_less(run: RunFolder, size: int) -> SkipwiseError:
    """Make the run take half the micro batch next time; any rank may write it. Says so."""
    batch = {"micro_batch_size": size // 2}
    write_json(run.path / "run.json", {**run.metadata(), "batch": batch})
    return SkipwiseError(
        f"out of memory with training.micro_batch_size {size}, which auto had chosen\n"
        f"type the same command again: it takes {size // 2}"
    )


def device_memory() -> float:
    """GiB that training can take on the device of this process."""
    if torch.cuda.is_available():
        device = best_device()
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return (free - torch.cuda.memory_allocated(device)) / GIB
    if torch.backends.mps.is_available():
        return torch.mps.recommended_max_memory() / GIB
    return available_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / GIB


def training_dtype(recipe: Recipe, engine: str) -> torch.dtype:
    """The dtype of the arithmetic: float32 under a sharding engine without a GPU.

    Raises:
        SkipwiseError: bfloat16 under such an engine, which transformers refuses.
    """
    if not (on_cpu() and engine in SHARDED_ENGINES):
        return compute_dtype(recipe.load)
    if recipe.load.dtype == "bfloat16":
        raise SkipwiseError(f"engine: {engine} computes in float32 on a CPU\nleave load.dtype out")
    return torch.float32
