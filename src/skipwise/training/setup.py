"""From a recipe to a trained checkpoint, on transformers.Trainer.

Reading order: `set_up` (engine, model, LoRA, Trainer, preflight), then `train`. Skipwise owns the
data set, the collator, the chunked loss and the preflight. The Trainer does the rest, under the
recipe's engine. A killed run resumes at its last complete checkpoint and ends with equal weights.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from skipwise.config.batch import is_chunked, micro_batch
from skipwise.config.distillation import shards
from skipwise.config.machine import is_main_process, world_size
from skipwise.config.progress import Progress
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import Check, RunStopped, SkipwiseError, require
from skipwise.models.load import (
    attention_for,
    check_kernel,
    enable_checkpointing,
    has_persistent_buffers,
    load_model,
)
from skipwise.models.lora import add_lora, load_adapter, num_parameters, quantization_for
from skipwise.models.prepared import PreparedModel
from skipwise.planning.job import make_job, read_model
from skipwise.planning.memory import update_bytes
from skipwise.preflight.batch import check_batch, check_tokenizer
from skipwise.preflight.model import check_model
from skipwise.preflight.step import describe_trial, time_pass
from skipwise.training.arguments import (
    resolve_micro_batch,
    take_less,
    training_arguments,
    training_dtype,
)
from skipwise.training.callbacks import (
    RunCallback,
    StageOffset,
    StopCallback,
    examples_per_step,
    peak_memory_gib,
    read_metrics,
    stop_on_signals,
    tensorboard_in,
)
from skipwise.training.checkpoints import (
    check_trusted,
    last_checkpoint,
    mark_again,
    num_processes_of,
    remove_incomplete,
)
from skipwise.training.chunked_loss import Distillation, chunk_loss
from skipwise.training.distillation import check_distillation, make_distillation
from skipwise.training.distributed import engines
from skipwise.training.error_hints import explain_error, is_out_of_memory, out_of_memory
from skipwise.training.inputs import TrainingData
from skipwise.training.teacher import move_teacher
from skipwise.training.trainer import PoSETrainer

_SLOWER = 1.1  # times as long an example as the best size: larger ones are not tried
_LONG = 20.0  # seconds of a pass: larger ones are not tried


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What the engine of a run decides before the model is loaded."""

    name: str  # see `engine_of`
    dtype: torch.dtype  # of the arithmetic
    resume_from: Path | None
    converted: bool  # resume_from was saved by another number of processes, under DeepSpeed
    load_once: bool  # the first process of a machine loads the weights and broadcasts the shards

    @property
    def deepspeed(self) -> bool:
        return engines.is_kind(self.name, "deepspeed")


