"""A recipe to transformers' TrainingArguments, and the dtype to train in."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from typing import Any

import torch
from transformers import TrainingArguments

from skipwise.config.batch import accumulation
from skipwise.config.machine import world_size
from skipwise.config.recipe import SHARDED_ENGINES, Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.models.load import compute_dtype
from skipwise.training.distributed.engines import engine_arguments, on_cpu

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
