"""A recipe to a trained checkpoint, on transformers.Trainer.

Skipwise owns the data set, the collator, the loss in slices and the preflight; the Trainer does the
rest, under the recipe's engine. A run that was killed goes on where its newest whole checkpoint
stands and ends with the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import AutocastKwargs
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from skipwise.config.distillation import shards
from skipwise.config.machine import world_size
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import Check, RunStopped, SkipwiseError, require
from skipwise.models.load import attention_for, check_kernel, has_persistent_buffers, load_model
from skipwise.models.lora import add_lora, load_adapter, num_parameters, quantization_for
from skipwise.models.prepared import PreparedModel
from skipwise.preflight.batch import check_batch, check_tokenizer
from skipwise.preflight.model import check_model
from skipwise.training.arguments import training_arguments, training_dtype
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
from skipwise.training.checkpoints import last_checkpoint, num_processes_of, remove_incomplete
from skipwise.training.chunked_loss import chunk_loss, is_chunked
from skipwise.training.distillation import check_distillation, make_distillation
from skipwise.training.distributed.engines import (
    check_engine,
    convert_to_universal_checkpoint,
    cpu_ram_efficient_loading,
    engine_of,
    init_cpu_backend,
    is_kind,
    keep_rope_in_float32,
    loading,
    on_cpu,
    set_fsdp2_mixed_precision,
    unshare_step_counters,
)
from skipwise.training.error_hints import explain_error
from skipwise.training.inputs import TrainingData
from skipwise.training.teacher import move_teacher
from skipwise.training.trainer import PoSETrainer


@dataclass(frozen=True, kw_only=True)
class Training:
    """A Trainer that is ready to start, with what the preflight said of it.

    Under an engine that shards the model the preflight needs the wrapped model, which is there when
    training begins: `checks` grows then.
    """

    trainer: PoSETrainer
    callback: RunCallback
    check_wrapped: Callable[[], None] | None  # the rest of the preflight, where it is needed
    checks: list[Check]
    resume_from: Path | None
    train_length: int
    num_parameters: int


class _Checked(Exception):
    """The preflight is done, and nothing more was asked for."""


def set_up(
    prepared: PreparedModel, data: TrainingData, run: RunFolder, before: StageOffset | None = None
) -> Training:
    """Load the model into a Trainer and run the preflight on it.

    Args:
        before: of a part that comes after another one: what that has trained.

    Raises:
        SkipwiseError: settings that do not fit each other, weights that cannot be loaded.
    """
    try:
        return _set_up(prepared, data, run, before or StageOffset())
    except Exception as error:
        known = explain_error(error, prepared.recipe, run)
        if known is None:
            raise
        raise known from error


def _set_up(
    prepared: PreparedModel, data: TrainingData, run: RunFolder, before: StageOffset
) -> Training:
    recipe = prepared.recipe
    set_seed(recipe.seed)
    engine = engine_of(recipe)
    dtype = training_dtype(recipe, engine)
    init_cpu_backend(engine, on_cpu())
    deepspeed = is_kind(engine, "deepspeed")
    resume_from = last_checkpoint(run)
    respread = False
    if resume_from is not None:
        respread = num_processes_of(resume_from, engine) != world_size() and deepspeed
        if respread:
            convert_to_universal_checkpoint(resume_from)
    once = cpu_ram_efficient_loading(engine, recipe.lora, prepared.info.tied_embeddings)
    once = once and not has_persistent_buffers(
        prepared.scaled, prepared.load
    )  # accelerate 1.15: AttributeError
    arguments = training_arguments(
        recipe, run, dtype, engine, engine_options={"respread": respread, "load_once": once}
    )
    quantization = quantization_for(recipe.lora, dtype, engine)
    weights = recipe.positions.key_weights
    attention = attention_for(recipe.load, weights, prepared.info.hybrid, prepared.scaled)
    source, load = prepared.source, prepared.load
    if before.checkpoint is not None and recipe.lora is None:
        source, load = str(before.checkpoint), recipe.load.of_own_folder()
    with loading(once):
        model = load_model(
            source,
            prepared.scaled,
            load,
            # What trains is kept in float32 and computed in bf16; a frozen base is bf16 itself,
            # and DeepSpeed keeps a float32 copy of its own.
            dtype=torch.float32 if recipe.lora is None and not deepspeed else dtype,
            attn_implementation=attention,
            quantization=quantization,
        )
    config, count = model.config, num_parameters(model)
    config.use_cache = False
    for name in prepared.conversion.frozen if prepared.conversion else ():
        model.get_parameter(name).requires_grad_(False)
    settings, train_length = recipe.training, data.sampler.train_length

    def of_model() -> list[Check]:
        return check_model(model, config, prepared.info, prepared.scaling, recipe.target_length)

    checks = of_model() + check_kernel(recipe.load, weights, config)
    distillation, data, said = make_distillation(prepared, data, model, dtype, engine)
    checks += said
    if distillation is not None or cuts_loss(recipe, train_length, prepared.info.vocab_size):
        chunk_loss(model, distillation)
    whole = model
    if recipe.lora is not None:
        whole = add_lora(model, recipe.lora, cast=not deepspeed)
        if before.checkpoint is not None:
            load_adapter(whole, before.checkpoint)
        if settings.gradient_checkpointing:
            whole.enable_input_require_grads()
    if settings.gradient_checkpointing:
        enable_checkpointing(whole)
    callback = RunCallback(run, recipe, train_length, engine, config, before)
    with tensorboard_in(run.path / "tensorboard"):
        trainer = PoSETrainer(
            model=whole,
            args=arguments,
            train_dataset=data.dataset,
            data_collator=data.collator,
            processing_class=prepared.tokenizer,
            callbacks=[callback, StopCallback()],
        )
    trainer.base_config, trainer.run_folder = config, run
    callback.distillation = distillation
    if distillation is not None and not shards(engine):
        move_teacher(distillation.teacher, arguments.device)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    set_fsdp2_mixed_precision(trainer, dtype)
    # Autocast would keep a bf16 copy of every weight through a forward pass, and use each once.
    accelerator: Any = trainer.accelerator
    accelerator.autocast_handler = AutocastKwargs(cache_enabled=False)
    batch = data.probe_batch()
    checks.append(check_tokenizer(prepared.tokenizer, prepared.info.vocab_size, batch))
    restore_rope = keep_rope_in_float32(model)

    def of_batch(wrapped: Any) -> list[Check]:
        autocast = nullcontext if deepspeed else trainer.accelerator.autocast
        inputs = trainer._prepare_inputs(batch)
        first_lengths = inputs.pop("first_lengths", None)  # chunk 2 learns by its own loss
        found = check_batch(wrapped, inputs, autocast, trainer.model)
        if distillation is not None:
            ids = inputs["input_ids"]
            found.append(
                check_distillation(distillation, prepared, ids, first_lengths, engine, autocast)
            )
        return found

    def of_wrapped() -> None:
        restore_rope()
        if respread:
            unshare_step_counters(trainer)
        again = [check_engine(engine, trainer), *of_model()]
        if engine != "ddp":
            again += of_batch(trainer.model_wrapped)
        names = {check.name for check in again}
        checks[:] = [check for check in checks if check.name not in names] + again

    alone = world_size() == 1 and engine == "one process"
    if alone or engine == "ddp":
        checks += of_batch(trainer.model)
    return Training(
        trainer=trainer,
        callback=callback,
        check_wrapped=None if alone else of_wrapped,
        checks=checks,
        resume_from=resume_from,
        train_length=train_length,
        num_parameters=count,
    )


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
        record: gets the checks when all are there, before the first step.
        only_check: end there.
        write_down: gets what training took, before its last checkpoint counts; None: run.json does.

    Raises:
        RunStopped: Ctrl-C or SIGTERM; a checkpoint was written.
        SkipwiseError: a failed check, a loss that is not finite, a full disk, out of memory.
    """
    trainer, check_wrapped = training.trainer, training.check_wrapped

    def preflight() -> None:
        if check_wrapped is not None:
            check_wrapped()
        record(training.checks)
        require(training.checks)
        if only_check:
            raise _Checked

    def taken() -> None:
        metadata = training_metadata(training, run, recipe)
        run.update(training=metadata) if write_down is None else write_down(metadata)

    training.callback.preflight, training.callback.write_down = preflight, taken
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
            if known is None:
                raise
            raise known from error
    step, last = trainer.state.global_step, trainer.args.max_steps
    if step < last:
        raise RunStopped(
            f"stopped at step {step} of {last}, saved in {run.checkpoints}\n"
            "type the same command again to go on"
        )
    if stop.asked:
        raise RunStopped(f"stopped after the last step, saved in {run.checkpoints}")


def training_metadata(training: Training, run: RunFolder, recipe: Recipe) -> dict[str, Any]:
    """What run.json says of a training that has come to its end."""
    trainer, lora = training.trainer, recipe.lora
    tokens_per_step = examples_per_step(trainer.args) * training.train_length
    return {
        "method": recipe.method,
        "mode": "full" if lora is None else "lora" if lora.quantization == "none" else "qlora",
        "engine": engine_of(recipe),
        "num_processes": world_size(),
        "num_steps": trainer.args.max_steps,
        "batch_size": examples_per_step(trainer.args),
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
    return is_chunked(settings.loss, settings.micro_batch_size, train_length, vocab_size)


def enable_checkpointing(model: Any) -> None:
    """Gradient checkpointing under the name that this transformers has for it."""
    new = getattr(model, "activation_checkpointing_enable", None)
    try:
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    except ValueError as error:
        raise SkipwiseError(f"{error}\ntype training.gradient_checkpointing=false") from error
