"""The finish: the last share of a run's tokens at full length, from the weights that PoSE has made.

It is training like any other, by `train.set_up` and `train.train`, on a recipe, data and a folder
of its own: `finish/` in the run folder, which keeps its checkpoints, while metrics and candidates
go on in the run's. It is the only part that holds activations of T tokens, so a step of it is
tried, and thrown away, before the first step of the run.

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
from skipwise.training.distributed.engines import engine_of
from skipwise.training.inputs import TrainingData
from skipwise.training.setup import Training, set_up, train

_SEED = 1 << 40  # added to the recipe's: other documents in another order than before the finish


@dataclass(frozen=True, kw_only=True)
class Finish:
    """The last part of a run's training: what `set_up` needs, and what came before it."""

    prepared: PreparedModel  # its recipe is the finish's own
    data: TrainingData
    run: RunFolder  # its own folder
    before: StageOffset

    @property
    def recipe(self) -> Recipe:
        return self.prepared.recipe

    @property
    def begun(self) -> bool:
        return last_checkpoint(self.run) is not None


def first_stage_model(prepared: PreparedModel) -> PreparedModel:
    """The plan of what is trained before the finish."""
    return dataclasses.replace(prepared, recipe=first_stage(prepared.recipe))


def make_full_length_stage(
    prepared: PreparedModel, data: TrainingData, run: RunFolder, num_processes: int = 0
) -> Finish | None:
    """The finish that the recipe asks for; None: none.

    Args:
        num_processes: that will train; 0: as many as run now.

    Raises:
        SkipwiseError: no document has T tokens; a share that is no step; processes that cannot
            share the batch of a finish that was begun.
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
        mend = "give longer texts, or type full_length={}"
        if data.corpus.short_documents == "drop" and data.corpus.num_short:
            mend += f", or data.short_documents=pack, which joins the {data.corpus.num_short:,} "
            mend += f"below {data.sampler.train_length:,} tokens"
        raise SkipwiseError(
            f"full_length.fraction: {recipe.full_length.fraction:g} needs documents of {T:,} "
            f"tokens, and the longest to train on has {data.corpus.longest:,}\n{mend}"
        )
    sampler = FullLength(target_length=T)
    settings = recipe.training
    dataset = PoSEDataset(
        corpus,
        sampler,
        seed=recipe.seed + _SEED,
        num_examples=settings.num_steps * settings.global_batch_size,
    )
    num_tokens = first.num_steps * first.global_batch_size * data.sampler.train_length
    return Finish(
        prepared=dataclasses.replace(prepared, recipe=recipe),
        data=dataclasses.replace(
            data,
            corpus=corpus,
            sampler=sampler,
            dataset=dataset,
            collator=ExampleCollator(),
        ),
        run=folder,
        before=StageOffset(num_steps=first.num_steps, num_tokens=num_tokens),
    )


def check_long_text(finish: Finish) -> Check:
    """How much text of T tokens there is, and how often the stage reads it."""
    T, wanted = finish.recipe.target_length, len(finish.data.dataset)
    lengths = np.concatenate(finish.data.corpus.lengths)
    different = int((lengths // T).sum())
    detail = f"{len(lengths):,} documents of {T:,} tokens or more, {wanted:,} examples of them"
    if wanted > different:
        detail += f": each stretch of text is read about {wanted / different:.2g} times"
    return Check(name="finish, text", passed=True, detail=detail)


def check_step(finish: Finish, run: RunFolder) -> Check:
    """Whether a step of the finish runs: a real one, of two passes, with base weights, not kept.

    Raises:
        SkipwiseError: it does not, out of memory among the reasons.
        RunStopped: the user stopped it.
    """
    settings = finish.recipe.training
    passes = min(2, settings.global_batch_size // world_size())
    settings = dataclasses.replace(
        settings, num_steps=1, global_batch_size=passes * world_size(), warmup_steps=0
    )
    recipe = dataclasses.replace(
        finish.recipe,
        training=settings,
        trainer={**finish.recipe.trainer, "report_to": "none"},
    )
    with _scratch(finish.run.path / "trial") as scratch:
        training = set_up(dataclasses.replace(finish.prepared, recipe=recipe), finish.data, scratch)
        training.trainer.add_callback(_Unsaved())
        try:
            train(training, scratch, recipe)
        except RunStopped:
            raise RunStopped("stopped before the first step\ntype it again") from None
        release(training)
    length, said = finish.recipe.target_length, "2 passes" if passes == 2 else "a pass"
    run.update(finish={**run.metadata().get("finish", {}), "checked_on": place(finish.recipe)})
    return Check(
        name="finish, step",
        passed=True,
        detail=f"tried: {said} of {length:,} tokens a process, and an update, "
        f"{peak_memory_gib():.2f} GiB at the peak",
    )


def is_checked(finish: Finish, run: RunFolder) -> bool:
    """Whether a step was tried on a machine like this one."""
    return run.metadata().get("finish", {}).get("checked_on") == place(finish.recipe)


def train_full_length(finish: Finish, run: RunFolder) -> None:
    """Train it to its end, and write into the run's run.json what it took.

    Raises:
        SkipwiseError, RunStopped: as `train.train`.
    """
    if is_main_process():
        finish.run.path.mkdir(parents=True, exist_ok=True)
        write_text(finish.run.recipe_file, dump_recipe(finish.recipe))
    checkpoint = finished_checkpoint(run, finish.before.num_steps)
    assert checkpoint is not None or finish.begun, "what comes before the finish is not trained"

    def write_down(taken: dict[str, Any]) -> None:  # its seconds are those of the whole curve
        before = run.metadata().get("training", {}).get("seconds") or 0.0
        taken = {**taken, "seconds": round(taken["seconds"] - before, 3)}
        run.update(
            finish={**run.metadata().get("finish", {}), **full_length_metadata(finish), **taken}
        )

    before = dataclasses.replace(finish.before, checkpoint=checkpoint)
    training = set_up(finish.prepared, finish.data, finish.run, before)
    train(training, finish.run, finish.recipe, write_down=write_down)
    release(training)


def full_length_metadata(finish: Finish) -> dict[str, Any]:
    """What run.json says of it before it is trained."""
    settings, T = finish.recipe.training, finish.recipe.target_length
    examples = settings.num_steps * settings.global_batch_size
    return {
        "share": finish.recipe.full_length.fraction,
        "learning_rate": settings.learning_rate,
        "num_steps": settings.num_steps,
        "batch_size": settings.global_batch_size,
        "tokens_per_step": settings.global_batch_size * T,
        "num_tokens": examples * T,
        "num_documents": finish.data.corpus.num_documents,
    }


def place(recipe: Recipe) -> str:
    """The kind of machine that trains, as far as memory goes."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{world_size()} x {device}, {engine_of(recipe)}"


def release(training: Training) -> None:
    """Let go of what a Trainer's accelerator holds: another one follows in this process."""
    trainer: Any = training.trainer
    trainer.accelerator.free_memory()


@contextmanager
def _scratch(path: Path) -> Iterator[RunFolder]:
    """A folder that the processes share, and that is gone afterwards."""
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
    """No checkpoint of the step that is tried."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = False