@dataclass(frozen=True, kw_only=True)
class Preflight:
    """The checks of a Trainer that is ready to start.

    An engine that wraps the model does so when training begins. `check_wrapped` then repeats the
    checks on the wrapped model and replaces those of the same names.
    """

    prepared: PreparedModel
    trainer: PoSETrainer
    model: Any  # without LoRA and without the engine's wrapper
    engine: Engine
    distillation: Distillation | None
    batch: dict[str, torch.Tensor]
    restore_rope: Callable[[], None]
    checks: list[Check]  # grows

    @property
    def one_process(self) -> bool:
        return world_size() == 1 and self.engine.name == "one process"

    def check_model(self) -> list[Check]:
        prepared, T = self.prepared, self.prepared.recipe.target_length
        return check_model(self.model, self.model.config, prepared.info, prepared.scaling, T)

    def check_batch(self, wrapped: Any) -> list[Check]:
        """Gradients and skipped positions on a real batch, and the teacher's logits."""
        autocast = nullcontext if self.engine.deepspeed else self.trainer.accelerator.autocast
        inputs = self.trainer._prepare_inputs(self.batch)
        first_lengths = inputs.pop("first_lengths", None)  # chunk 2 learns by its own loss
        label = f"probe a batch of {inputs['input_ids'].shape[1]:,} tokens"
        with Progress(label, None, shown=is_main_process()):
            checks = check_batch(wrapped, inputs, autocast, self.trainer.model)
            if self.distillation is not None:
                taught = self.distillation, self.prepared, inputs["input_ids"], first_lengths
                checks.append(check_distillation(*taught, self.engine.name, autocast))
        return checks

    def try_batch(self, data: TrainingData, run: RunFolder, sizes: list[int]) -> None:
        """Time a pass of each size until one is not faster, and write the fastest to run.json.

        Raises:
            _OtherSize: the fastest is not the one that the Trainer was made for.
            SkipwiseError: not even one example fits.
        """
        recipe, where = self.prepared.recipe, engines.place(self.prepared.recipe)
        known = engines.of_main_process(run.metadata().get("batch", {}))
        same = known.get("place") == where and known.get("tried")
        if not same or known["micro_batch_size"] != recipe.training.micro_batch_size:
            times: dict[int, float] = {}  # seconds an example
            for size in sizes:
                seconds = self._time_pass(data, size)
                if math.isinf(seconds) and times:
                    break
                if math.isfinite(seconds):
                    times[size] = seconds / size
                    slow = times[size] > _SLOWER * min(times.values()) or seconds > _LONG
                    if sizes[0] > 1 or slow:
                        break
            if not times:
                raise out_of_memory(recipe, run)
            best = min(times, key=lambda size: times[size])
            known = {"micro_batch_size": best, "tried": times, "place": where}
            run.update(batch=known)
        if known["micro_batch_size"] != recipe.training.micro_batch_size:
            raise _OtherSize
        self.checks.append(describe_trial(known))

    def _time_pass(self, data: TrainingData, size: int) -> float:
        """Seconds of the slowest process for a pass of this many examples; inf: out of memory."""
        recipe, reserve = self.prepared.recipe, 0.0
        with suppress(SkipwiseError):  # a config from which the plan cannot count
            reserve = update_bytes(make_job(recipe, *read_model(recipe)))
        seconds, autocast = 0.0, self.trainer.accelerator.autocast
        try:
            for batch, share in data.passes(size, recipe):
                inputs = self.trainer._prepare_inputs(batch)
                once = time_pass(self.trainer.model, inputs, autocast, int(reserve))
                seconds += share * once
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            seconds = math.inf
        if self.distillation is not None:
            self.distillation.take_divergence()
        return engines.longest(seconds, self.trainer.args.device)

    def check_before_training(
        self, largest_in_text: Callable[[], int], batch_trial: Callable[[], None] | None = None
    ) -> None:
        """What can be checked on a model that no engine has wrapped."""
        tokenizer, vocab_size = self.prepared.tokenizer, self.prepared.info.vocab_size
        fits = check_tokenizer(tokenizer, vocab_size, self.batch, largest_in_text)
        self.checks.append(fits)
        if not fits.passed:  # the model has no embedding for the batch
            return
        if self.one_process or self.engine.name == "ddp":
            if batch_trial is not None:
                batch_trial()
            self.checks.extend(self.check_batch(self.trainer.model))

    def check_wrapped(self) -> None:
        """The rest, on the model as the engine trains it; nothing is left in one process."""
        if self.one_process:
            return
        self.restore_rope()
        if self.engine.converted:
            engines.unshare_step_counters(self.trainer)
        again = [engines.check_engine(self.engine.name, self.trainer), *self.check_model()]
        if self.engine.name != "ddp":
            again += self.check_batch(self.trainer.model_wrapped)
        names = {check.name for check in again}
        self.checks[:] = [check for check in self.checks if check.name not in names] + again


@dataclass(frozen=True, kw_only=True)
class Training:
    """A Trainer that is ready to start, with its preflight."""

    trainer: PoSETrainer
    callback: RunCallback
    preflight: Preflight
    resume_from: Path | None
    train_length: int
    num_parameters: int

    @property
    def checks(self) -> list[Check]:
        return self.preflight.checks


class _OtherSize(Exception):
    """Another micro batch than the Trainer's was chosen."""


class _Checked(Exception):
    """The preflight is done, and nothing more was asked for."""


def set_up(
    prepared: PreparedModel,
    data: TrainingData,
    run: RunFolder,
    offset: StageOffset | None = None,
    *,
    trial: bool = False,
) -> Training:
    """Load the model into a Trainer and run the preflight on it.

    Args:
        offset: what earlier stages have trained. Defaults to nothing.
        trial: time a pass of the real size, if that was not done on a machine like this one. Where
            the micro batch is `auto`, the fastest is taken and written to run.json.

    Raises:
        SkipwiseError: settings that contradict each other, weights that cannot be loaded.
    """
    while True:
        try:
            return _set_up(prepared, data, run, offset or StageOffset(), trial)
        except _OtherSize:
            pass  # the exception holds the model until here
        except Exception as error:
            known = explain_error(error, prepared.recipe, run)
            if known is None:
                raise
            raise known from error
        gc.collect()


