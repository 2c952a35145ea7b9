"""The stages of a run, one function each; `extend.py` and the verbs call them in order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from skipwise.config.recipe import Recipe, context_lengths
from skipwise.config.run_folder import RunFolder, open_run
from skipwise.config.stages import finish_part
from skipwise.errors import Check, SkipwiseError, require
from skipwise.evaluation.evaluator import Texts, evaluate_model
from skipwise.evaluation.run import evaluation_documents, subject
from skipwise.export.gguf import OUTTYPES, check_gguf, find_converter, to_gguf
from skipwise.export.hf import export_adapter, export_model
from skipwise.export.model_card import write_card
from skipwise.models.prepared import ModelPlan, plan_model, ready_weights
from skipwise.pipeline.checks import check_texts, free_memory, record_checks
from skipwise.pipeline.choose_checkpoint import check_selection, chosen_checkpoint
from skipwise.pipeline.choose_scaling import choose_scaling, with_choice
from skipwise.pipeline.choose_temperature import chosen_temperature
from skipwise.pose.preview import describe_positions
from skipwise.report import format_table, write_report
from skipwise.training.arguments import accumulation
from skipwise.training.checkpoints import finished_checkpoint, trained_checkpoint
from skipwise.training.distributed.launcher import launch
from skipwise.training.full_length_stage import (
    check_step,
    finish_facts,
    first_plan,
    is_checked,
    plan_finish,
    release,
    train_finish,
)
from skipwise.training.inputs import (
    TrainingData,
    data_facts,
    find_sources,
    load_training_data,
    text_changed,
)
from skipwise.training.setup import set_up, train


def prepare_run(plan: ModelPlan, run: RunFolder, num_processes: int = 0) -> TrainingData | None:
    """Tokens and examples, written down in run.json; None where nothing is trained.

    Args:
        num_processes: that will train; 0: as many as run now.
    """
    recipe = plan.recipe
    model: dict[str, Any] = {"name": Path(recipe.model).name, "family": plan.facts.family}
    if plan.conversion is not None:
        model["converted"] = f"{plan.conversion.source} to {plan.conversion.target}"
    facts: dict[str, Any] = {
        "model": {**run.facts().get("model", {}), **model},
        "original_length": plan.facts.original_length,
        "train_length": plan.facts.original_length,
        "target_length": recipe.target_length,
        "rope": plan.scaled.rope_parameters,
        "scaling": plan.scaling.name,
        "reproduce": [run.facts().get("command", ""), f"skipwise report {run.path}"],
    }
    data = None
    if recipe.method != "none":
        data = load_training_data(plan, run)
        documents = evaluation_documents(recipe, plan.tokenizer, run)
        check_selection(recipe, documents, plan.tokenizer, plan.facts.original_length)
        facts["train_length"] = data.sampler.train_length
        facts["positions"] = describe_positions(data.sampler, recipe.seed)
        if not text_changed(run, data.digest):  # else it is trained, and stays as it was
            facts["data"] = data_facts(plan, data, len(documents))
            if (finish := plan_finish(plan, data, run, num_processes)) is not None:
                facts["finish"] = {**run.facts().get("finish", {}), **finish_facts(finish)}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "num_gpus": torch.cuda.device_count()}
        facts["machine"] = {**run.facts().get("machine", {}), **gpu}
    run.update(**facts)
    return data


def open_training(recipe: Recipe, out: str | Path, command: str, num_processes: int) -> RunFolder:
    """The run folder of a training that other processes will do; mistakes show here, once."""
    accumulation(recipe.training, num_processes)
    plan = plan_model(recipe)
    finish_part(plan.recipe, plan.facts.original_length, num_processes)
    find_sources(recipe)
    return open_run(out, recipe, command)


def launch_training(run: RunFolder, num_processes: int, only_check: bool = False) -> None:
    """Train, or check, in processes of their own; those that evaluate hold no GPU memory then.

    Raises:
        SkipwiseError: a process failed. RunStopped: stopped and saved.
    """
    free_memory()
    if trained_checkpoint(run, run.recipe()):
        return
    launch(["train", str(run.path), *(["--dry-run"] if only_check else [])], num_processes)


def prepare_training(
    recipe: Recipe, out: str | Path, command: str
) -> tuple[ModelPlan, TrainingData, RunFolder]:
    """What the train verb needs, in each of its processes."""
    plan_model(recipe)  # mistakes show before anything is written
    find_sources(recipe)
    if recipe.method == "none":
        raise SkipwiseError("method: none trains nothing: type skipwise extend or export")
    run = open_run(out, recipe, command)
    plan = ready_weights(plan_model(with_choice(recipe, run)), run.converted)
    data = prepare_run(plan, run)
    assert data is not None
    check_texts(plan, data, run)
    return plan, data, run


def evaluate_run(plan: ModelPlan, run: RunFolder, label: str) -> None:
    """Measure the base model (`before`) or the exported one (`after`) into results.json."""
    recipe = plan.recipe
    model, settings = (
        (plan.source, plan.load)
        if label == "before"
        else (str(run.model), recipe.load.of_own_folder())
    )
    lengths = list(context_lengths(recipe, plan.facts.original_length))
    with run.lock():
        evaluate_model(
            subject(label, model, settings, lengths, plan.tokenizer),
            Texts(documents=evaluation_documents(recipe, plan.tokenizer, run)),
            lengths,
            recipe.eval,
            done=run.results(),
            save=run.write_results,
        )
    free_memory()


def train_run(
    plan: ModelPlan,
    data: TrainingData | None,
    run: RunFolder,
    *,
    record: bool = False,
    only_check: bool = False,
) -> None:
    """Train from the newest checkpoint to the end, if that is not done.

    Args:
        record: write the preflight down, where `check_run` has not.
        only_check: stop after it.

    Raises:
        SkipwiseError: another process trains into the folder; and as `train.train`.
        RunStopped: the user stopped it.
    """
    if data is None or trained_checkpoint(run, plan.recipe):
        return
    with run.training_lock():
        _train_parts(plan, data, run, record, only_check)


def _train_parts(
    plan: ModelPlan, data: TrainingData, run: RunFolder, record: bool, only_check: bool
) -> None:
    finish = plan_finish(plan, data, run)
    if finish is not None and (only_check or not is_checked(finish, run)):
        record_checks(run, [check_step(finish, run)])
        free_memory()
    first = first_plan(plan)
    begun = finish is not None and finish.begun
    if not begun and not finished_checkpoint(run, first.recipe.training.num_steps):
        training = set_up(first, data, run)
        count = training.num_parameters

        def write_down(checks: list[Check]) -> None:
            record_checks(run, checks)
            run.update(model={**run.facts().get("model", {}), "num_parameters": count})

        arguments: dict[str, Any] = {"record": write_down} if record else {}
        train(training, run, first.recipe, only_check=only_check, **arguments)
        if finish is not None:
            release(training)
        del training
        free_memory()
    if finish is not None and not only_check:
        train_finish(finish, run)
        free_memory()


def export_run(plan: ModelPlan, run: RunFolder) -> None:
    """Write and check `model/`, if that is not done.

    Raises:
        SkipwiseError: the folder does not give the same logits in plain transformers.
    """
    if run.facts().get("exported") and run.model.is_dir():
        return
    checkpoint = chosen_checkpoint(plan, run)
    checks = export_model(plan, run, checkpoint, chosen_temperature(plan, run, checkpoint))
    record_checks(run, checks)
    require(checks)
    run.update(exported=True)


def export_again(
    run: RunFolder, kinds: list[str], outtype: str = "f16", llama_cpp: str | None = None
) -> list[Path]:
    """Write what is asked for anew: the folder (`hf`), GGUF (`gguf`), the `adapter` alone.

    Returns:
        what was written.

    Raises:
        SkipwiseError: the run is not trained, a check failed, no converter for GGUF.
    """
    if outtype not in OUTTYPES:
        raise SkipwiseError(f"--outtype {outtype}: choose from {', '.join(OUTTYPES)}")
    converter = find_converter(llama_cpp) if "gguf" in kinds else None  # before anything is done
    recipe, written = run.recipe(), []
    model_too = "hf" in kinds or (converter is not None and not run.model.is_dir())
    if model_too or "adapter" in kinds:
        plan = choose_scaling(ready_weights(plan_model(recipe), run.converted), run)
        if model_too:
            run.update(exported=False)
            export_run(plan, run)
            report_run(run)
            written.append(run.model)
        if "adapter" in kinds:
            checks = export_adapter(plan, run, chosen_checkpoint(plan, run))
            record_checks(run, checks)
            require(checks)
            written.append(run.adapter)
    if converter is not None:
        run.gguf.mkdir(exist_ok=True)
        file = run.gguf / f"{recipe.run_name}-{outtype}.gguf"
        to_gguf(run.model, file, outtype, converter=converter, name=recipe.run_name)
        record_checks(run, check_gguf(file, run.model))
        written.append(file)
    return written


def report_run(run: RunFolder) -> str:
    """The page, the model card, and the table, which is returned."""
    table = format_table(run.results())
    write_report(run.path)
    if run.model.is_dir():
        write_card(run)
    return table
