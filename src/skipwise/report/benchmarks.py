"""Standard benchmarks at short context: what changed by more than its standard error.

Two models answer the same questions, so their errors are correlated, and the standard error of the
difference is at most about sqrt(se1² + se2²). This bound is used here: it calls too few changes
real rather than too many. At 1.96 standard errors, one unchanged task in twenty looks changed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from skipwise.report.format import higher_is_better, is_share, listed, number, signed
from skipwise.report.rows import Row, Rows, finite, is_benchmark, models_of

Z = 1.96  # standard errors that count as within error
_ORDER = ("boolq", "piqa", "winogrande", "truthfulqa_mc2", "arc_challenge", "hellaswag")
_CHOICE = ("acc_norm", "acc")  # the metric of a task that is judged, the first it has

Line = tuple[str, str, int]  # task, metric, num_fewshot (-1: not recorded)


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One benchmark on two models; shares and their errors are in 0 .. 1."""

    task: str
    metric: str
    base: float
    other: float
    error: float | None  # standard error of the difference, if known
    higher_is_better: bool
    is_share: bool

    @property
    def change(self) -> float:
        return self.other - self.base

    @property
    def beyond_error(self) -> bool:
        return self.error is not None and abs(self.change) > Z * self.error

    @property
    def worse(self) -> bool:
        return self.beyond_error and (self.change < 0) == self.higher_is_better

    @property
    def judgement(self) -> str:
        """`within error`, `worse`, `better` or `error not known`."""
        if self.error is None:
            return "error not known"
        if not self.beyond_error:
            return "within error"
        return "worse" if self.worse else "better"

    def __str__(self) -> str:
        """`−2.8 ± 0.6`, in percentage points if it is a share."""
        scale, digits = (100, 1) if self.is_share else (1, 2)
        shown = signed(scale * self.change, digits)
        return shown if self.error is None else f"{shown} ± {scale * self.error:.{digits}f}"


def benchmark_layout(rows: Rows) -> tuple[list[str], list[Line], dict[tuple[Line, str], Row]]:
    """Columns (models), lines (task, metric, shots) and cells."""
    kept = finite(row for row in rows if is_benchmark(row))
    cells = {(_line(row), row["model"]): row for row in kept}
    return models_of(kept), sorted({line for line, _ in cells}, key=_rank), cells


def differences(rows: Rows, base: str, other: str) -> list[Difference]:
    """One for each task and number of shots that both models have; acc_norm if a task has it."""
    _, lines, cells = benchmark_layout(rows)
    judged: dict[tuple[str, int], Difference] = {}
    for line in lines:  # acc_norm comes first
        if found := line_difference(cells.get((line, base)), cells.get((line, other))):
            judged.setdefault((line[0], line[2]), found)
    return list(judged.values())


def line_difference(a: Row | None, b: Row | None) -> Difference | None:
    """The difference of two cells, if both hold a value."""
    if a is None or b is None or a["value"] is None or b["value"] is None:
        return None
    known = [error for error in (_stderr(a), _stderr(b)) if error is not None]
    return Difference(
        task=a["task"],
        metric=a["metric"],
        base=a["value"],
        other=b["value"],
        error=math.hypot(*known) if len(known) == 2 else None,
        higher_is_better=higher_is_better(a),
        is_share=_is_share(a) and _is_share(b),
    )


def describe_benchmarks(rows: Rows) -> list[str]:
    """For each model but the first: what changed beyond error since the first, the mean change."""
    models, lines, _ = benchmark_layout(rows)
    return [_describe_pair(rows, lines, models[0], other) for other in models[1:]]


def worse_benchmarks(rows: Rows, base: str, other: str) -> list[str]:
    """`hellaswag from 75.9 to 73.1 %` for each benchmark that is worse beyond error."""
    return [
        f"{d.task} from {_format_score(d, d.base)} to {_format_score(d, d.other)}"
        + (" %" if d.is_share else "")
        for d in differences(rows, base, other)
        if d.worse
    ]


def format_benchmark(row: Row | None) -> str:
    """`74.3 ± 1.2`: in percent if it is a share, with its standard error if known."""
    if row is None or row["value"] is None:
        return "not measured"
    value, error = row["value"], _stderr(row)
    if not _is_share(row):
        return number(value) + ("" if error is None else f" ± {error:.2f}")
    return f"{100 * value:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def shots_label(line: Line) -> str:
    return "not recorded" if line[2] < 0 else str(line[2])


def _describe_pair(rows: Rows, lines: list[Line], base: str, other: str) -> str:
    found = differences(rows, base, other)
    start = f"Short contexts, {other} against {base}: "
    if not found:
        return f"{start}no benchmark was measured for both."
    clauses = []
    for word, kept in (
        ("worse beyond error", [d for d in found if d.judgement == "worse"]),
        ("better beyond error", [d for d in found if d.judgement == "better"]),
        ("no standard error, so not judged", [d for d in found if d.error is None]),
    ):
        if kept:
            clauses.append(f"{word}: {listed([f'{d.task} ({d})' for d in kept])}")
    within = sum(d.judgement == "within error" for d in found)
    judged = sum(d.error is not None for d in found)
    if judged:
        noun = "benchmark" if judged == 1 else "benchmarks"
        clauses.append(f"{within} of {judged} {noun} within error")
    points = [100 * d.change for d in found if d.higher_is_better and d.is_share]
    if len(points) > 1:
        mean = signed(sum(points) / len(points), 2)
        clauses.append(f"mean change {mean} points over {len(points)}")
    missing = sorted({line[0] for line in lines} - {d.task for d in found}, key=_task_rank)
    if missing:
        clauses.append(f"not measured for both: {listed(missing)}")
    return start + "; ".join(clauses) + "."


def _stderr(row: Row) -> float | None:
    error = row.get("stderr")
    return error if error is not None and math.isfinite(error) else None


def _is_share(row: Row) -> bool:
    """Metrics of lm-eval have any scale: a value beyond 0 .. 1 is a number."""
    return is_share(row) and 0 <= row["value"] <= 1


def _format_score(difference: Difference, value: float) -> str:
    return f"{100 * value:.1f}" if difference.is_share else number(value)


def _line(row: Row) -> Line:
    shots = row.get("num_fewshot")
    return row["task"], row["metric"], -1 if shots is None else shots


def _task_rank(task: str) -> tuple[int, str]:
    return (_ORDER.index(task) if task in _ORDER else len(_ORDER)), task


def _rank(line: Line) -> tuple[Any, ...]:
    task, metric, shots = line
    choice = _CHOICE.index(metric) if metric in _CHOICE else len(_CHOICE)
    return *_task_rank(task), shots, choice, metric
