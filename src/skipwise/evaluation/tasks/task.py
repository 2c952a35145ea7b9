"""An evaluation task: how it is measured, what decides its rows, how the report shows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from skipwise.config.recipe import EvalSettings
from skipwise.evaluation.scoring import Tick, answer_texts
from skipwise.evaluation.tasks.key_tokens import Reference
from skipwise.report.intervals import mean_interval
from skipwise.report.rows import Row, Rows


@dataclass(frozen=True, kw_only=True)
class TaskInputs:
    """What a task measures with."""

    load_model: Callable[[], Any]  # loads it once
    tokenizer: Any
    documents: Sequence[np.ndarray]  # token ids
    haystack: Callable[[int], Sequence[str]]  # words of the documents, for a number of tokens
    lengths: tuple[int, ...]  # context lengths
    settings: EvalSettings
    tick: Tick  # call it with the number of tokens that went through the model
    reference: Reference | None = None  # of the evaluator that chooses LongPPL's tokens

    @property
    def model(self) -> Any:
        """The causal language model, loaded on first use: check first that the prompts fit."""
        return self.load_model()

    @property
    def length(self) -> int:
        (length,) = self.lengths
        return length

    @property
    def words(self) -> Sequence[str]:
        """Words of the documents with their whitespace, about two context lengths of them."""
        return self.haystack(2 * self.length)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A measurement that `eval.tasks` can name."""

    name: str
    measure: Callable[[TaskInputs], Rows]  # no rows where no prompt fits
    # at each length; 0 leaves the task out
    num_samples: Callable[[EvalSettings], int | None] = lambda settings: settings.samples
    # the settings that decide its rows
    cache_key: Callable[[EvalSettings], tuple[Any, ...]] = lambda settings: (settings.samples,)
    version: int = 0  # of its prompts: another one has other rows
    lengths: Literal["each", "together", "none"] = "each"  # what one call of `measure` covers
    text: Literal["unused", "optional", "required"] = "unused"
    group: str = ""  # a name for several tasks, as `ruler`
    # raises before a model is loaded, from the settings and whether to load data
    check: Callable[[EvalSettings, bool], None] | None = None
    # how the report shows a task that it has no section for
    title: str = ""
    about: str = ""  # the caption of its figure
    higher_is_better: bool | None = None
    is_share: bool | None = None  # 0 .. 1, written in percent

    def display(self) -> Row:
        """The keys of a row that tell the report how to show it."""
        keys = ("title", "about", "higher_is_better", "is_share")
        return {key: value for key in keys if (value := getattr(self, key)) not in ("", None)}


def text_scores(inputs: TaskInputs, items: Sequence[Any]) -> list[float]:
    """The score of the text that is generated for each item: `item.trial`, `item.score(text)`."""
    trials = [item.trial for item in items]
    batch_tokens = inputs.settings.batch_tokens
    said = answer_texts(inputs.model, inputs.tokenizer, trials, batch_tokens, inputs.tick)
    return [item.score(text) for item, text in zip(items, said, strict=True)]


def mean_row(task: str, metric: str, length: int, scores: Sequence[float], **more: Any) -> Row:
    """The row of scores in 0 .. 1 at a context length: their mean with its 95 % interval.

    Args:
        more: further keys; `documents` is the haystack of each score, where questions share one.
    """
    value, low, high = mean_interval(scores, more.get("documents"))
    return {
        "task": task,
        "metric": metric,
        "context_length": length,
        "value": value,
        "low": low,
        "high": high,
        "num_samples": len(scores),
        "samples": [round(float(score), 4) for score in scores],
        **more,
    }
