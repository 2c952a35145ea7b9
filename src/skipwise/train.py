"""A recipe to a trained checkpoint, on transformers.Trainer.

Skipwise owns the data set, the collator and the preflight; the Trainer does the rest. The data set
is read in order (example k is decided by k), so a run that was killed goes on where its newest
whole checkpoint stands and ends with the same weights.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from skipwise.errors import RunStopped, SkipwiseError
from skipwise.models.checks import check_batch, check_model, check_tokenizer
from skipwise.models.config_checks import Check, require
from skipwise.models.load import add_lora, attention_for, compute_dtype, load_model
from skipwise.models.masks import with_layer_masks
from skipwise.prepare import ModelPlan, TrainingData
from skipwise.recipe import Recipe, TrainingSettings
from skipwise.run import RunFolder, write_text

_WHOLE = "complete"  # a file in every checkpoint that was written to its end
_OWNED = {
    "output_dir": "--out",
    "max_steps": "training.num_steps",
    "num_train_epochs": "training.num_steps",
    "per_device_train_batch_size": "training.batch_size",
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
    "seed": "seed",
    "bf16": "load.dtype",
    "fp16": "load.dtype",
    "remove_unused_columns": "nothing: the data set has no columns to remove",
    "label_smoothing_factor": "nothing: the loss is the model's own",
}


@dataclass(frozen=True, kw_only=True)
class Training:
    """A Trainer that is ready to start, with what the preflight said of it."""

    trainer: PositionTrainer
    checks: list[Check]
    resume_from: Path | None
    train_length: int


class PositionTrainer(Trainer):
    """The Trainer, reading the data set in the order of the example numbers."""

    base_config: Any = None  # of the model inside any wrapper

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        dataset: Any = train_dataset or self.train_dataset
        return SequentialSampler(dataset)

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return with_layer_masks(self.base_config, super()._prepare_inputs(inputs))


def set_up(plan: ModelPlan, data: TrainingData, run: RunFolder) -> Training:
    """Load the model into a Trainer and run the preflight on it.

    Raises:
        SkipwiseError: settings that do not fit each other, weights that cannot be loaded.
    """
    recipe = plan.recipe
    set_seed(recipe.seed)
    dtype = compute_dtype(recipe.load)
    arguments = training_arguments(recipe, run, dtype)
    model = load_model(
        plan.source,
        plan.scaled,
        plan.load,
        # what trains is kept in float32 and computed in bf16; a frozen base is bf16 itself
        dtype=torch.float32 if recipe.lora is None else dtype,
        attn_implementation=attention_for(recipe.load, recipe.positions.weights, plan.facts.hybrid),
    )
    config = model.config
    config.use_cache = False
    for name in plan.conversion.frozen if plan.conversion else ():
        model.get_parameter(name).requires_grad_(False)
    checks = check_model(model, config, plan.facts, plan.scaling, recipe.target_length)
    if recipe.lora is not None:
        model = add_lora(model, recipe.lora)
        if recipe.training.gradient_checkpointing:
            model.enable_input_require_grads()
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(model)
    resume_from = newest_checkpoint(run)
    with _tensorboard_in(run.path / "tensorboard"):
        trainer = PositionTrainer(
            model=model,
            args=arguments,
            train_dataset=data.dataset,
            data_collator=data.collator,
            processing_class=plan.tokenizer,
            callbacks=[_Run(run, recipe, data.sampler.train_length), _Stop()],
        )
    trainer.base_config = config
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    batch = data.telling_batch()
    checks.append(check_tokenizer(plan.tokenizer, plan.facts.vocab_size, batch))
    batch = trainer._prepare_inputs(batch)
    checks += check_batch(trainer.model, batch, trainer.accelerator.autocast)
    return Training(
        trainer=trainer,
        checks=checks,
        resume_from=resume_from,
        train_length=data.sampler.train_length,
    )


def train(training: Training, run: RunFolder) -> None:
    """Train to the end, or to the point where the user stops it.

    Raises:
        RunStopped: Ctrl-C or SIGTERM; a checkpoint was written.
        SkipwiseError: a failed check, a loss that is not finite, a full disk, out of memory.
    """
    require(training.checks)
    trainer = training.trainer
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with _stop_on_signals(trainer):
        try:
            resume = str(training.resume_from) if training.resume_from else None
            trainer.train(resume_from_checkpoint=resume)
        except torch.OutOfMemoryError as error:
            raise SkipwiseError(
                "the accelerator's memory is full\n"
                "type training.batch_size=1 training.gradient_checkpointing=true, or use LoRA"
            ) from error
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise SkipwiseError(
                f"the disk of {run.path} is full: the checkpoint could not be written\n"
                f"make room and type the command again: it goes on at {_place(run)}"
            ) from error
    step, last = trainer.state.global_step, trainer.args.max_steps
    if step < last:
        raise RunStopped(
            f"stopped at step {step} of {last}, saved in {run.checkpoints}\n"
            "type the same command again to go on"
        )
    arguments = trainer.args
    model: Any = trainer.model
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens_per_step = _examples_per_step(arguments) * training.train_length
    run.update(
        training={
            "method": run.recipe().method,
            "mode": "full" if run.recipe().lora is None else "lora",
            "num_steps": last,
            "batch_size": _examples_per_step(arguments),
            "tokens_per_step": tokens_per_step,
            "num_tokens": tokens_per_step * last,
            "seconds": read_metrics(run)[-1]["seconds"],
            "trainable_parameters": parameters,
            "peak_memory_gib": round(peak_memory_gib(), 2),
        }
    )


def training_arguments(recipe: Recipe, run: RunFolder, dtype: torch.dtype) -> TrainingArguments:
    """The recipe as TrainingArguments, with its `trainer:` section on top.

    Raises:
        SkipwiseError: a key that Skipwise sets itself, or one that TrainingArguments lacks; a
            global batch that the devices cannot share.
    """
    known = {f.name for f in fields(TrainingArguments)}
    for key in recipe.trainer:
        if key in _OWNED:
            raise SkipwiseError(f"trainer.{key} is set by {_OWNED[key]}")
        if key not in known:
            raise SkipwiseError(
                f"trainer.{key} is not an argument of transformers' TrainingArguments"
            )
    settings = recipe.training
    tensorboard = importlib.util.find_spec("tensorboard") is not None
    on_cpu = not torch.cuda.is_available() and not torch.backends.mps.is_available()
    values: dict[str, Any] = {
        "output_dir": str(run.checkpoints),
        "max_steps": settings.num_steps,
        "per_device_train_batch_size": settings.batch_size,
        "gradient_accumulation_steps": _accumulation(settings),
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.lr_scheduler,
        "warmup_steps": settings.warmup_steps,
        "weight_decay": settings.weight_decay,
        "max_grad_norm": settings.max_grad_norm,
        "save_steps": settings.save_steps,
        "save_total_limit": max(2, settings.save_total_limit),
        "seed": recipe.seed,
        "bf16": dtype == torch.bfloat16,
        "use_cpu": on_cpu,
        "remove_unused_columns": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would hide a loss that is not finite
        "disable_tqdm": True,
        "dataloader_pin_memory": not on_cpu,
        "report_to": ["tensorboard"] if tensorboard else [],
    }
    try:
        return TrainingArguments(**{**values, **recipe.trainer})
    except (ValueError, ImportError, TypeError) as error:
        raise SkipwiseError(f"the training settings do not fit: {error}") from error


def enable_checkpointing(model: Any) -> None:
    """Gradient checkpointing under the name that this transformers has for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    try:
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise SkipwiseError(f"{error}\ntype training.gradient_checkpointing=false") from error


