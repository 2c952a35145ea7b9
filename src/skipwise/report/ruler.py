"""RULER in two numbers per model: the average over its tasks by length, and the effective length.

Source:  Hsieh et al. 2024, "RULER: What's the Real Context Size of Your Long-Context Language
         Models?", arXiv 2404.06654, section 4 and table 3. The paper averages 13 tasks; ours says
         how many it is over.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipwise.report.format import length_names
from skipwise.report.rows import RULER_AVERAGE, RULER_TASKS, Rows, is_ruler, models_of, pooled

# the average of Llama-2-7B (chat) at 4k tokens, table 3 of the paper
EFFECTIVE_THRESHOLD = 0.856
EFFECTIVE_LENGTH = "effective length"


@dataclass(frozen=True, kw_only=True)
class RulerSummary:
    """A model's scores over the RULER tasks; `averages` is empty if tasks are missing somewhere."""

    model: str
    tasks: tuple[str, ...]  # the same at every length
    averages: dict[int, float]  # context length -> unweighted mean of the tasks' scores
    num_samples: dict[int, int]
    reason: str = ""  # why there is no average

    @property
    def effective_length(self) -> int | None:
        """The largest length at or above the threshold together with all shorter ones, or None."""
        effective = None
        for length in sorted(self.averages):
            if round(self.averages[length], 9) < EFFECTIVE_THRESHOLD:
                break
            effective = length
        return effective

    @property
    def effective(self) -> str:
        """`8,192`, `at least 32,768` if the longest one passes, or `none`."""
        if not self.averages:
            return "not known"
        length = self.effective_length
        if length is None:
            return "none"
        return f"at least {length:,}" if length == max(self.averages) else f"{length:,}"

    @property
    def effective_short(self) -> str:
        """`8k`, `≥ 32k` or `none`, for narrow places."""
        length = self.effective_length
        if length is None:
            return "none" if self.averages else "not known"
        names = dict(zip(self.averages, length_names(list(self.averages)), strict=True))
        return f"{'≥ ' if length == max(self.averages) else ''}{names[length]}"


def summarise_ruler(rows: Rows) -> list[RulerSummary]:
    """A summary per model; it has averages only if every task was measured at every length."""
    kept = [row for row in pooled(rows) if is_ruler(row)]
    summaries = []
    for model in models_of(kept):
        scores: dict[int, dict[str, float]] = {}
        samples: dict[int, int] = {}
        for row in kept:
            if row["model"] == model:
                length = row["context_length"]
                found = scores.setdefault(length, {})
                if row["value"] is not None:
                    found[row["task"]] = row["value"]
                    samples[length] = samples.get(length, 0) + row["num_samples"]
        task_sets = {frozenset(found) for found in scores.values()}
        if len(task_sets) > 1 or frozenset() in task_sets:
            tasks, averages, samples = (), {}, {}
            reason = "not every task was measured at every length"
        else:
            averages = {n: sum(found.values()) / len(found) for n, found in sorted(scores.items())}
            tasks, reason = tuple(sorted(next(iter(task_sets)), key=_rank)), ""
        summary = RulerSummary(
            model=model, tasks=tasks, averages=averages, num_samples=samples, reason=reason
        )
        summaries.append(summary)
    return summaries


def average_rows(summaries: list[RulerSummary]) -> Rows:
    """The averages as tidy rows, without intervals."""
    return [
        {
            "model": summary.model,
            "task": RULER_AVERAGE,
            "metric": "recall",
            "context_length": length,
            "value": value,
            "low": None,
            "high": None,
            "num_samples": summary.num_samples.get(length, 0),
        }
        for summary in summaries
        for length, value in summary.averages.items()
    ]


def describe_tasks(summaries: list[RulerSummary]) -> str:
    """`mean of 9 tasks`, or the number for each model, or why there is no average."""
    averaged = [s for s in summaries if s.averages]
    names = {s.tasks for s in averaged}
    if len(names) == 1:
        said = f"mean of {_count(averaged[0])}"
    else:
        said = "; ".join(f"{s.model}: mean of {_count(s)}" for s in averaged)
        said += " (not the same tasks: not to be compared)" if averaged else ""
    left_out = [f"no average for {s.model}: {s.reason}" for s in summaries if s.reason]
    return "; ".join([*([said] if said else []), *left_out])


def ruler_tasks(rows: Rows) -> list[str]:
    """The RULER tasks measured, in the order of the tables."""
    return sorted({row["task"] for row in rows if is_ruler(row)}, key=_rank)


def _count(summary: RulerSummary) -> str:
    num = len(summary.tasks)
    return f"{num} task" if num == 1 else f"{num} tasks"


def _rank(task: str) -> tuple[int, str]:
    return (RULER_TASKS.index(task) if task in RULER_TASKS else len(RULER_TASKS)), task
