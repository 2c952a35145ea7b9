"""The whole preflight of a run: config, text, model, batch, and the stage at full length.

The single checks live in `preflight/`; here they are put in order, printed and written to run.json.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from skipwise.config.distillation import distillation_weight, in_one_process, shards
from skipwise.config.machine import is_main_process
from skipwise.config.progress import Progress
from skipwise.config.recipe import LoRASettings, Recipe, context_lengths
from skipwise.config.run_folder import RunFolder
from skipwise.config.stages import full_length_stage
from skipwise.data.chat import check_template
from skipwise.errors import Check, SkipwiseError, require
from skipwise.evaluation import evaluator
from skipwise.evaluation.run import NO_PERPLEXITY, evaluation_documents, make_evaluator
from skipwise.export.runtimes import check_export
from skipwise.models.compatibility import make_portable
from skipwise.models.load import (
    best_device,
    build_without_weights,
    compute_dtype,
    enable_checkpointing,
    free_memory,
    load_model,
)
from skipwise.models.lora import add_lora, num_parameters
from skipwise.models.prepared import PreparedModel, convert_weights, prepare_model
from skipwise.pipeline.choose_separator import choose_separator, separator_check
from skipwise.pipeline.choose_temperature import temperature_check
from skipwise.pipeline.choose_train_length import choose_train_length, length_check
from skipwise.preflight.config import check_config
from skipwise.preflight.model import check_model
from skipwise.training.arguments import accumulation, check_trainer
from skipwise.training.full_length_stage import (
    RunInputs,
    check_long_text,
    check_step,
    first_stage_model,
    is_checked,
    make_inputs,
)
from skipwise.training.inputs import (
    check_data,
    dummy_data,
    find_sources,
    load_training_data,
    with_short_probe,
)
from skipwise.training.setup import cuts_loss, set_up


def check_settings(recipe: Recipe, *, trained: bool = False, load: bool = False) -> None:
    """Find mistakes in `eval:`, `trainer:` and `training:`. Arguments: see `validate`."""
    evaluator.check_settings(recipe.eval)
    context_lengths(recipe, recipe.target_length)
    if is_main_process():  # the others see it end
        if not trained and recipe.method != "none":
            check_trainer(recipe)
        evaluator.check_tasks(evaluator.find_tasks(recipe.eval.tasks), recipe.eval, load=load)


def validate(
    recipe: Recipe,
    num_processes: int = 1,
    *,
    trained: bool = False,
    load: bool = False,
    needs_text: bool = True,
) -> PreparedModel:
    """Find every mistake that shows without weights and text, before anything is written.

    Args:
        num_processes: number of training processes.
        trained: whether training is done, so that its batch is fixed.
        load: load the data sets of benchmarks. Without them only the names are checked.
        needs_text: whether the recipe must name text.

    Returns:
        the model, prepared once for the whole run.

    Raises:
        SkipwiseError: what is wrong, and what to type.
    """
    check_settings(recipe, trained=trained, load=load)
    prepared = prepare_model(recipe)
    L = prepared.info.original_length
    accumulation(recipe.training, num_processes)
    if not trained:
        full_length_stage(prepared.recipe, L, num_processes)
        if recipe.method != "none" and not recipe.load.trust_remote_code:  # may need weights
            _check_class(prepared)
        if recipe.trainer.get("use_liger_kernel"):
            cuts_loss(recipe, L, prepared.info.vocab_size)
    if needs_text or recipe.data.sources:
        find_sources(recipe)
    if recipe.eval.evaluator is not None:
        if "perplexity" not in recipe.eval.tasks:
            raise SkipwiseError(NO_PERPLEXITY)
        make_evaluator(recipe, None, prepared.tokenizer, context_lengths(recipe, L))
    if recipe.eval.chat_template is True:
        check_template(prepared.tokenizer, "eval.chat_template")
    return prepared


def _check_class(prepared: PreparedModel) -> None:
    """Build the model without weights, with attention, LoRA and checkpointing as asked."""
    recipe = prepared.recipe
    model = build_without_weights(prepared.scaled, recipe.load)
    if recipe.lora is not None and recipe.lora != LoRASettings():  # the defaults always fit
        model = add_lora(model, recipe.lora, cast=False)
    if recipe.training.gradient_checkpointing:
        enable_checkpointing(model, recipe.training.gradient_checkpointing)


def check(recipe: Recipe) -> list[Check]:
    """The preflight alone, on the recipe's text, or on random tokens where it names no text.

    It runs in this process, whatever engine the recipe names, and without a GPU on a short batch.
    `skipwise train --dry-run` checks under the engine, on a full batch.
    """
    asked = recipe
    recipe = in_one_process(recipe)
    prepared = validate(recipe, load=True, needs_text=False)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        run.write_recipe(recipe)
        prepared = convert_weights(prepared, run.converted)
        prepared = choose_separator(prepared, run, only_check=True)
        inputs = None
        if recipe.method != "none":
            given = bool(recipe.data.sources)
            prepared = choose_train_length(prepared, run, dummy=not given)
            data = load_training_data(prepared, run) if given else dummy_data(prepared)
            data = with_short_probe(data) if best_device().type == "cpu" else data
            inputs = make_inputs(prepared, data, run)
        checks, _ = _preflight(prepared, inputs, run)
    checks += [*length_check(run), *temperature_check(prepared)]
    router_loss = bool(getattr(prepared.config, "output_router_logits", False))
    asked = dataclasses.replace(asked, train_length=prepared.recipe.train_length)
    L = prepared.info.original_length
    weight, _ = distillation_weight(asked, original_length=L, router_loss=router_loss)
    if shards(asked.engine) and weight:
        detail = f"w = {weight:g}, checked when {asked.engine} starts"
        checks.append(Check(name="distillation", passed=True, detail=detail))
    return checks


def check_run(prepared: PreparedModel, inputs: RunInputs | None, run: RunFolder) -> None:
    """The preflight of a run, printed to stderr and written to run.json.

    Raises:
        SkipwiseError: a check failed.
    """
    checks, num_parameters = _preflight(prepared, inputs, run, trial=True)
    record_checks(run, checks)
    if num_parameters:
        run.update_entry("model", num_parameters=num_parameters)
    require(checks)


def check_texts(prepared: PreparedModel, inputs: RunInputs, run: RunFolder) -> None:
    """The checks that need no model.

    Raises:
        SkipwiseError: a check failed.
    """
    checks = _text_checks(prepared, inputs, run)
    record_checks(run, checks)
    require(checks)


def _text_checks(prepared: PreparedModel, inputs: RunInputs, run: RunFolder) -> list[Check]:
    around, tokenizer = prepared.separator, prepared.tokenizer
    held_out = evaluation_documents(prepared.recipe, tokenizer, run, separator=around)
    with Progress("check the texts", None, shown=is_main_process()):
        checks = [*check_data(prepared, inputs.data, held_out), *separator_check(run)]
    checks.append(check_planned_export(prepared))
    stage = inputs.full_length
    return checks if stage is None else [*checks, check_long_text(stage)]


def _config_checks(prepared: PreparedModel) -> list[Check]:
    T = prepared.recipe.target_length
    checks = check_config(prepared.info, prepared.scaling, T, prepared.recipe)
    return [*checks, check_planned_export(prepared)]


def check_planned_export(prepared: PreparedModel) -> Check:
    """Whether runtimes would load the config that the run will export, asked before training."""
    T = prepared.recipe.target_length
    with tempfile.TemporaryDirectory() as folder:
        prepared.scaled.save_pretrained(folder)
        make_portable(Path(folder), T)
        return check_export(Path(folder), prepared.scaling, T)


def _preflight(
    prepared: PreparedModel, inputs: RunInputs | None, run: RunFolder, trial: bool = False
) -> tuple[list[Check], int | None]:
    """All checks and the number of parameters. Weights are loaded only if the first checks pass."""
    recipe, T = prepared.recipe, prepared.recipe.target_length
    if inputs is None:
        checks = _config_checks(prepared)
        dtype = compute_dtype(recipe.load)
        model: Any = load_model(prepared.source, prepared.scaled, prepared.load, dtype=dtype)
        checks += separator_check(run)
        checks += check_model(model, prepared.scaled, prepared.info, prepared.scaling, T)
    elif recipe.data.sources:
        checks = _text_checks(prepared, inputs, run)
    else:
        checks = [*_config_checks(prepared), *separator_check(run)]
    if not all(check.passed for check in checks):
        return checks, None
    if inputs is not None:
        training = set_up(first_stage_model(prepared), inputs.data, run, trial=trial)
        checks += training.checks
        count = training.num_parameters
        del training
        stage, short = inputs.full_length, inputs.data.short is not None
        if short:
            detail = f"{inputs.data.probe_length} tokens with positions up to {T - 1:,}, because "
            detail += f"there is no GPU; training probes {inputs.data.sampler.train_length:,} first"
            detail += f", and a step of {T:,}" if stage is not None else ""
            checks.append(Check(name="probed", passed=True, detail=detail))
        elif stage is not None and all(c.passed for c in checks) and not is_checked(stage, run):
            free_memory()
            checks.append(check_step(stage, run))
    else:
        count = num_parameters(model)
        del model
    free_memory()
    return checks, count


def record_checks(run: RunFolder, checks: list[Check]) -> None:
    for one in checks if is_main_process() else []:
        print(f"  {one}", file=sys.stderr, flush=True)
    names = {one.name for one in checks}
    new = [dataclasses.asdict(c) for c in checks]
    for one in new:
        one["numbers"] = {k: v for k, v in one["numbers"].items() if math.isfinite(v)}
    run.update(checks=lambda old: [c for c in old or [] if c["name"] not in names] + new)