def newest_checkpoint(run: RunFolder) -> Path | None:
    """The newest checkpoint that was written to its end; broken ones are removed."""
    found = []
    for folder in run.checkpoints.glob("checkpoint-*"):
        if (folder / _WHOLE).exists():
            found.append((int(folder.name.rsplit("-", 1)[1]), folder))
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return max(found)[1] if found else None


def finished_checkpoint(run: RunFolder, num_steps: int) -> Path | None:
    """The checkpoint of the last step, where training has reached it."""
    folder = run.checkpoints / f"checkpoint-{num_steps}"
    return folder if (folder / _WHOLE).exists() else None


def peak_memory_gib() -> float:
    """Peak memory so far: of the accelerator where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 2**30


class _Run(TrainerCallback):
    """The run folder's side of training: metrics, progress, whole checkpoints, finite loss."""

    def __init__(self, run: RunFolder, recipe: Recipe, train_length: int) -> None:
        self.run, self.recipe, self.train_length = run, recipe, train_length
        self.bar: tqdm | None = None
        self.started = 0.0
        self.seconds_before = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        kept = [m for m in read_metrics(self.run) if m["step"] <= state.global_step]
        self.seconds_before = kept[-1]["seconds"] if kept else 0.0
        write_text(self.run.metrics_file, "".join(json.dumps(m) + "\n" for m in kept))
        self.started = time.monotonic()
        self.bar = tqdm(
            total=args.max_steps,
            initial=state.global_step,
            desc="train",
            unit=" steps",
            disable=None,
        )

    def on_log(
        self,
        args: Any,
        state: Any,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss) or not math.isfinite(logs.get("grad_norm", 0.0)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            raise SkipwiseError(
                f"the {what} is not finite at step {state.global_step}; the newest checkpoint is "
                f"{_place(self.run)}\ntry training.learning_rate={args.learning_rate / 4:g}, more "
                "training.warmup_steps, or load.dtype=float32, with another --out"
            )
        if not state.is_world_process_zero:
            return
        metrics = {
            "step": state.global_step,
            "loss": loss,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "num_tokens": state.global_step * _examples_per_step(args) * self.train_length,
            "seconds": round(self.seconds_before + time.monotonic() - self.started, 3),
        }
        with self.run.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.bar is not None:
            self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)
        if state.global_step >= args.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if self.recipe.eval.select != "last":
                keep_candidate(folder, self.run.candidates / f"step-{state.global_step}")
            write_text(folder / _WHOLE, f"{state.global_step}\n")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()


