"""The table of the arms in Markdown."""

from __future__ import annotations

from typing import Any

from skipwise.config.lengths import format_length


def table(figures: dict[str, Any]) -> str:
    """One line an arm (and one for the chat template): every score by length, and the cost."""
    from skipwise.report.rows import is_benchmark, is_ruler, pooled
    from skipwise.report.ruler import summarise_ruler

    lines, columns = [], []
    for arm in figures["arms"]:
        for chat in (False, True):
            cells: dict[str, str] = {}
            rows = [row for row in arm["rows"] if row["chat"] == chat]
            for row in [*pooled(rows), *filter(is_benchmark, rows)]:
                length, value = row.get("context_length"), row["value"]
                if row["metric"] in ("bits_per_byte", "acc_norm") or value is None or is_ruler(row):
                    continue
                share = row["task"] != "perplexity"
                cell = f"{100 * value:.0f} %" if share else f"{value:,.2f}"
                if row.get("over base"):
                    less, *bounds = row["over base"]
                    band = "" if None in bounds else " [{:+.1f}, {:+.1f}]".format(*bounds)
                    cell += f" ({less:+.1f} %{band})"
                if share and row.get("low") is not None:
                    cell += f" [{100 * row['low']:.0f}, {100 * row['high']:.0f}]"
                cells[f"{row['task']} {format_length(length) if length else ''}".strip()] = cell
            for one in summarise_ruler(rows):
                cells |= {
                    f"RULER {format_length(n)}": f"{100 * v:.0f} %" for n, v in one.averages.items()
                }
                cells["effective length"] = one.effective_short
            costs = arm["costs"]
            if not chat and "train" in costs:
                wall, gib, busy = costs["train"]
                gpu = figures["scale"]["name"] == "gpu"
                cells["training s" if gpu else "processor s"] = f"{wall if gpu else busy:.0f}"
                cells["GiB"] = f"{gib:.1f}"
            if cells:
                lines.append((arm["arm"] + (", chat template" if chat else ""), cells))
                columns += [key for key in cells if key not in columns]
    out = [f"| {figures['model']} | " + " | ".join(columns) + " |"]
    out.append("|---" + "|---:" * len(columns) + "|")
    out += [f"| {name} | " + " | ".join(c.get(k, "-") for k in columns) + " |" for name, c in lines]
    out += [f"\nnot run: {name} ({why})" for name, why in figures["not run"].items()]
    return "\n".join(out)
