"""The stages of a run, one function each; `extend.py` and the verbs call them in order."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import torch

from skipwise.config.machine import is_main_process, world_size
from skipwise.config.progress import Progress
from skipwise.config.recipe import Recipe, context_lengths, model_name, with_known_revision
from skipwise.config.run_folder import RunFolder, open_run
from skipwise.errors import Check, SkipwiseError, require
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model
from skipwise.evaluation.run import (
    eval_settings,
    evaluation_documents,
    make_eval_model,
    make_evaluator,
)
from skipwise.export.gguf import OUTTYPES, check_gguf, find_converter, to_gguf
from skipwise.export.hf import export_adapter, export_model, load_for_scoring
from skipwise.export.hub import gguf_model
from skipwise.export.model_card import public_name, write_card
from skipwise.export.runtimes import check_export
from skipwise.models.attention.temperature import fold_temperature
from skipwise.models.hf_config import is_local
from skipwise.models.identity import changed_note, digests, folder_digests
from skipwise.models.load import free_memory
from skipwise.models.prepared import PreparedModel, convert_weights, prepare_model, rescale
from skipwise.models.scaled_config import auto_scalings
from skipwise.pipeline.checks import check_texts, record_checks, validate
from skipwise.pipeline.choose_checkpoint import check_selection, chosen_checkpoint
from skipwise.pipeline.choose_scaling import choose_scaling, with_chosen_scaling
from skipwise.pipeline.choose_separator import with_chosen_separator
from skipwise.pipeline.choose_temperature import chosen_temperature, untrained_temperature
from skipwise.pipeline.choose_train_length import choose_train_length, with_chosen_length
from skipwise.pose.preview import describe_positions
from skipwise.report import format_table, write_report
from skipwise.report.area import ends_of
from skipwise.training.checkpoints import (
    check_decisions,
    finished_checkpoint,
    known_identity,
    resume_decisions,
    trained_checkpoint,
)
from skipwise.training.distributed.launcher import launch
from skipwise.training.full_length_stage import (
    RunInputs,
    check_step,
    first_stage_model,
    full_length_metadata,
    is_checked,
    make_inputs,
    release,
    train_full_length,
)
from skipwise.training.inputs import TrainingData, data_metadata, load_training_data, text_changed
from skipwise.training.setup import set_up, train


def prepare_run(
    prepared: PreparedModel,
    run: RunFolder,
    data: TrainingData | None = None,
    num_processes: int = 0,
) -> RunInputs | None:
    """What the run trains on, with its description in run.json; None where nothing is trained.

    Args:
        data: training data that are loaded already. Loaded here by default.
        num_processes: number of training processes. Defaults to those that run now.
    """
    recipe = prepared.recipe
    model: dict[str, Any] = {"name": model_name(recipe.model), "family": prepared.info.family}
    before = run.metadata()  # what is local is decided when the run begins, and kept
    model["hub"] = before.get("model", {}).get("hub", not is_local(recipe.model))
    if prepared.conversion is not None:
        model["converted"] = f"{prepared.conversion.source} to {prepared.conversion.target}"
    metadata: dict[str, Any] = {
        "model": {**run.metadata().get("model", {}), **model},
        "original_length": prepared.info.original_length,
        "train_length": prepared.info.original_length,
        "target_length": recipe.target_length,
        "rope": prepared.scaled.rope_parameters,
        "scaling": prepared.scaling.name,
        "reproduce": [run.metadata().get("command", ""), f"skipwise report {run.path}"],
    }
    inputs = None
    if recipe.method != "none":
        data = load_training_data(prepared, run) if data is None else data
        around, tokenizer = prepared.separator, prepared.prompt_tokenizer
        documents = evaluation_documents(recipe, tokenizer, run, separator=around)
        check_selection(recipe, documents, tokenizer, prepared.info.original_length)
        metadata["train_length"] = data.sampler.train_length
        metadata["positions"] = describe_positions(data.sampler, recipe.seed)
        if text_changed(run, data.digest):  # only after training: what was written stays
            inputs = RunInputs(data=data, full_length=None)
        else:
            inputs = make_inputs(prepared, data, run, num_processes)
            found = data_metadata(prepared, data, len(documents))
            found["hub_sources"] = before.get("data", {}).get("hub_sources", found["hub_sources"])
            metadata["data"] = found
            if inputs.full_length is not None:
                found = full_length_metadata(inputs.full_length)
                metadata["finish"] = {**run.metadata().get("finish", {}), **found}
    if torch.cuda.is_available():
        gpu = {"gpu": torch.cuda.get_device_name(), "num_gpus": torch.cuda.device_count()}
        metadata["machine"] = {**run.metadata().get("machine", {}), **gpu}
    run.update(**metadata)
    if is_main_process() and not (inputs and text_changed(run, inputs.data.digest)):
        check_decisions(run)
    return inputs


def open_training(recipe: Recipe, out: str | Path, command: str, num_processes: int) -> RunFolder:
    """The run folder of a training that other processes will do, after one validation here."""
    validate(recipe, num_processes)
    return open_run(out, recipe, command)


def launch_training(run: RunFolder, num_processes: int, only_check: bool = False) -> None:
    """Train, or only check, in new processes, so that this one holds no GPU memory meanwhile.

    Raises:
        SkipwiseError: a process failed. RunStopped: stopped and saved.
    """
    free_memory()
    recipe = run.recipe()
    if trained_checkpoint(run, recipe):
        return
    options = ["--dry-run"] if only_check else []
    if recipe.load.is_hub_kernel:  # named by the user, or this run would not be here
        options += [f"load.attn_implementation={recipe.load.attn_implementation}"]
    launch(["train", str(run.path), *options], num_processes)


def prepare_training(
    recipe: Recipe, out: str | Path, command: str
) -> tuple[PreparedModel, RunInputs, RunFolder]:
    """What the train verb needs, in each of its processes."""
    prepared = validate(with_known_revision(recipe, known_identity(RunFolder(out))), world_size())
    if recipe.method == "none":
        raise SkipwiseError("method: none trains nothing: type skipwise extend or export")
    run = open_run(out, recipe, command)
    resume_decisions(prepared, run)
    prepared = with_chosen_separator(convert_weights(prepared, run.converted), run)
    prepared = choose_train_length(prepared, run, world_size())
    prepared = with_chosen_scaling(prepared, run)
    if auto_scalings(prepared.recipe, prepared.info)[0]:  # this verb measures nothing
        prepared = rescale(prepared, prepared.scaling.name)
    inputs = prepare_run(prepared, run)
    assert inputs is not None
    check_texts(prepared, inputs, run)
    return prepared, inputs, run


def evaluate_run(prepared: PreparedModel, run: RunFolder, label: str) -> None:
    """Measure the base model (`before`) or the exported one (`after`) into results.json."""
    recipe = prepared.recipe
    model, settings = prepared.source, prepared.load
    if label != "before":
        model, settings = str(run.model), recipe.load.of_own_folder()
    lengths = list(context_lengths(recipe, prepared.info.original_length))
    around, tokenizer = prepared.separator, prepared.tokenizer
    of_model = make_eval_model(label, model, settings, lengths, tokenizer, around)
    _evaluate(prepared, run, of_model, lengths)


def _evaluate(
    prepared: PreparedModel, run: RunFolder, model: EvalModel, lengths: list[int]
) -> None:
    """The base chooses LongPPL's key tokens by default."""
    recipe, tokenizer = prepared.recipe, prepared.tokenizer
    documents = evaluation_documents(recipe, tokenizer, run, separator=prepared.separator)
    base = make_eval_model("before", prepared.source, prepared.load, [], tokenizer)
    with run.lock():
        evaluate_model(
            model,
            Texts(documents=documents),
            lengths,
            eval_settings(recipe, run),
            done=run.results(),
            save=run.write_results,
            evaluator=make_evaluator(recipe, base, tokenizer, lengths, run),
        )
    free_memory()


