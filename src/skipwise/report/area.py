"""One figure over all context lengths: the mean of a score over log2 of the length, from L to T.

For the scores s_1 .. s_k at the measured lengths n_1 = L < .. < n_k = T, by trapezoids:

    area = sum over i of (s_i + s_i+1) / 2 * log2(n_i+1 / n_i) / log2(T / L)  =  sum of w_i s_i

so each doubling of the context counts the same. Of shares it is a share; of perplexity it is the
loss in nats on the same targets, lower is better, and never mixed with shares. Over several tasks
it is the mean of their areas, RULER's tasks together counting as one. Nothing is filled in: a task
without a score at L or at T has no area, and the lengths used are those of every model.

Intervals: prompts differ from length to length and from task to task, so those of shares combine
by the differences of each from its bounds, which never collapses; those of perplexity are over
documents, of each window's weighted loss.

Source:  Zou, Huang & Zhang 2009, "A note on confidence interval estimation for a linear function of
         binomial proportions", Computational Statistics & Data Analysis 53, 1080-1085, section 2
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipwise.report.differences import PairedDifference, haystacks, same_trials
from skipwise.report.format import higher_is_better, is_share, listed
from skipwise.report.intervals import Interval, clustered_mean, paired_difference
from skipwise.report.rows import Row, Rows, by_context, is_ruler, models_of, pooled

ALL_TASKS = "all tasks"


@dataclass(frozen=True, kw_only=True)
class Area:
    """The area of a task, of RULER's tasks or of all tasks, for the models that have it."""

    name: str
    metric: str  # "area", or "loss" of perplexity
    weights: dict[tuple[str, int], float]  # (task, context length) -> w_i
    cells: dict[tuple[str, str, int], Row]  # (model, task, context length) -> its pooled row
    is_main: bool = False  # of perplexity, and the one of all tasks that every model has

    @property
    def span(self) -> str:
        """`256–2,048`, the context lengths that it reaches over."""
        lengths = [length for _, length in self.weights]
        return f"{min(lengths):,}–{max(lengths):,}"

    def rows_of(self, model: str) -> list[tuple[float, Row]] | None:
        found = [(w, self.cells.get((model, *place))) for place, w in self.weights.items()]
        known = [(w, row) for w, row in found if row and row["value"] is not None]
        return known if len(known) == len(found) else None

    def row(self, model: str) -> Row | None:
        """Value and interval in the form of a result row; None where a score is missing."""
        rows = self.rows_of(model)
        if rows is None:
            return None
        if self.metric == "loss":
            value, low, high = _loss([(w, _losses(row)) for w, row in rows], rows[0][1])
        else:
            parts = [(w, (row["value"], row["low"], row["high"])) for w, row in rows]
            value, low, high = linear_interval(parts)
        shown = {"is_share": self.metric == "area", "higher_is_better": self.metric == "area"}
        out = {"model": model, "task": self.name, "metric": self.metric, **shown}
        return {**out, "value": value, "low": low, "high": high}

    def difference(self, model: str, other: str) -> PairedDifference | None:
        """Of two models on the same trials or windows; None where that is not known."""
        first, second = self.rows_of(model), self.rows_of(other)
        if first is None or second is None:
            return None
        pairs = [(w, row, old) for (w, row), (_, old) in zip(first, second, strict=True)]
        if not all(same_trials(row, old) for _, row, old in pairs):
            return None
        if self.metric == "loss":
            losses = [(w, _losses(row) - _losses(old)) for w, row, old in pairs]
            found, unit = _loss(losses, first[0][1]), "nats"
        else:
            scaled = [
                (100 * w, paired_difference(a["samples"], b["samples"], haystacks(a, b)))
                for w, a, b in pairs
            ]
            found, unit = linear_interval(scaled), "points"
        name, (value, low, high) = f"{self.name} area", found
        return PairedDifference(
            task=name,
            value=value,
            low=low,
            high=high,
            unit=unit,
            higher_is_better=self.metric == "area",
        )


