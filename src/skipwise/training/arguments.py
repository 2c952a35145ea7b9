"""A recipe to transformers' TrainingArguments, with the micro batch and the dtype to train in."""

from __future__ import annotations

import importlib.util
import re
import typing
from dataclasses import fields, replace
from typing import Any

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import integration_utils
from transformers.training_args import trainer_log_levels
from transformers.utils.import_utils import is_liger_kernel_available

from skipwise.config.batch import accumulation, micro_batch, micro_batches
from skipwise.config.machine import available_memory, of_launcher, world_size
from skipwise.config.parse import scalar
from skipwise.config.recipe import SHARDED_ENGINES, Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError, did_you_mean, install
from skipwise.models.load import best_device, compute_dtype
from skipwise.models.lora import quantization_for
from skipwise.models.prepared import PreparedModel
from skipwise.planning.gpus import Gpu
from skipwise.planning.job import read_model
from skipwise.planning.memory import GIB, largest_micro_batch, with_micro_batch
from skipwise.training.checkpoints import trained_micro_batch
from skipwise.training.distributed.engines import (
    check_deepspeed,
    engine_arguments,
    of_main_process,
    on_cpu,
)

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
    "logging_strategy": "nothing: every step is logged",
    "save_strategy": "training.save_steps",
    "eval_strategy": "nothing: eval.tasks are measured before and after training",
    "load_best_model_at_end": "export.checkpoint",
    "resume_from_checkpoint": "nothing: the same command resumes a run",
    "save_only_model": "nothing: a checkpoint without its optimizer resumes to other weights",
    "ignore_data_skip": "nothing: a resumed run goes on where it was in the data",
    "logging_nan_inf_filter": "nothing: a loss that is not finite stops the run",
    "eval_on_start": "nothing: eval.tasks are measured before and after training",
}
_MOST = {"adam_epsilon": 0.1, "dataloader_num_workers": 4096, "neftune_noise_alpha": 1e4}
_REFUSALS = (ValueError, ImportError, TypeError, KeyError, AttributeError)


class _Unstarted(TrainingArguments):
    """TrainingArguments that are checked without a device, launcher or process group."""

    _setup_devices: Any = torch.device("cpu")


def check_trainer(recipe: Recipe) -> None:
    """Find what would stop the Trainer, before a model is loaded.

    Raises:
        SkipwiseError: names the key, and the package to install where one is missing.
    """
    dtype = training_dtype(recipe, recipe.engine)
    quantization_for(recipe.lora, dtype, recipe.engine)
    values = {**_values(recipe, dtype), **_trainer_values(recipe, recipe.engine)}
    config = values.pop("deepspeed", None)  # it would start DeepSpeed
    if recipe.engine.startswith("zero3") or config is not None:
        check_deepspeed("trainer.deepspeed" if config else f"engine: {recipe.engine}")
    try:
        arguments: Any = _Unstarted(**values)
        if arguments.log_level not in trainer_log_levels:
            raise ValueError(f"log_level is {arguments.log_level}: {', '.join(trainer_log_levels)}")
    except _REFUSALS as error:
        raise _refused(error) from error
    _check_trackers(arguments.report_to)
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise SkipwiseError("trainer.use_liger_kernel needs Liger: pip install liger-kernel")
    weights = [torch.nn.Parameter(torch.zeros(1))]  # as for those of the model
    schedule = arguments.lr_scheduler_type, torch.optim.SGD(weights), int(arguments.warmup_steps)
    try:
        get_scheduler(*schedule, arguments.max_steps, arguments.lr_scheduler_kwargs)
        optimizer, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        if optimizer.__module__.startswith("torch.optim"):
            optimizer(weights, **options)
    except _REFUSALS as error:
        if "need to pass a" not in str(error):  # galore, apollo and lomo work on the model itself
            raise _refused(error) from error


