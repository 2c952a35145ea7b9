"""Heat maps of retrieval: depth by context length, one panel per model."""

from __future__ import annotations

import math

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from skipwise.report.figures.style import INK, STYLE, WIDE, share_colours, shorten
from skipwise.report.format import length_names
from skipwise.report.rows import Rows, heading, models_of, task_rows

MOST_PANELS = 12


def grid_models(rows: Rows, task: str) -> list[str]:
    """The models that have the task at depths, in the order of the panels."""
    return models_of([row for row in task_rows(rows, task) if row.get("depth") is not None])


def plot_grid(rows: Rows, task: str, width: float = WIDE) -> Figure | None:
    """Share of trials answered exactly, small multiples of at most 12 models.

    A cell that was measured has the id `cell-MODEL-DEPTH-LENGTH` (indices) in the SVG.
    """
    rows = [row for row in task_rows(rows, task) if row.get("depth") is not None]
    models = models_of(rows)[:MOST_PANELS]
    if not models:
        return None
    lengths = sorted({r["context_length"] for r in rows})
    depths = sorted({r["depth"] for r in rows})
    room = max(1, (18 if width >= WIDE else 8) // len(lengths))  # panels beside each other
    num_rows = math.ceil(len(models) / min(room, len(models)))
    shape = (num_rows, math.ceil(len(models) / num_rows))
    height = (0.27 * len(depths) + 0.35) * shape[0] + 0.6
    cell = 72 * width / (len(lengths) * shape[1] + 1)  # points, roughly
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(width, max(height, 1.6)), layout="constrained")
        panels = figure.subplots(*shape, sharey=True, sharex=True, squeeze=False).ravel()
        for i, (axes, model) in enumerate(zip(panels, models, strict=False)):
            for row in (r for r in rows if r["model"] == model and r["value"] is not None):
                x, y = lengths.index(row["context_length"]), depths.index(row["depth"])
                colour, ink = share_colours(row["value"])
                square = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, lw=0)
                square.set_clip_on(False)
                square.set_gid(f"cell-{i}-{y}-{x}")
                text = f"{100 * row['value']:.0f}{' %' if cell > 34 else ''}"
                size = 9 if cell > 26 else 7
                named = axes.text(x, y, text, ha="center", va="center", color=ink, fontsize=size)
                for part in (axes.add_artist(square), named):
                    part.set_in_layout(False)  # inside of the axes; to measure each takes seconds
            axes.set_xlim(-0.5, len(lengths) - 0.5)
            axes.set_ylim(len(depths) - 0.5, -0.5)
            axes.set_xticks(range(len(lengths)), length_names(lengths))
            axes.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
            title = shorten(heading(model), int(cell * len(lengths) / 6.5))
            axes.set_title(title, fontsize=11, color=INK)
            axes.spines[:].set_visible(False)
            if i + shape[1] >= len(models):  # the last of its column
                axes.tick_params(labelbottom=True)
        for axes in panels[len(models) :]:
            axes.set_axis_off()
        figure.supylabel(f"depth of the {task}", fontsize=10, color=INK)
        figure.supxlabel("tokens of context", fontsize=10, color=INK)
        return figure
