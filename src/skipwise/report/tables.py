"""Tidy rows to a table: nothing here is said that the numbers do not say.

Rows:    {"model", "task", "metric", "context_length", ["depth"], "value", "low", "high",
         "num_samples"}; a value that is null or not finite was measured and is beyond measure.
Source:  interval of a share: Wilson 1927, "Probable inference", JASA 22, 209-212
"""

from __future__ import annotations

import math
from typing import Any

Rows = list[dict[str, Any]]
_Z = 1.959963984540054  # 97.5 % point of the normal distribution
METRICS = {"perplexity": "perplexity ↓", "exact_match": "exact match ↑"}


def finite(rows: Rows) -> Rows:
    """The rows with None for every null, NaN and infinity that JSON may hold."""
    out = []
    for row in rows:
        numbers = {key: row.get(key) for key in ("value", "low", "high")}
        known = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        out.append({"num_samples": 0, **row, **known})
    return out


def pooled(rows: Rows) -> Rows:
    """One row for each model, task and length; shares of several depths are put together.

    The pooled share is weighted by samples and has Wilson's interval of the pooled counts.
    """
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in finite(rows):
        key = (row["model"], row["task"], row["metric"], row["context_length"])
        groups.setdefault(key, []).append(row)
    out = []
    for group in groups.values():
        row = dict(group[0])
        if "depth" in row:
            del row["depth"]
            counted = [r for r in group if r["value"] is not None and r["num_samples"]]
            count = sum(r["num_samples"] for r in counted)
            hits = round(sum(r["value"] * r["num_samples"] for r in counted))
            low, high = _wilson(hits, count) if count else (None, None)
            value = hits / count if count else None
            row.update(value=value, low=low, high=high, num_samples=count)
        out.append(row)
    return out


def find(rows: Rows, model: str, task: str, length: int) -> dict[str, Any] | None:
    """The pooled row of a model, task and length, where one was measured; its value may be None."""
    for row in pooled(rows):
        if (row["model"], row["task"], row["context_length"]) == (model, task, length):
            return row
    return None


def layout(rows: Rows) -> tuple[list[str], list[tuple[str, str, int]], dict[tuple[Any, ...], Any]]:
    """Columns (models, before and after first), lines (task, metric, length), pooled cells."""
    cells = {(r["task"], r["metric"], r["context_length"], r["model"]): r for r in pooled(rows)}
    names = dict.fromkeys(key[3] for key in cells)
    models = sorted(names, key=lambda name: {"before": 0, "after": 1}.get(name, 2))
    lines = sorted({key[:3] for key in cells}, key=lambda key: (key[0] != "perplexity", *key))
    return models, lines, cells


def format_table(rows: Rows) -> str:
    """A Markdown table: a line a task and context length, a column a model, intervals behind."""
    if not rows:
        return "nothing was measured"
    models, lines, cells = layout(rows)
    table = [["Task", "Metric", "Context", *models]]
    for task, metric, length in lines:
        row = [task, METRICS.get(metric, metric), f"{length:,}"]
        for model in models:
            cell = cells.get((task, metric, length, model))
            row.append(format_value(cell) if cell else "not measured")
        table.append(row)
    table = [[cell.replace("|", "\\|") for cell in row] for row in table]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    left = {0, 1}

    def line(row: list[str]) -> str:
        padded = (
            c.ljust(w) if i in left else c.rjust(w)
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ("-" * w if i in left else "-" * (w - 1) + ":" for i, w in enumerate(widths))
    return "\n".join([line(table[0]), "| " + " | ".join(rule) + " |", *map(line, table[1:])])


def format_value(row: dict[str, Any]) -> str:
    """`8.14 [7.90, 8.40]`, or `98 % [93, 99]` for a share."""
    value, low, high = row["value"], row["low"], row["high"]
    known = low is not None or high is not None
    if value is None:
        return "beyond measure" if row["metric"] == "perplexity" else "not measured"
    if row["metric"] == "perplexity":
        shown = number(value)
        interval = f"{number(low)}, {number(high)}"
    else:
        shown = f"{percent(value)} %"
        low, high = 100 * (low or 0), 100 * (1 if high is None else high)
        digits = 0 if round(low) <= 100 * value <= round(high) else 1  # it holds the value
        interval = f"{low:.{digits}f}, {high:.{digits}f}"
    return f"{shown} [{interval}]" if known else shown


def percent(share: float) -> str:
    """Whole percent where it is whole, and never 100 or 0 where it is not."""
    value = 100 * share
    if round(value, 6) == round(value):
        return f"{value:.0f}"
    return f"{min(max(value, 0.1), 99.9):.1f}"


def number(value: float | None) -> str:
    """`7.75`, `92.50`, `12,345`, `3.2e+08`."""
    if value is None or not math.isfinite(value):
        return "∞"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def _wilson(hits: int, count: int) -> tuple[float, float]:
    p, z2 = hits / count, _Z * _Z
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count))
    low, high = centre - half, centre + half
    return (0.0 if hits == 0 else low), (1.0 if hits == count else high)
