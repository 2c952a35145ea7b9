"""The figures in words, for screen readers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipwise.report.figures.curves import finish_step
from skipwise.report.format import number, percent, short_value
from skipwise.report.rows import Rows, models_of, pooled, task_rows
from skipwise.report.ruler import EFFECTIVE_THRESHOLD, RulerSummary, describe_tasks


def describe_curves(rows: Rows, title: str) -> str:
    """Every value, by model and length."""
    said = []
    for model in models_of(rows):
        points = (row for row in rows if row["model"] == model)
        values = ", ".join(
            f"{short_value(row)} at {row['context_length']:,}"
            for row in sorted(points, key=lambda row: row["context_length"])
        )
        said.append(f"{model}: {values}")
    return f"{title} by tokens of context. {'; '.join(said)}."


def describe_grid(rows: Rows, task: str) -> str:
    """The score over all depths by model and length, and the weakest depth of each."""
    trials = [r for r in task_rows(rows, task) if r["value"] is not None]
    at_depths = [r for r in trials if r.get("depth") is not None]
    said = []
    for row in pooled(trials):
        at = (row["model"], row["context_length"])
        depths = [r for r in at_depths if (r["model"], r["context_length"]) == at]
        text = f"{row['model']} at {row['context_length']:,}: "
        text += "not measured" if row["value"] is None else f"{percent(row['value'])} %"
        weakest = min(depths, key=lambda r: r["value"], default=None)
        if weakest and row["value"] is not None and weakest["value"] < row["value"]:
            text += f" ({percent(weakest['value'])} % at {percent(weakest['depth'])} % depth)"
        said.append(text)
    return f"{task.capitalize()} retrieval over all depths. {'; '.join(said)}."


def describe_ruler(summaries: Sequence[RulerSummary]) -> str:
    """Every average, by model and length, and the effective lengths."""
    said = []
    for summary in summaries:
        values = ", ".join(f"{percent(v)} % at {n:,}" for n, v in summary.averages.items())
        if values:
            said.append(f"{summary.model}: {values}; effective length {summary.effective}")
    return (
        f"RULER score by tokens of context, {describe_tasks(list(summaries))}; the threshold is "
        f"{100 * EFFECTIVE_THRESHOLD:.1f} %. {'. '.join(said)}."
    )


def describe_selection(points: Sequence[tuple[int, float]], chosen: int | None, share: bool) -> str:
    """Every checkpoint's score, and which was chosen."""
    scores = ", ".join(
        f"{f'{percent(score)} %' if share else number(score)} at step {step:,}"
        + (" (chosen)" if step == chosen else "")
        for step, score in points
    )
    return f"Score of each checkpoint. {scores}."


def describe_loss(metrics: list[dict[str, Any]]) -> str:
    losses = [m["loss"] for m in metrics if m.get("loss") is not None]
    if not losses:
        return "Training loss."
    tenth = max(1, len(losses) // 10)
    step = finish_step(metrics)
    finish = "" if step is None else f" The examples from step {step:,} on have full length."
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return (
        f"Training loss over {len(losses):,} logged steps: {first:.3f} on average over the first "
        f"tenth, {last:.3f} over the last.{finish}"
    )


def describe_positions(
    examples: Sequence[dict[str, Any]], coverage: Sequence[tuple[int, float]], L: int, T: int
) -> str:
    """How far the examples reach, and how often they show near, middle and far distances."""
    ends = [e["position_starts"][-1] + e["lengths"][-1] for e in examples if e["lengths"]]
    said = f"{len(examples)} training examples of {L:,} tokens as chunks on positions 0 to {T:,}"
    if ends:
        said += f", the furthest reaching position {max(ends):,}"
    points = milestones(coverage, L, T)
    shares = ", ".join(f"{distance:,} by {share:.1%}" for distance, share in points)
    return f"{said}. Share of examples that show a relative distance: {shares}."


def milestones(coverage: Sequence[tuple[int, float]], L: int, T: int) -> list[tuple[int, float]]:
    """The points of the coverage nearest to half the training length, half the target, its end."""
    wanted = (L // 2, T // 2, T) if coverage else ()
    return [min(coverage, key=lambda point: abs(point[0] - at)) for at in wanted]