def evaluate_untrained(
    prepared: PreparedModel, run: RunFolder, data: TrainingData | None = None
) -> None:
    """Measure the base with the run's scaling and its best temperature (`untrained`).

    It tells what training adds to rescaling. Nothing to do for `method: none`, which exports it.
    """
    recipe = prepared.recipe
    if recipe.method == "none" or not recipe.eval.untrained:
        return
    temperature = untrained_temperature(prepared, run, data)

    def load() -> Any:
        model = load_for_scoring(prepared, None)
        if temperature != 1:
            fold_temperature(model, temperature)
        return model

    lengths = list(context_lengths(recipe, prepared.info.original_length))
    around, tokenizer = prepared.separator, prepared.tokenizer
    source, settings = prepared.source, prepared.load
    plain = make_eval_model("untrained", source, settings, [], tokenizer, around)
    scaled = [prepared.scaled.to_dict(), temperature]
    own = {"identity": [plain.identity, scaled], "weights": [plain.weights, scaled]}
    _evaluate(prepared, run, dataclasses.replace(plain, load=load, **own), lengths)


def train_run(
    prepared: PreparedModel,
    inputs: RunInputs | None,
    run: RunFolder,
    *,
    record: bool = False,
    only_check: bool = False,
) -> None:
    """Train every stage to its last step, from the last checkpoint on.

    Args:
        record: write the preflight down, where `check_run` has not.
        only_check: stop after the preflight.

    Raises:
        SkipwiseError: another process trains in this folder; and as `setup.train`.
        RunStopped: the user stopped it.
    """
    if inputs is None or trained_checkpoint(run, prepared.recipe):
        return
    with run.training_lock():
        _train_stages(prepared, inputs, run, record, only_check)


