"""The whole preflight of a run: config, text, model, batch, and the stage at full length.

The single checks live in `preflight/`; here they are put in order, printed and written to run.json.
"""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
import tempfile
from typing import Any

import torch

from skipwise.config.distillation import in_one_process
from skipwise.config.machine import is_main_process
from skipwise.config.parse import dump_recipe
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.errors import Check, require
from skipwise.evaluation.run import evaluation_documents
from skipwise.models.load import compute_dtype, load_model
from skipwise.models.lora import num_parameters
from skipwise.models.prepared import PreparedModel, convert_weights, prepare_model
from skipwise.preflight.config import check_config
from skipwise.preflight.model import check_model
from skipwise.training.full_length_stage import (
    check_long_text,
    check_step,
    first_stage_model,
    is_checked,
    make_full_length_stage,
)
from skipwise.training.inputs import TrainingData, check_data, dummy_data, load_training_data
from skipwise.training.setup import set_up


def check(recipe: Recipe) -> list[Check]:
    """The preflight alone, on the recipe's text, or on random tokens where it names none.

    In this process, whatever the recipe's engine: that is for `skipwise train --dry-run`.
    """
    recipe = in_one_process(recipe)
    prepared = prepare_model(recipe)
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(folder)
        write_text(run.recipe_file, dump_recipe(recipe))
        prepared = convert_weights(prepared, run.converted)
        if recipe.method == "none":
            data = None
        elif recipe.data.sources:
            data = load_training_data(prepared, run)
        else:
            data = dummy_data(prepared)
        checks, _ = _preflight(prepared, data, run)
    return checks


def check_run(prepared: PreparedModel, data: TrainingData | None, run: RunFolder) -> None:
    """The preflight of a run; its lines go to stderr and to run.json.

    Raises:
        SkipwiseError: a check failed.
    """
    checks, num_parameters = _preflight(prepared, data, run)
    record_checks(run, checks)
    if num_parameters:
        run.update(model={**run.metadata().get("model", {}), "num_parameters": num_parameters})
    require(checks)


def check_texts(
    prepared: PreparedModel, data: TrainingData, run: RunFolder, num_processes: int = 0
) -> None:
    """The part of the preflight that needs no model.

    Raises:
        SkipwiseError: a check failed.
    """
    checks = _text_checks(prepared, data, run, num_processes)
    record_checks(run, checks)
    require(checks)


def _text_checks(
    prepared: PreparedModel, data: TrainingData, run: RunFolder, num_processes: int = 0
) -> list[Check]:
    checks = check_data(
        prepared, data, evaluation_documents(prepared.recipe, prepared.tokenizer, run)
    )
    finish = make_full_length_stage(prepared, data, run, num_processes)
    return checks if finish is None else [*checks, check_long_text(finish)]


def _preflight(
    prepared: PreparedModel, data: TrainingData | None, run: RunFolder
) -> tuple[list[Check], int | None]:
    """All checks, and the number of parameters; what fails without weights stops before them."""
    recipe, T = prepared.recipe, prepared.recipe.target_length
    if data is None:
        checks = check_config(prepared.info, prepared.scaling, T)
        model: Any = load_model(
            prepared.source, prepared.scaled, prepared.load, dtype=compute_dtype(recipe.load)
        )
        checks += check_model(model, prepared.scaled, prepared.info, prepared.scaling, T)
    elif recipe.data.sources:
        checks = _text_checks(prepared, data, run)
    else:
        checks = check_config(prepared.info, prepared.scaling, T)
    if not all(check.passed for check in checks):
        return checks, None
    if data is not None:
        training = set_up(first_stage_model(prepared), data, run)
        checks += training.checks
        count = training.num_parameters
        del training
        finish = make_full_length_stage(prepared, data, run)
        if finish is not None and all(c.passed for c in checks) and not is_checked(finish, run):
            free_memory()
            checks.append(check_step(finish, run))
    else:
        count = num_parameters(model)
        del model
    free_memory()
    return checks, count


def record_checks(run: RunFolder, checks: list[Check]) -> None:
    for one in checks if is_main_process() else []:
        print(f"  {one}", file=sys.stderr, flush=True)
    names = {one.name for one in checks}
    old = [c for c in run.metadata().get("checks", []) if c["name"] not in names]
    new = [dataclasses.asdict(c) for c in checks]
    for one in new:
        one["numbers"] = {k: v for k, v in one["numbers"].items() if math.isfinite(v)}
    run.update(checks=old + new)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
