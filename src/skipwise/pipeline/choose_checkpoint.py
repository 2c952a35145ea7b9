"""`export.checkpoint`: measure the saved checkpoints after training, and export the best one.

Later checkpoints can be worse at retrieval. During training the weights of every saved checkpoint
are hard-linked into `candidates/`, which takes no disk space until the checkpoint is removed. After
training each candidate is measured on a small fixed set. The latest wins among equals. `area` is
the mean over the generated tasks of `eval.tasks` and over all context lengths: see report/area.py.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from skipwise.config.recipe import EvalSettings, Recipe, context_lengths
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.evaluation.evaluator import EvalModel, Texts, evaluate_model, find_tasks
from skipwise.evaluation.run import eval_settings, evaluation_documents
from skipwise.evaluation.tasks import TASKS, Task, TaskInputs
from skipwise.evaluation.tasks.passkey import needle_trials, passkey_trials
from skipwise.evaluation.tasks.prompts import haystack_words
from skipwise.export.hf import load_for_scoring
from skipwise.models.load import free_memory
from skipwise.models.prepared import PreparedModel
from skipwise.report.area import find_areas, main_areas
from skipwise.training.checkpoints import damage, trained_checkpoint

_TRIALS = 20  # at each length
_AREA_SAMPLES = {"passkey_samples": 20, "needle_samples": 20, "ruler_samples": 5, "samples": 10}
_WINDOWS = 16


def check_selection(
    recipe: Recipe, documents: list[Any], tokenizer: Any, original_length: int
) -> None:
    """Check before training that candidates can be measured after it.

    Raises:
        SkipwiseError: the task needs evaluation text and there is none, or no prompt fits the
            context lengths.
    """
    by = recipe.export.checkpoint
    if by in ("needle", "perplexity"):
        longest = max(map(len, documents), default=0)
        if not longest or (by == "perplexity" and longest < recipe.target_length):
            raise SkipwiseError(
                f"export.checkpoint: {by} needs evaluation text"
                + (f" of {recipe.target_length:,} tokens" if by == "perplexity" else "")
                + "\ntype data.eval_sources=FILE, or export.checkpoint=passkey"
            )
    lengths = context_lengths(recipe, original_length)
    if by == "area" and not _area_tasks(recipe, lengths, documents, tokenizer):
        raise SkipwiseError(
            "export.checkpoint: area needs two context lengths and a generated task in eval.tasks "
            f"that fits the shortest, {lengths[0]:,} tokens, and the longest\n"
            "type eval.tasks=[passkey], or export.checkpoint=last"
        )
    longest = lengths[-1]
    one = {"num_trials": 1, "num_depths": 1}
    if by == "needle":
        words = haystack_words(tokenizer, documents, 2 * longest)
        fits = needle_trials(tokenizer, longest, **one, words=words)
    else:
        fits = by != "passkey" or passkey_trials(tokenizer, longest, **one)
    if not fits:
        fix = "type export.checkpoint=perplexity"
        raise SkipwiseError(f"export.checkpoint: {by}: no prompt fits {longest:,} tokens\n{fix}")


def chosen_checkpoint(prepared: PreparedModel, run: RunFolder) -> Path | None:
    """The folder of the weights to export; None where training has not reached its last step.

    Candidates without a score are measured. Those not chosen are removed.
    """
    recipe = prepared.recipe
    finished = trained_checkpoint(run, recipe)
    if finished is None or recipe.export.checkpoint == "last":
        return finished
    scores: dict[int, float] = {
        c["step"]: c["score"] for c in run.metadata().get("selection", {}).get("candidates", [])
    }
    higher = recipe.export.checkpoint != "perplexity"
    found = run.metadata().get("selection", {}).get("chosen")
    complete = (f for f in run.candidates.glob("step-*") if f.suffix != ".part")
    folders = {int(f.name.split("-")[1]): f for f in complete if not damage(f)}
    if found is not None and found in folders:
        return folders[found]
    if not folders:
        raise SkipwiseError(
            f"{run.candidates} holds no checkpoint to choose from: removed, or damaged\n"
            f"the last one is {finished}: train again with another --out to choose"
        )
    for step in sorted(folders):
        if step not in scores:
            scores[step] = _score(prepared, run, folders[step])
            print(f"  checkpoint {step}: {scores[step]:.4g}", file=sys.stderr, flush=True)
            _record(run, recipe, scores, higher, None)
    best = max(folders, key=lambda step: (scores[step] if higher else -scores[step], step))
    _record(run, recipe, scores, higher, best)
    for step, folder in folders.items():
        if step != best:
            shutil.rmtree(folder)
    return folders[best]


def _record(
    run: RunFolder, recipe: Recipe, scores: dict[int, float], higher: bool, chosen: int | None
) -> None:
    by = recipe.export.checkpoint
    run.update(
        selection={
            "by": by,
            "metric": {"perplexity": by, "area": "mean score"}.get(by, "exact match"),
            "higher_is_better": higher,
            "chosen": chosen,
            "candidates": [{"step": s, "score": scores[s]} for s in sorted(scores)],
        }
    )


def _score(prepared: PreparedModel, run: RunFolder, folder: Path) -> float:
    """The mean score at the two longest lengths, the perplexity at the longest, or the area."""
    recipe = prepared.recipe
    by = recipe.export.checkpoint
    around, tokenizer = prepared.separator, prepared.prompt_tokenizer
    documents = evaluation_documents(recipe, tokenizer, run, None, around)
    lengths = list(context_lengths(recipe, prepared.info.original_length))
    tasks = [by]
    if by == "area":
        tasks = _area_tasks(recipe, lengths, documents, tokenizer)
    else:
        lengths = lengths[-2:]
    counts = {"passkey_samples": _TRIALS, "needle_samples": _TRIALS}
    settings = dataclasses.replace(
        EvalSettings(),
        tasks=tuple(tasks),
        **(_AREA_SAMPLES if by == "area" else counts),
        perplexity_windows=_WINDOWS,
        batch_tokens=recipe.eval.batch_tokens,
        chat_template=eval_settings(recipe, run).chat_template,
        seed=recipe.eval.seed + 1,  # other questions than the evaluation asks
    )
    load = partial(load_for_scoring, prepared, folder)
    eval_model = EvalModel(label=folder.name, load=load, tokenizer=tokenizer)
    rows = evaluate_model(eval_model, Texts(documents=documents), lengths, settings)
    free_memory()
    if by == "perplexity":
        rows = [r for r in rows if r["metric"] == "perplexity"][-1:]
        value = rows[0]["value"] if rows else None
        return sys.float_info.max if value is None else value  # JSON has no infinity
    trials = sum(row["num_samples"] for row in rows)
    areas = main_areas(find_areas(rows, (lengths[0], lengths[-1]))[0]) if by == "area" else []
    found = areas[0].row(folder.name) if areas else None
    if not trials or (by == "area" and found is None):
        raise SkipwiseError(
            f"export.checkpoint: {by}: no trial fits {lengths[-1]:,} tokens\n"
            "type export.checkpoint=last"
        )
    if found is not None:
        return found["value"]
    return sum(row["value"] * row["num_samples"] for row in rows) / trials


class _Fits(Exception):
    """A task asks for the model, so a prompt of it fits."""


def _area_tasks(
    recipe: Recipe, lengths: Sequence[int], documents: list[Any], tokenizer: Any
) -> list[str]:
    """The generated tasks of `eval.tasks` that fit the shortest and the longest length."""
    if len(lengths) < 2:
        return []
    words = cache(lambda num: haystack_words(tokenizer, documents, num))
    one = dict.fromkeys(_AREA_SAMPLES, 1)
    settings = dataclasses.replace(EvalSettings(), **one, num_depths=1, needles_per_haystack=1)

    def load() -> Any:
        raise _Fits

    def fits(task: Task, length: int) -> bool:
        inputs = TaskInputs(
            load_model=load,
            tokenizer=tokenizer,
            documents=documents,
            haystack=words,
            lengths=(length,),
            settings=settings,
            tick=lambda num: None,
        )
        try:
            return bool(task.measure(inputs))
        except _Fits:
            return True

    generated = [
        t for t in find_tasks(recipe.eval.tasks) if t.name in TASKS and t.lengths == "each"
    ]
    return [t.name for t in generated if all(fits(t, n) for n in (lengths[0], lengths[-1]))]
