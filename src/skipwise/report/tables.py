"""Markdown tables of the tidy rows."""

from __future__ import annotations

from typing import Any

from skipwise.report import benchmarks, ruler
from skipwise.report.area import find_areas, main_areas
from skipwise.report.format import format_value, metric_label
from skipwise.report.rows import (
    RULER_AVERAGE,
    Rows,
    by_context,
    describe_key_tokens,
    describe_mixed_texts,
    line_order,
    models_of,
    pooled,
)

UNTRAINED = (
    "untrained: the base model with the same scaling, at its best attention temperature (or that "
    "of the recipe), without any training."
)


def layout(rows: Rows) -> tuple[list[str], list[tuple[str, str, int]], dict[tuple[Any, ...], Any]]:
    """The columns (models), the lines (task, metric, length) and the pooled cells of the table.

    Before and after come first. The RULER averages are lines too. Of the gain by context there is
    the longest context alone: the page has all.
    """
    longest = max((row["context_length"] for row in by_context(rows)), default=0)
    kept = [
        row
        for row in pooled(rows)
        if row["metric"] != "context_gain" or row["context_length"] == longest
    ]
    kept += ruler.average_rows(ruler.summarise_ruler(rows))
    cells = {(r["task"], r["metric"], r["context_length"], r["model"]): r for r in kept}
    lines = sorted({key[:3] for key in cells}, key=line_order)
    return models_of(by_context(rows)), lines, cells


def format_table(rows: Rows, brief: bool = False, ends: tuple[int, int] | None = None) -> str:
    """Markdown: a line a task and context length, a column a model; then the benchmarks.

    Intervals are in brackets, standard errors follow ±. The averages over the RULER tasks, the
    effective length and the areas come last; below the benchmarks is a sentence on what changed
    beyond error.

    Args:
        brief: leave out single RULER tasks where there is an average over them.
        ends: L and T, between which the areas are. Default: the shortest and the longest length.
    """
    parts = [_contexts(rows, brief, ends), describe_mixed_texts(rows), _benchmarks(rows)]
    return "\n\n".join(part for part in parts if part) or "nothing was measured"


def _contexts(rows: Rows, brief: bool, ends: tuple[int, int] | None) -> str:
    models, lines, cells = layout(rows)
    summaries = ruler.summarise_ruler(rows)
    if brief and any(summary.averages for summary in summaries):
        lines = [line for line in lines if line[0] not in ruler.ruler_tasks(rows)]
    if not lines:
        return ""
    table = [["Task", "Metric", "Context", *models]]
    for task, metric, length in lines:
        found = [cells.get((task, metric, length, model)) for model in models]
        missing = "no average" if task == RULER_AVERAGE else "not measured"
        values = [format_value(cell) if cell else missing for cell in found]
        label = metric_label(next(cell for cell in found if cell))
        table.append([task, label, f"{length:,}", *values])
    if summaries:
        effective = {s.model: s.effective for s in summaries}
        threshold = f"average ≥ {100 * ruler.EFFECTIVE_THRESHOLD:.1f} %"
        values = [effective.get(model, "not measured") for model in models]
        table.append([ruler.EFFECTIVE_LENGTH, threshold, "", *values])
    areas, about = find_areas(rows, ends)
    for area in main_areas(areas):
        found = [area.row(model) for model in models]
        values = [format_value(cell) if cell else "not measured" for cell in found]
        if label := next((metric_label(cell) for cell in found if cell), ""):
            table.append([f"area, {area.name}", label, area.span, *values])
    notes = [f"ruler average: {ruler.describe_tasks(summaries)}"] if summaries else []
    notes += [note for note in (describe_key_tokens(rows), about) if note]
    notes += [UNTRAINED] if "untrained" in models else []
    return "\n\n".join([markdown(table, left=2), *notes])


def _benchmarks(rows: Rows) -> str:
    models, lines, cells = benchmarks.benchmark_layout(rows)
    if not lines:
        return ""
    pair = models if len(models) == 2 else None
    table = [["Benchmark", "Metric", "Shots", *models, *(["Difference"] if pair else [])]]
    for line in lines:
        found = [cells.get((line, model)) for model in models]
        one = next(cell for cell in found if cell)
        entries = [line[0], metric_label(one), benchmarks.shots_label(line)]
        entries += [benchmarks.format_benchmark(cell) for cell in found]
        if pair:
            change = benchmarks.line_difference(*found)
            entries.append(f"{change}, {change.judgement}" if change else "not measured")
        table.append(entries)
    note = "percent ± standard error, and of a difference sqrt(se1² + se2²)"
    return "\n\n".join([markdown(table, left=2), note, *benchmarks.describe_benchmarks(rows)])


def markdown(table: list[list[str]], left: int) -> str:
    """A Markdown table; the first `left` columns are left-aligned, the first line is the header."""
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]

    def line(row: list[str]) -> str:
        padded = (
            c.ljust(w) if i < left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ("-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(table[0]), "| " + " | ".join(rule) + " |", *map(line, table[1:])])