def _set_up(
    prepared: PreparedModel, data: TrainingData, run: RunFolder, offset: StageOffset, trial: bool
) -> Training:
    set_seed(prepared.recipe.seed)
    engine = _start_engine(prepared, run)
    prepared, sizes = resolve_micro_batch(prepared, run, engine.name, engine.dtype)
    recipe = prepared.recipe
    options = {"respread": engine.converted, "load_once": engine.load_once}
    arguments = training_arguments(recipe, run, engine.dtype, engine.name, options)
    model = _load_base(prepared, engine, offset)
    num_base_parameters, train_length = num_parameters(model), data.sampler.train_length
    scaled = check_model(model, model.config, prepared.info, prepared.scaling, recipe.target_length)
    kernel = check_kernel(recipe.load, recipe.positions.key_weights, model.config)
    distillation, data, taught = make_distillation(prepared, data, model, engine.dtype, engine.name)
    if distillation is not None or cuts_loss(recipe, train_length, prepared.info.vocab_size):
        chunk_loss(model, distillation)
    peft_model = _prepare_for_training(model, recipe, engine, offset)
    callback = RunCallback(run, recipe, train_length, engine.name, model.config, offset)
    callback.distillation = distillation
    trainer = _make_trainer(peft_model, model.config, arguments, prepared, data, run, callback)
    if distillation is not None and not shards(engine.name):
        move_teacher(distillation.teacher, arguments.device)
    engines.set_fsdp2_mixed_precision(trainer, engine.dtype)
    preflight = Preflight(
        prepared=prepared,
        trainer=trainer,
        model=model,
        engine=engine,
        distillation=distillation,
        batch=data.probe_batch(),
        restore_rope=engines.keep_rope_in_float32(model),
        checks=[*scaled, *kernel, *taught],
    )
    batch_trial = partial(preflight.try_batch, data, run, sizes) if trial else None
    preflight.check_before_training(data.corpus.largest_token, batch_trial)
    return Training(
        trainer=trainer,
        callback=callback,
        preflight=preflight,
        resume_from=engine.resume_from,
        train_length=train_length,
        num_parameters=num_base_parameters,
    )


def _start_engine(prepared: PreparedModel, run: RunFolder) -> Engine:
    """Start the engine's backend, and convert a checkpoint that other processes have saved."""
    recipe = prepared.recipe
    name = engines.engine_of(recipe)
    dtype = training_dtype(recipe, name)
    engines.init_cpu_backend(name, engines.on_cpu())
    resume_from, converted = last_checkpoint(run), False
    if resume_from is not None:
        saved_by = num_processes_of(resume_from, name)
        check_trusted(resume_from, name, recipe)
        if world_size() > 1 and torch.distributed.is_initialized():
            torch.distributed.barrier()  # nobody loads before the first process has checked
        converted = saved_by != world_size() and engines.is_kind(name, "deepspeed")
        if converted:
            engines.convert_to_universal_checkpoint(resume_from)
            if is_main_process():
                mark_again(resume_from, name, recipe)
    load_once = engines.cpu_ram_efficient_loading(name, recipe.lora, prepared.info.tied_embeddings)
    if load_once and has_persistent_buffers(prepared.scaled, prepared.load):
        load_once = False  # accelerate 1.15: AttributeError
    return Engine(
        name=name, dtype=dtype, resume_from=resume_from, converted=converted, load_once=load_once
    )


def _load_base(prepared: PreparedModel, engine: Engine, offset: StageOffset) -> Any:
    """The scaled model with its weights; those of an earlier stage where it trained all of them."""
    recipe = prepared.recipe
    source, load = prepared.source, prepared.load
    if offset.checkpoint is not None and recipe.lora is None:
        source, load = str(offset.checkpoint), recipe.load.of_own_folder()
    key_weights = recipe.positions.key_weights
    # Trained weights are kept in float32 and computed in bf16. A frozen base is bf16 itself, and
    # DeepSpeed keeps a float32 copy of its own.
    in_float32 = recipe.lora is None and not engine.deepspeed
    quantization = quantization_for(recipe.lora, engine.dtype, engine.name)
    attention = attention_for(recipe.load, key_weights, prepared.info.hybrid, prepared.scaled)
    options = {"attn_implementation": attention, "quantization": quantization}
    dtype = torch.float32 if in_float32 else engine.dtype
    with engines.loading(engine.load_once):
        model = load_model(source, prepared.scaled, load, dtype=dtype, **options)
    model.config.use_cache = False
    for name in prepared.conversion.frozen if prepared.conversion else ():
        model.get_parameter(name).requires_grad_(False)
    return model


