"""Tidy rows to a table and a sentence: nothing here is said that the numbers do not say.

Rows:  {"model", "task", "metric", "context_length", ["depth"], "value", "low", "high",
        "num_samples"}
"""

from __future__ import annotations

import math
from typing import Any

Rows = list[dict[str, Any]]
_Z = 1.959963984540054
_METRICS = {"perplexity": "perplexity ↓", "exact_match": "exact match ↑"}


def pooled(rows: Rows) -> Rows:
    """One row for each model, task and length; shares of several depths are put together.

    The pooled share is weighted by samples and has Wilson's interval of the pooled counts.
    """
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        key = (row["model"], row["task"], row["metric"], row["context_length"])
        groups.setdefault(key, []).append(row)
    out = []
    for (model, task, metric, length), group in groups.items():
        row = {**group[0], "model": model, "task": task, "metric": metric}
        row["context_length"] = length
        if "depth" in group[0]:
            count = sum(r["num_samples"] for r in group)
            hits = round(sum(r["value"] * r["num_samples"] for r in group))
            low, high = _wilson(hits, count)
            row.update(value=hits / count, low=low, high=high, num_samples=count)
            del row["depth"]
        out.append(row)
    return out


def find(rows: Rows, model: str, task: str, length: int) -> dict[str, Any] | None:
    """The pooled row of a model, task and length, where it was measured with a finite value."""
    for row in pooled(rows):
        if (row["model"], row["task"], row["context_length"]) == (model, task, length):
            return row if row["value"] is not None else None
    return None


def format_table(rows: Rows) -> str:
    """A Markdown table: a line a task and context length, a column a model, intervals behind."""
    if not rows:
        return "nothing was measured"
    cells = pooled(rows)
    models = _ordered(cells)
    lines = sorted(
        {(r["task"], r["metric"], r["context_length"]) for r in cells},
        key=lambda line: (line[0] != "perplexity", *line),
    )
    table = [["Task", "Metric", "Context", *models]]
    for task, metric, length in lines:
        row = [task, _METRICS.get(metric, metric), f"{length:,}"]
        for model in models:
            at = (model, task, metric, length)
            found = [
                r for r in cells if (r["model"], r["task"], r["metric"], r["context_length"]) == at
            ]
            row.append(format_value(found[0]) if found else "not measured")
        table.append(row)
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
    if row["value"] is None:
        return "beyond measure"
    if row["metric"] == "perplexity":
        return f"{_number(row['value'])} [{_number(row['low'])}, {_number(row['high'])}]"
    return f"{_percent(row['value'])} % [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"


def headline(run: dict[str, Any], rows: Rows) -> str:
    """What came of it in one or two sentences, with what fell short."""
    L, T = run.get("original_length"), run.get("target_length")
    name = run.get("model", {}).get("name", "The model")
    if not rows or not L or not T:
        return f"{name}: not measured yet."
    parts, short = [], []
    after, before = find(rows, "after", "passkey", T), find(rows, "before", "passkey", T)
    if after:
        was = f" ({_percent(before['value'])} % before)" if before else ""
        parts.append(
            f"finds the passkey in {_percent(after['value'])} % of trials at {T:,} tokens{was}"
        )
        if after["value"] < 0.9:
            short.append(f"the passkey is found in {_percent(after['value'])} % of trials at {T:,}")
    far, near = find(rows, "after", "perplexity", T), find(rows, "after", "perplexity", L)
    base = find(rows, "before", "perplexity", L)
    if far and near:
        was = f" ({_number(base['value'])} for the base at {L:,})" if base else ""
        parts.append(
            f"has a perplexity of {_number(far['value'])} with {T:,} tokens of context and "
            f"{_number(near['value'])} with {L:,}, on the same target tokens{was}"
        )
        if far["value"] > near["value"]:
            short.append(f"perplexity is higher with {T:,} tokens of context than with {L:,}")
        if base and near["value"] > 1.05 * base["value"]:
            loss = near["value"] / base["value"] - 1
            short.append(f"perplexity at the original {L:,} tokens has risen by {loss:.0%}")
    if not parts:
        return f"{name} was extended from {L:,} to {T:,} tokens; it was not measured at {T:,}."
    if short:
        return (
            f"{name} was taken from {L:,} to {T:,} tokens of context, but falls short: "
            f"{'; '.join(short)}. It {' and '.join(parts)}."
        )
    return f"{name} reads {T:,} tokens instead of {L:,}: it {' and '.join(parts)}."


def _ordered(rows: Rows) -> list[str]:
    names = list(dict.fromkeys(r["model"] for r in rows))
    return sorted(names, key=lambda n: {"before": 0, "after": 1}.get(n, 2))


def _percent(value: float) -> str:
    """Whole percent where it is whole, and never 100 or 0 where it is not."""
    return (
        f"{100 * value:.0f}"
        if round(100 * value, 6) == round(100 * value)
        else f"{100 * value:.1f}"
    )


def _number(value: float | None) -> str:
    if value is None or not math.isfinite(value):
        return "∞"
    return f"{value:.3g}" if value >= 100 else f"{value:.2f}"


def _wilson(hits: int, count: int) -> tuple[float, float]:
    p, z2 = hits / count, _Z * _Z
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = _Z / (1 + z2 / count) * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count))
    low, high = centre - half, centre + half
    return (0.0 if hits == 0 else low), (1.0 if hits == count else high)