def find_areas(rows: Rows, ends: tuple[int, int] | None = None) -> tuple[list[Area], str]:
    """The areas of each task, of all tasks and of perplexity, and a sentence on what they cover.

    Args:
        ends: L and T. Defaults to the shortest and the longest context length measured.
    """
    kept = [r for r in pooled(by_context(rows)) if _takes_part(r)]
    first = {row["task"]: row["metric"] for row in reversed(kept)}  # of several metrics
    kept = [row for row in kept if row["metric"] == first[row["task"]]]
    lengths = {row["context_length"] for row in kept}
    low, high = ends or (min(lengths, default=0), max(lengths, default=0))
    if low >= high:
        return [], ""
    cells = {(r["model"], r["task"], r["context_length"]): r for r in kept}
    weights, left_out = {}, []
    for task in dict.fromkeys(row["task"] for row in kept):
        own = [row for row in kept if row["task"] == task and low <= row["context_length"] <= high]
        each = [{r["context_length"] for r in own if r["model"] == m} for m in models_of(own)]
        common = sorted(set.intersection(*each)) if each else []
        if missing := [f"{n:,}" for n in (low, high) if n not in common]:
            left_out.append(f"{task} (not measured at {listed(missing)})")
            continue
        weights[task] = dict(zip(common, length_weights(common), strict=True))
        if unused := sorted(set.union(*each) - set(common)):
            listed_lengths = listed([f"{n:,}" for n in unused])
            left_out.append(f"{task} at {listed_lengths} (not measured for every model)")
    areas = _areas(weights, kept, cells, left_out)
    if not areas:
        return [], f"no area: {'; '.join(left_out)}" if left_out else ""
    said = f"area: mean over log2 of the context length from {low:,} to {high:,} tokens"
    return areas, "; left out: ".join([said, *([", ".join(left_out)] if left_out else [])])


def _areas(
    weights: dict[str, dict[int, float]], kept: Rows, cells: dict[Any, Row], left_out: list[str]
) -> list[Area]:
    groups: dict[str, list[str]] = {}
    for task in weights:
        name = "RULER" if any(r["task"] == task and is_ruler(r) for r in kept) else task
        groups.setdefault(name, []).append(task)

    def area(name: str, tasks: Iterable[tuple[str, float]], metric: str = "area") -> Area:
        placed = {(t, n): share * w for t, share in tasks for n, w in weights[t].items()}
        return Area(name=name, metric=metric, weights=placed, cells=cells)

    perplexity = groups.pop("perplexity", None)
    out = [area(name, [(t, 1 / len(ts)) for t in ts]) for name, ts in groups.items()]
    models = models_of([row for row in kept if row["task"] != "perplexity"])
    every = []
    for one in out:
        missing = [model for model in models if one.rows_of(model) is None]
        every += [] if missing else [one.name]
        left_out += [f"{one.name} (not measured for {listed(missing)})"] if missing else []
    if len(every) == 1:
        out = [dataclasses.replace(one, is_main=one.name in every) for one in out]
    elif every:
        parts = [(t, 1 / len(every) / len(groups[name])) for name in every for t in groups[name]]
        out.append(dataclasses.replace(area(ALL_TASKS, parts), is_main=True))
    if perplexity:
        losses = area("perplexity", [("perplexity", 1.0)], "loss")
        out.append(dataclasses.replace(losses, is_main=True))
    return out


def main_areas(areas: Sequence[Area]) -> list[Area]:
    """The one of all tasks, or of the only task, and that of perplexity."""
    return [area for area in areas if area.is_main]


def length_weights(lengths: Sequence[int]) -> list[float]:
    """The trapezoid rule's weight of each length over log2, ascending; their sum is 1."""
    x = np.log2(lengths)
    steps = np.diff(x) / (x[-1] - x[0]) / 2
    return (np.append(steps, 0.0) + np.append(0.0, steps)).tolist()


def linear_interval(parts: Sequence[tuple[float, Interval]]) -> Interval:
    """Value and interval of sum w_i s_i of independent s_i, each with its own interval.

    No interval where one has none.
    """
    value = sum(w * s for w, (s, _, _) in parts)
    bounds = [(w, s, low, high) for w, (s, low, high) in parts]
    if any(low is None or high is None for _, _, low, high in bounds):
        return value, None, None
    below = math.sqrt(sum((w * (s - low)) ** 2 for w, s, low, _ in bounds if low is not None))
    above = math.sqrt(sum((w * (high - s)) ** 2 for w, s, _, high in bounds if high is not None))
    return value, value - below, value + above


def ends_of(run: dict[str, Any]) -> tuple[int, int] | None:
    """L and T of a run; None where run.json does not say."""
    L, T = run.get("original_length"), run.get("target_length")
    return (L, T) if L and T and L < T else None


def _takes_part(row: Row) -> bool:
    if row["task"] == "perplexity":
        return row["metric"] == "perplexity"
    return is_share(row) and higher_is_better(row) and "part_of" not in row


def _losses(row: Row) -> np.ndarray:
    """Loss of each window in nats; of a row without them, their mean."""
    samples = row.get("samples")
    return np.array(samples, float) if samples else np.array([math.log(row["value"])])


def _loss(parts: Sequence[tuple[float, np.ndarray]], row: Row) -> Interval:
    """Weighted sum of the windows' losses at each length, its mean and interval over documents."""
    losses = np.sum([w * x for w, x in parts], axis=0)
    documents = row.get("documents")
    if not documents or len(documents) != len(losses):
        return float(losses.mean()), None, None
    value, low, high = clustered_mean(losses, np.array(documents))
    return (value, low, high) if math.isfinite(high) else (value, None, None)
