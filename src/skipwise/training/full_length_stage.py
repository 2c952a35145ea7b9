"""The stage at full length: a last fraction of the training tokens, with examples of T tokens.

It is training like any other, by `setup.set_up` and `setup.train`, with its own recipe, data and
folder: `finish/` in the run folder, which holds its checkpoints. Its metrics and candidates go to
the run's own files. Only this stage holds activations of T tokens, so one step of it is tried, and
discarded, before the run takes its first step.

Letters: T = target_length
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from skipwise.config.machine import is_main_process, world_size
from skipwise.config.parse import dump_recipe
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, write_text
from skipwise.config.stages import first_stage, full_length_stage
from skipwise.data.collator import ExampleCollator
from skipwise.data.dataset import PoSEDataset
from skipwise.errors import Check, RunStopped, SkipwiseError
from skipwise.models.prepared import PreparedModel
from skipwise.pose.samplers import FullLength
from skipwise.training.callbacks import StageOffset, peak_memory_gib
from skipwise.training.checkpoints import finished_checkpoint, last_checkpoint
from skipwise.training.distributed.engines import place
from skipwise.training.inputs import TrainingData
from skipwise.training.setup import Training, set_up, train

_SEED = 1 << 40  # added to the recipe's: other documents, in another order than in the first stage


@dataclass(frozen=True, kw_only=True)
class FullLengthStage:
    """What `set_up` needs for the stage, and what earlier stages have trained."""

    prepared: PreparedModel  # with the recipe of this stage
    data: TrainingData
    run: RunFolder  # its own folder
    offset: StageOffset

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @property
    def begun(self) -> bool:
        return last_checkpoint(self.run) is not None


@dataclass(frozen=True, kw_only=True)
class RunInputs:
    """What a run trains on: the data of its first stage, and its stage at full length, if any."""

    data: TrainingData
    full_length: FullLengthStage | None


def first_stage_model(prepared: PreparedModel) -> PreparedModel:
    """The model with the recipe of the first stage."""
    return dataclasses.replace(prepared, recipe=first_stage(prepared.recipe))


def make_full_length_stage(
    prepared: PreparedModel, data: TrainingData, run: RunFolder, num_processes: int = 0
) -> FullLengthStage | None:
    """The stage at full length, or None where the recipe asks for none.

    Args:
        num_processes: number of training processes. Defaults to those that run now.

    Raises:
        SkipwiseError: no document has T tokens; the fraction is less than one step; the processes
            cannot share the batch of a stage that has started.
    """
    folder, L = run.finish, prepared.info.original_length
    batch = None
    if folder.recipe_file.exists() and last_checkpoint(folder):
        batch = folder.recipe().training.global_batch_size
    recipe = full_length_stage(prepared.recipe, L, num_processes or world_size(), batch)
    if recipe is None:
        return None
    first = first_stage(prepared.recipe).training
    T = recipe.target_length
    corpus = data.corpus.longer(T)
    if corpus is None:
        hint = "give longer texts, or type full_length={}"
        if data.corpus.short_documents == "drop" and data.corpus.num_short:
            hint += f", or data.short_documents=pack, which joins the {data.corpus.num_short:,} "
            hint += f"below {data.sampler.train_length:,} tokens"
        raise SkipwiseError(
            f"full_length.fraction: {recipe.full_length.fraction:g} needs documents of {T:,} "
            f"tokens, and the longest to train on has {data.corpus.longest:,}\n{hint}"
        )
    sampler = FullLength(target_length=T)
    settings = recipe.training
    num_examples = settings.num_steps * settings.global_batch_size
    seed = recipe.seed + _SEED
    dataset = PoSEDataset(corpus, sampler, seed=seed, num_examples=num_examples)
    num_tokens = first.num_steps * first.global_batch_size * data.sampler.train_length
    parts: Any = {"corpus": corpus, "sampler": sampler, "dataset": dataset, "short": None}
    return FullLengthStage(
        prepared=dataclasses.replace(prepared, recipe=recipe),
        data=dataclasses.replace(data, **parts, collator=ExampleCollator()),
        run=folder,
        offset=StageOffset(num_steps=first.num_steps, num_tokens=num_tokens),
    )


def make_inputs(
    prepared: PreparedModel, data: TrainingData, run: RunFolder, num_processes: int = 0
) -> RunInputs:
    """The data with the stage at full length; arguments as `make_full_length_stage` has them."""
    stage = make_full_length_stage(prepared, data, run, num_processes)
    return RunInputs(data=data, full_length=stage)


def check_long_text(stage: FullLengthStage) -> Check:
    """How much text of T tokens there is, and how often the stage reads it."""
    T, wanted = stage.recipe.target_length, len(stage.data.dataset)
    lengths = np.concatenate(stage.data.corpus.lengths)
    different = int((lengths // T).sum())
    detail = f"{len(lengths):,} documents of {T:,} tokens or more, {wanted:,} examples of them"
    if wanted > different:
        detail += f"; each stretch of text is read about {wanted / different:.2g} times"
    return Check(name="full-length text", passed=True, detail=detail)


def check_step(stage: FullLengthStage, run: RunFolder) -> Check:
    """Try a step of two passes with the base weights; it is not saved.

    Raises:
        SkipwiseError: the step fails, for example out of memory.
        RunStopped: the user stopped it.
    """
    settings, trainer = stage.recipe.training, {**stage.recipe.trainer, "report_to": "none"}
    passes = min(2, settings.global_batch_size // world_size())
    batch = passes * world_size()
    settings = dataclasses.replace(settings, num_steps=1, global_batch_size=batch, warmup_steps=0)
    recipe = dataclasses.replace(stage.recipe, training=settings, trainer=trainer)
    with _scratch(stage.run.path / "trial") as scratch:
        training = set_up(dataclasses.replace(stage.prepared, recipe=recipe), stage.data, scratch)
        training.trainer.add_callback(_Unsaved())
        try:
            train(training, scratch, recipe)
        except RunStopped:
            raise RunStopped("stopped before the first step\ntype it again") from None
        release(training)
    length, said = stage.recipe.target_length, "2 passes" if passes == 2 else "a pass"
    run.update_entry("finish", checked_on=place(stage.recipe))
    detail = f"tried: {said} of {length:,} tokens a process, and an update, "
    detail += f"{peak_memory_gib():.2f} GiB at the peak"
    return Check(name="full-length step", passed=True, detail=detail)


def is_checked(stage: FullLengthStage, run: RunFolder) -> bool:
    """Whether a step was tried on a machine like this one."""
    return run.metadata().get("finish", {}).get("checked_on") == place(stage.recipe)


def train_full_length(stage: FullLengthStage, run: RunFolder) -> None:
    """Train the stage to its last step, and write its metadata into the run's run.json.

    Raises:
        SkipwiseError, RunStopped: as `setup.train`.
    """
    if is_main_process():
        stage.run.path.mkdir(parents=True, exist_ok=True)
        write_text(stage.run.recipe_file, dump_recipe(stage.recipe))
    checkpoint = finished_checkpoint(run, stage.offset.num_steps)
    assert checkpoint is not None or stage.begun, "the first stage is not trained"

    def write_down(taken: dict[str, Any]) -> None:  # its seconds are those of the whole curve
        earlier = run.metadata().get("training", {}).get("seconds") or 0.0
        taken = {**taken, "seconds": round(taken["seconds"] - earlier, 3)}
        run.update_entry("finish", **{**full_length_metadata(stage), **taken})

    offset = dataclasses.replace(stage.offset, checkpoint=checkpoint)
    training = set_up(stage.prepared, stage.data, stage.run, offset)
    train(training, stage.run, stage.recipe, write_down=write_down)
    release(training)


def full_length_metadata(stage: FullLengthStage) -> dict[str, Any]:
    """What run.json says about the stage before it is trained."""
    settings, T = stage.recipe.training, stage.recipe.target_length
    examples = settings.num_steps * settings.global_batch_size
    return {
        "share": stage.recipe.full_length.fraction,
        "learning_rate": settings.learning_rate,
        "num_steps": settings.num_steps,
        "batch_size": settings.global_batch_size,
        "tokens_per_step": settings.global_batch_size * T,
        "num_tokens": examples * T,
        "num_documents": stage.data.corpus.num_documents,
    }


def release(training: Training) -> None:
    """Free what a Trainer's accelerator holds, because another Trainer follows in this process."""
    trainer: Any = training.trainer
    trainer.accelerator.free_memory()


@contextmanager
def _scratch(path: Path) -> Iterator[RunFolder]:
    """A folder that all processes share and that is removed afterwards."""
    if is_main_process():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    try:
        yield RunFolder(path)
        if world_size() > 1:
            torch.distributed.barrier()  # all have read what they need
    finally:
        if is_main_process():
            shutil.rmtree(path, ignore_errors=True)


class _Unsaved(TrainerCallback):
    """Saves no checkpoint of the trial step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = False