def _check_trackers(names: list[str]) -> None:
    known = integration_utils.INTEGRATION_TO_CALLBACK
    installed = integration_utils.get_available_reporting_integrations()
    for name in names:
        if name not in known:
            raise SkipwiseError(
                f"trainer.report_to is {name!r}: choose from {', '.join(known)}"
                + did_you_mean(name, known)
            )
        if name not in installed and name != "flyte":  # which transformers does not look for
            package = {"azure_ml": "azureml-sdk"}.get(name, name)
            fix = install(name) if name == "tensorboard" else f"pip install {package}"
            raise SkipwiseError(f"trainer.report_to: {name} is not installed: {fix}")


def _refused(error: Exception) -> SkipwiseError:
    """What transformers or torch says of a setting."""
    given, choices = str(error).partition(" ")[0], re.findall(r"'([^']+)'", str(error))
    what = f"transformers refuses the training settings: {error}"
    return SkipwiseError(f"{what}{did_you_mean(given, choices)}")


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
    values = {
        **_values(recipe, dtype),
        "output_dir": str(run.checkpoints),
        **engine_arguments(engine, on_cpu(), **(engine_options or {})),
    }
    try:
        made = TrainingArguments(**{**values, **_trainer_values(recipe, engine)})
    except _REFUSALS as error:
        raise _refused(error) from error
    if made.n_gpu > 1:  # one process of many GPUs: the Trainer would take all, by DataParallel
        made._n_gpu = 1
    return made


def _trainer_values(recipe: Recipe, engine: str) -> dict[str, Any]:
    """The recipe's `trainer:` section, with names and types checked."""
    hints = typing.get_type_hints(TrainingArguments)
    known = [f.name for f in fields(TrainingArguments) if f.init]
    values = dict(recipe.trainer)
    for key, value in values.items():
        if key in _OWNED:
            raise SkipwiseError(f"trainer.{key} is set by {_OWNED[key]}")
        if key not in known:
            what = "is not an argument of transformers' TrainingArguments"
            raise SkipwiseError(f"trainer.{key} {what}{did_you_mean(key, known)}")
        kinds = {*(typing.get_args(hints[key]) or [hints[key]])} - {type(None)}
        if value is not None and len(kinds) == 1 and kinds <= {int, float, bool}:
            values[key] = scalar(kinds.pop(), value, f"trainer.{key}")
            if key in _MOST and not 0 <= values[key] <= _MOST[key]:
                raise SkipwiseError(f"trainer.{key} is {value}: give 0 to {_MOST[key]:g}")
    names = values.get("report_to")
    if isinstance(names, str) and "," in names:
        values["report_to"] = [name.strip() for name in names.split(",")]
    if engine == "zero3-offload" and "optim" in values:
        raise SkipwiseError(
            "trainer.optim: engine zero3-offload has its own optimizer, on the CPU\n"
            "leave it out, or type --engine zero3"
        )
    return values


def _values(recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    """What the recipe says outside of `trainer:`, for every engine."""
    settings = recipe.training
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    return {
        "max_steps": settings.num_steps,
        "per_device_train_batch_size": micro_batch(settings),
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
    }


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
    device = this_device(dtype, room)
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
    run.update(any_rank=True, batch={"micro_batch_size": size // 2})
    return SkipwiseError(
        f"out of memory with training.micro_batch_size {size}, which auto had chosen\n"
        f"type the same command again: it takes {size // 2}"
    )


def this_device(dtype: torch.dtype, memory_gib: float) -> Gpu:
    """The device of this process, to plan for."""
    bf16 = dtype == torch.bfloat16
    return Gpu(name="", memory_gib=memory_gib, tflops=None, bf16=bf16, is_cpu=on_cpu())


def device_memory() -> float:
    """GiB that training can take on the device of this process."""
    if torch.cuda.is_available():
        device = best_device()
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        return (free - torch.cuda.memory_allocated(device)) / GIB
    if torch.backends.mps.is_available():
        return torch.mps.recommended_max_memory() / GIB
    return available_memory() / of_launcher("LOCAL_WORLD_SIZE", 1) / GIB


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