def _prepare_for_training(model: Any, recipe: Recipe, engine: Engine, offset: StageOffset) -> Any:
    """The model with LoRA and gradient checkpointing, as the recipe has them."""
    peft_model = model
    checkpointing = recipe.training.gradient_checkpointing
    if recipe.lora is not None:
        peft_model = add_lora(model, recipe.lora, cast=not engine.deepspeed)
        if offset.checkpoint is not None:
            load_adapter(peft_model, offset.checkpoint)
        if checkpointing:
            peft_model.enable_input_require_grads()
    if checkpointing:
        enable_checkpointing(peft_model, checkpointing)
    return peft_model


def _make_trainer(
    model: Any,
    config: Any,
    arguments: TrainingArguments,
    prepared: PreparedModel,
    data: TrainingData,
    run: RunFolder,
    callback: RunCallback,
) -> PoSETrainer:
    with tensorboard_in(run.path / "tensorboard"):
        trainer = PoSETrainer(
            model=model,
            args=arguments,
            train_dataset=data.dataset,
            data_collator=data.collator,
            processing_class=prepared.tokenizer,
            callbacks=[callback, StopCallback()],
        )
    trainer.base_config, trainer.run_folder = config, run
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    # Autocast would keep a bf16 copy of every weight through a forward pass, and use each once.
    accelerator: Any = trainer.accelerator
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    return trainer


def train(
    training: Training,
    run: RunFolder,
    recipe: Recipe,
    *,
    record: Callable[[list[Check]], None] = lambda checks: None,
    only_check: bool = False,
    write_down: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Train to the end, or to the point where the user stops it.

    Args:
        record: is called with all checks before the first step.
        only_check: stop before the first step.
        write_down: is called with `training_metadata` before the last checkpoint is marked
            complete. Defaults to writing it into run.json.

    Raises:
        RunStopped: Ctrl-C or SIGTERM; a checkpoint was written.
        SkipwiseError: a failed check, a loss that is not finite, a full disk, out of memory.
    """
    trainer = training.trainer

    def preflight() -> None:
        training.preflight.check_wrapped()
        record(training.checks)
        require(training.checks)
        if only_check:
            raise _Checked

    def write_metadata() -> None:
        metadata = training_metadata(training, run, recipe)
        run.update(training=metadata) if write_down is None else write_down(metadata)

    training.callback.preflight, training.callback.write_down = preflight, write_metadata
    remove_incomplete(run)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with stop_on_signals(trainer) as stop:
        try:
            resume = str(training.resume_from) if training.resume_from else None
            trainer.train(resume_from_checkpoint=resume)
            if world_size() > 1:
                torch.distributed.barrier()  # none leaves, and can be stopped, before the others
        except _Checked:
            if stop.asked:
                raise RunStopped("stopped before the first step\ntype it again") from None
            return
        except Exception as error:
            known = explain_error(error, recipe, run)
            size = trainer.args.per_device_train_batch_size
            if is_out_of_memory(error) and recipe.training.micro_batch_size == "auto" and size > 1:
                known = take_less(run, size)
            if known is None:
                raise
            raise known from error
    step, last = trainer.state.global_step, trainer.args.max_steps
    if step < last:
        raise RunStopped(
            f"stopped at step {step} of {last}, saved in {run.checkpoints}\n"
            "type the same command again to continue"
        )
    if stop.asked:
        raise RunStopped(f"stopped after the last step, saved in {run.checkpoints}")


def training_metadata(training: Training, run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """What run.json says about training that has reached its last step."""
    trainer, lora = training.trainer, recipe.lora
    tokens_per_step = examples_per_step(trainer.args) * training.train_length
    return {
        "method": recipe.method,
        "mode": "full" if lora is None else "lora" if lora.quantization == "none" else "qlora",
        "engine": engines.engine_of(recipe),
        "num_processes": world_size(),
        "num_steps": trainer.args.max_steps,
        "batch_size": examples_per_step(trainer.args),
        "micro_batch_size": trainer.args.per_device_train_batch_size,
        "tokens_per_step": tokens_per_step,
        "num_tokens": tokens_per_step * trainer.args.max_steps,
        "seconds": read_metrics(run)[-1]["seconds"],
        "trainable_parameters": num_parameters(trainer.model, trainable=True),
        "peak_memory_gib": round(peak_memory_gib(), 2),
    }


def cuts_loss(recipe: Recipe, train_length: int, vocab_size: int) -> bool:
    """Whether the loss is computed in slices; Liger's kernels do it themselves."""
    settings = recipe.training
    if recipe.trainer.get("use_liger_kernel"):
        if settings.loss == "chunked":
            raise SkipwiseError(
                "training.loss: chunked and trainer.use_liger_kernel both replace the loss\n"
                "leave one of them out"
            )
        return False
    return is_chunked(settings.loss, micro_batch(settings), train_length, vocab_size)
