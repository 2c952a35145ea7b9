"""The whole job: check -> evaluate before -> train -> export -> evaluate after -> report.

Each stage writes into the run folder and is skipped when its result exists. The same command, typed
again, resumes a run that was stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from skipwise.config.recipe import Recipe, with_known_revision
from skipwise.config.run_folder import RunFolder, open_run
from skipwise.models.prepared import convert_weights
from skipwise.pipeline.checks import check_run, check_texts, validate
from skipwise.pipeline.choose_checkpoint import check_selection
from skipwise.pipeline.choose_scaling import choose_scaling
from skipwise.pipeline.choose_separator import choose_separator
from skipwise.pipeline.choose_train_length import choose_train_length
from skipwise.pipeline.estimate import compare_estimate, estimate_run
from skipwise.pipeline.stages import (
    evaluate_run,
    evaluate_untrained,
    export_run,
    launch_training,
    prepare_run,
    report_run,
    train_run,
)
from skipwise.training.checkpoints import (
    known_identity,
    resume_decisions,
    trained_checkpoint,
)
from skipwise.training.inputs import load_training_data

STAGES = ("check", "evaluate before", "train", "export", "evaluate after", "report")


def extend(
    recipe: Recipe, out: str | Path, *, command: str = "skipwise extend", num_processes: int = 0
) -> RunFolder:
    """Run every stage, from a recipe to an exported model with its report.

    Args:
        num_processes: number of training processes, each on a GPU of this machine. 0 trains in
            this process, which runs all other stages in any case.

    Returns:
        the run folder: `model/`, `report/index.html`, `results.json`.

    Raises:
        SkipwiseError: see the stages. Finished stages are kept and not repeated.
        RunStopped: the user stopped it.
    """
    trained = trained_checkpoint(RunFolder(out), recipe) is not None
    num_processes = 0 if trained else num_processes  # the rest is work for one process
    unmeasured = not RunFolder(out).results()
    asked, recipe = recipe, with_known_revision(recipe, known_identity(RunFolder(out)))
    prepared = validate(recipe, num_processes or 1, trained=trained, load=unmeasured)
    if recipe.export.checkpoint == "passkey":
        check_selection(recipe, [], prepared.prompt_tokenizer, prepared.info.original_length)
    run = open_run(out, asked, command)
    with _stage(run, "check"):
        resume_decisions(prepared, run)
        prepared = choose_separator(convert_weights(prepared, run.converted), run)
        prepared = choose_train_length(prepared, run, num_processes or 1)
        data = None if recipe.method == "none" else load_training_data(prepared, run)
        prepared = choose_scaling(prepared, run, data)
        inputs = prepare_run(prepared, run, data, num_processes)
        if trained:
            print("  ok   training is done, nothing to check", file=sys.stderr, flush=True)
        elif num_processes and inputs is not None:
            check_texts(prepared, inputs, run)
            launch_training(run, num_processes, only_check=True)
        else:
            check_run(prepared, inputs, run)
        if not trained and inputs is not None:
            estimate_run(prepared.recipe, run, num_processes)
    with _stage(run, "evaluate before"):
        evaluate_run(prepared, run, "before")
        evaluate_untrained(prepared, run, data)
    with _stage(run, "train"):
        if num_processes and inputs is not None:
            launch_training(run, num_processes)
        else:
            train_run(prepared, inputs, run)
    with _stage(run, "export"):
        export_run(prepared, run, data)
    with _stage(run, "evaluate after"):
        evaluate_run(prepared, run, "after")
    compare_estimate(run)
    with _stage(run, "report"):
        run.update(status="finished")
        report_run(run)
    return run


@contextmanager
def _stage(run: RunFolder, name: str) -> Iterator[None]:
    """Announce a stage, and write down how long it took."""
    print(f"[{STAGES.index(name) + 1}/{len(STAGES)}] {name}", file=sys.stderr, flush=True)
    started = time.monotonic()
    yield
    seconds = time.monotonic() - started
    if seconds >= 1 or name not in run.metadata().get("stages", {}):
        run.update_entry("stages", **{name: round(seconds, 1)})
