"""`train_length: auto`: the closest to full length that machine, documents and max_cost allow.

The options and their expected distances are those of `skipwise plan` (planning/train_lengths.py),
for the device of this process. Chosen once in a run and kept in run.json; a resumed run, and one
that goes on elsewhere, trains as it began.
"""

from __future__ import annotations

import dataclasses
import sys

import numpy as np

from skipwise.config.machine import is_main_process
from skipwise.config.run_folder import RunFolder
from skipwise.errors import Check, SkipwiseError, first_line
from skipwise.models.load import compute_dtype
from skipwise.models.prepared import PreparedModel
from skipwise.planning.job import read_model
from skipwise.planning.train_lengths import choose_length, length_options, with_train_length
from skipwise.training.arguments import device_memory, this_device
from skipwise.training.inputs import load_training_data

_ENTRY = "train_length_choice"  # of run.json
_KEPT = 0.5  # of the tokens that examples of L tokens can use, those that longer ones must keep


def with_chosen_length(prepared: PreparedModel, run: RunFolder) -> PreparedModel:
    """The model with the training length that this run chose before, if it did."""
    entry = run.metadata().get(_ENTRY)
    if prepared.recipe.train_length != "auto" or entry is None:
        return prepared
    L = prepared.info.original_length
    recipe = with_train_length(prepared.recipe, entry["train_length"], L, entry["num_gpus"])
    return dataclasses.replace(prepared, recipe=recipe)


def choose_train_length(
    prepared: PreparedModel, run: RunFolder, num_processes: int = 1, dummy: bool = False
) -> PreparedModel:
    """The model with a training length for `auto`.

    Args:
        dummy: there is no text, so every length is long enough.

    Raises:
        SkipwiseError: the text cannot be loaded.
    """
    asked = prepared.recipe.train_length == "auto" and prepared.recipe.method != "none"
    if asked and _ENTRY not in run.metadata():
        entry = _choose(prepared, None if dummy else run, num_processes)
        run.update(any_rank=False, **{_ENTRY: entry})
        if is_main_process():
            print(f"  train_length: {entry['detail']}", file=sys.stderr, flush=True)
    return with_chosen_length(prepared, run)


def length_check(run: RunFolder) -> list[Check]:
    """The preflight's line on the training length that this run chose."""
    entry = run.metadata().get(_ENTRY)
    return [Check(name="train_length", passed=True, detail=entry["detail"])] if entry else []


def _choose(
    prepared: PreparedModel, run: RunFolder | None, num_processes: int
) -> dict[str, object]:
    """The entry of run.json."""
    recipe, L = prepared.recipe, prepared.info.original_length
    found: dict[str, object] = {"train_length": L, "num_gpus": num_processes}
    device = this_device(compute_dtype(recipe.load), device_memory())
    try:
        options = length_options(recipe, *read_model(recipe), device, num_processes)
    except SkipwiseError as error:  # a config from which the plan cannot count
        return {**found, "detail": f"{L:,} tokens: {first_line(error)}"}
    lengths = np.array([recipe.target_length])
    if run is not None:
        corpus = load_training_data(prepared, run).corpus
        packs = corpus.short_documents == "pack"  # at any length: nothing is dropped
        lengths = np.array([corpus.num_tokens]) if packs else np.concatenate(corpus.lengths)
    shares = {option.length: kept_share(lengths, option.length) for option in options}

    def obstacle(length: int) -> str:
        if shares[length] >= _KEPT:
            return ""
        return f"would drop {100 * (1 - shares[length]):.0f} % of the text"

    best, why = choose_length(options, obstacle)
    return {**found, "train_length": best.length, "detail": why, "text": shares}


def kept_share(lengths: np.ndarray, train_length: int) -> float:
    """The share of the tokens that is in documents of M tokens or more.

    Args:
        lengths: (n,) tokens of the documents that examples of L tokens use.
    """
    return float(lengths[lengths >= train_length].sum() / max(1, lengths.sum()))