def keep_candidate(checkpoint: Path, folder: Path) -> None:
    """Link a checkpoint's weights and configs into a folder that outlives it."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for file in checkpoint.iterdir():
        weights = file.suffix == ".safetensors" or file.name.endswith(".safetensors.index.json")
        if weights or file.name in ("config.json", "adapter_config.json"):
            try:
                os.link(file, part / file.name)
            except OSError:  # a file system without links
                shutil.copyfile(file, part / file.name)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(part, folder)


class _Stop(TrainerCallback):
    """Save and leave after the step in which a signal came."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


@contextmanager
def _stop_on_signals(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C and SIGTERM save and stop; a second Ctrl-C stops at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    stop = next(cb for cb in trainer.callback_handler.callbacks if isinstance(cb, _Stop))

    def handle(number: int, frame: Any) -> None:
        if stop.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = True
        print("\nstopping after this step, and saving ...", file=sys.stderr, flush=True)

    old = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """TensorBoard's folder, which a Trainer reads from the environment when it is made."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.get(name)
    os.environ[name] = given or str(folder)
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def read_metrics(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; a last line cut off by a kill is left out."""
    if not run.metrics_file.exists():
        return []
    metrics = []
    for line in run.metrics_file.read_text(encoding="utf-8").splitlines():
        try:
            metrics.append(json.loads(line))
        except ValueError:
            continue
    return metrics


def _accumulation(settings: TrainingSettings) -> int:
    """Accumulation steps that make up the global batch on this many devices."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    held = settings.batch_size * world
    if held == 0 or settings.global_batch_size == 0 or settings.global_batch_size % held:
        raise SkipwiseError(
            f"training.global_batch_size {settings.global_batch_size} is not a multiple of "
            f"training.batch_size {settings.batch_size} x {world} devices"
        )
    return settings.global_batch_size // held


def _examples_per_step(arguments: TrainingArguments) -> int:
    held = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return held * arguments.world_size


def _place(run: RunFolder) -> str:
    newest = newest_checkpoint(run)
    return newest.name if newest else "none: it starts anew"
