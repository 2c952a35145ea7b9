"""The whole job: check -> evaluate before -> train -> export -> evaluate after -> report.

Each stage writes into the run folder and is left out when its result is there, so a run that was
stopped goes on where it stood when the same command is typed again.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder, open_run
from skipwise.config.stages import full_length_stage
from skipwise.models.prepared import convert_weights, prepare_model
from skipwise.pipeline.checks import check_run, check_texts
from skipwise.pipeline.choose_scaling import choose_scaling
from skipwise.pipeline.stages import (
    evaluate_run,
    export_run,
    launch_training,
    prepare_run,
    report_run,
    train_run,
)
from skipwise.training.arguments import accumulation
from skipwise.training.checkpoints import trained_checkpoint
from skipwise.training.inputs import find_sources

STAGES = ("check", "evaluate before", "train", "export", "evaluate after", "report")


def extend(
    recipe: Recipe,
    out: str | Path,
    *,
    command: str = "skipwise extend",
    num_processes: int = 0,
) -> RunFolder:
    """Everything, from a recipe to a model with its proof.

    Args:
        num_processes: that train, each on a GPU of this machine; 0: this one trains. All else is
            done by this one.

    Returns:
        the run folder: `model/`, `report/index.html`, `results.json`.

    Raises:
        SkipwiseError: see the stages; what was done before stays and is not done again.
        RunStopped: the user stopped it.
    """
    prepared = prepare_model(recipe)  # before anything is written: most mistakes show here
    trained = trained_checkpoint(RunFolder(out), recipe) is not None
    num_processes = 0 if trained else num_processes  # what is left is for one
    accumulation(recipe.training, num_processes or 1)
    if not trained:
        full_length_stage(prepared.recipe, prepared.info.original_length, num_processes or 1)
    find_sources(recipe)
    run = open_run(out, recipe, command)
    with _stage(run, "check"):
        prepared = choose_scaling(convert_weights(prepared, run.converted), run)
        data = prepare_run(prepared, run, num_processes)
        if trained:
            print("  ok   training is done: nothing left to try", file=sys.stderr, flush=True)
        elif num_processes and data is not None:
            check_texts(prepared, data, run, num_processes)
            launch_training(run, num_processes, only_check=True)
        else:
            check_run(prepared, data, run)
    with _stage(run, "evaluate before"):
        evaluate_run(prepared, run, "before")
    with _stage(run, "train"):
        if num_processes and data is not None:
            launch_training(run, num_processes)
        else:
            train_run(prepared, data, run)
    with _stage(run, "export"):
        export_run(prepared, run)
    with _stage(run, "evaluate after"):
        evaluate_run(prepared, run, "after")
    with _stage(run, "report"):
        run.update(status="finished")
        report_run(run)
    return run


@contextmanager
def _stage(run: RunFolder, name: str) -> Iterator[None]:
    """Say where the run is, and note how long the stage took."""
    print(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}", file=sys.stderr, flush=True)
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    stages = run.metadata().get("stages", {})
    if seconds >= 1 or name not in stages:
        run.update(stages={**stages, name: round(seconds, 1)})