def _train_stages(
    prepared: PreparedModel, inputs: RunInputs, run: RunFolder, record: bool, only_check: bool
) -> None:
    full_length = inputs.full_length
    if full_length is not None and (only_check or not is_checked(full_length, run)):
        record_checks(run, [check_step(full_length, run)])
        free_memory()
    first = first_stage_model(prepared)
    begun = full_length is not None and full_length.begun
    if not begun and not finished_checkpoint(run, first.recipe.training.num_steps):
        training = set_up(first, inputs.data, run, trial=True)
        count = training.num_parameters

        def write_down(checks: list[Check]) -> None:
            record_checks(run, checks)
            run.update_entry("model", num_parameters=count)

        arguments: dict[str, Any] = {"record": write_down} if record else {}
        train(training, run, first.recipe, only_check=only_check, **arguments)
        if full_length is not None:
            release(training)
        del training
        free_memory()
    if full_length is not None and not only_check:
        train_full_length(full_length, run)
        free_memory()


def export_run(prepared: PreparedModel, run: RunFolder, data: TrainingData | None = None) -> None:
    """Write and check `model/`, if that is not done.

    Args:
        data: training data that are loaded already.

    Raises:
        SkipwiseError: plain transformers computes other logits from the folder, or a runtime would
            load another window or other frequencies. The folder is kept, and checked again.
    """
    if run.metadata().get("exported") and run.model.is_dir():
        if note := changed_note(run.model, run.metadata()):
            print(f"  {note}", file=sys.stderr, flush=True)
    else:
        checkpoint = chosen_checkpoint(prepared, run)
        temperature = chosen_temperature(prepared, run, checkpoint, data)
        with Progress("export", None):
            checks = export_model(prepared, run, checkpoint, temperature)
        record_checks(run, checks)
        require(checks)
        run.update(exported=True, exported_files={})
    check = check_export(run.model, prepared.scaling, prepared.recipe.target_length)
    record_checks(run, [check])
    if not check.passed:
        raise SkipwiseError(
            f"{run.model} is written, but not every runtime would load it as it was trained\n"
            f"{check.detail}\ncorrect {run.model / 'config.json'}, and type the command again"
        )
    if not run.metadata().get("exported_files"):  # once it is as the user has it, if corrected
        run.update(exported_files=folder_digests(run.model))


def export_again(
    run: RunFolder, kinds: list[str], outtype: str = "f16", llama_cpp: str | None = None
) -> list[Path]:
    """Export a run again: the model folder (`hf`), a GGUF file (`gguf`), the `adapter` alone.

    Returns:
        the paths that were written.

    Raises:
        SkipwiseError: the run is not trained, a check failed, no GGUF converter was found.
    """
    if outtype not in OUTTYPES:
        raise SkipwiseError(f"--outtype {outtype}: choose from {', '.join(OUTTYPES)}")
    converter = find_converter(llama_cpp) if "gguf" in kinds else None  # before anything is written
    recipe, written = run.recipe(), []
    model_too = "hf" in kinds or (converter is not None and not run.model.is_dir())
    if model_too or "adapter" in kinds:
        if recipe.load.is_hub_kernel:  # whose code nobody typed here, and which writes no file
            load = dataclasses.replace(recipe.load, attn_implementation="auto")
            recipe = dataclasses.replace(recipe, load=load)
        prepared = prepare_model(with_known_revision(recipe, known_identity(run)))
        resume_decisions(prepared, run)
        prepared = convert_weights(prepared, run.converted)
        prepared = with_chosen_length(with_chosen_separator(prepared, run), run)
        prepared = choose_scaling(prepared, run)
        run.update(rope=prepared.scaled.rope_parameters)
        check_decisions(run)
        if model_too:
            run.update(exported=False)
            export_run(prepared, run)
            report_run(run)
            written.append(run.model)
        if "adapter" in kinds:
            checks = export_adapter(prepared, run, chosen_checkpoint(prepared, run))
            record_checks(run, checks)
            require(checks)
            written.append(run.adapter)
    if converter is not None:
        run.gguf.mkdir(exist_ok=True)
        name = public_name(run)
        file = run.gguf / f"{name}-{outtype}.gguf"
        with Progress(f"export {file.name}", None):
            to_gguf(run.model, file, outtype, converter=converter, name=name)
            checks = check_gguf(file, run.model)
        record_checks(run, checks)
        about = {"file": digests({"": file})[""], "model": gguf_model(run.metadata())}
        run.update_entry("gguf_files", **{file.name: about})
        written.append(file)
    return written


def report_run(run: RunFolder) -> str:
    """Write the page and the model card; returns the table."""
    table = format_table(run.results(), ends=ends_of(run.metadata()))
    write_report(run.path)
    if run.model.is_dir():
        write_card(run)
    return table
