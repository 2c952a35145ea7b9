"""The picture of PoSE: positions of training examples, and the relative distances they show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter

from skipwise.report.figures.alt_text import milestones
from skipwise.report.figures.style import AFTER, CHUNKS, INK, STYLE, WIDE, label_point

_MOST_CHUNKS = 600  # rectangles in the picture of positions


def plot_positions(
    examples: Sequence[dict[str, Any]],
    coverage: Sequence[tuple[int, float]],
    train_length: int,
    target_length: int,
    width: float = WIDE,
) -> Figure:
    """Examples as chunks on 0 .. T, and the share of examples that show each distance.

    Args:
        examples: `lengths` and `position_starts` of the chunks of each.
        coverage: (distance, share) pairs.
    """
    L, T = train_length, target_length
    num_chunks = max((len(e["lengths"]) for e in examples), default=1)
    examples = list(examples)[: max(4, _MOST_CHUNKS // max(num_chunks, 1))]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, 4.6), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
        colours = CHUNKS if num_chunks <= 8 else (AFTER,)
        for i, colour in enumerate(colours):  # every fourth chunk, or all of many
            bars = [
                Path([(x, row - 0.36), (x + n, row - 0.36), (x + n, row + 0.36), (x, row + 0.36)])
                for row, example in enumerate(examples)
                for x, n in list(zip(example["position_starts"], example["lengths"], strict=True))[
                    i :: len(colours)
                ]
            ]
            if bars:  # one path a colour; its edge keeps a chunk of few tokens in sight
                path = Path.make_compound_path(*bars)
                top.add_patch(PathPatch(path, color=colour, linewidth=0.7))
        top.set_ylim(max(len(examples), 1) - 0.4, -0.6)
        if any(sum(e["lengths"]) < L for e in examples):
            top.set_title(f"{num_chunks} chunks of each example, spread evenly", fontsize=9)
        top.set_yticks([])
        top.set_ylabel(f"{len(examples)} examples")
        top.set_xlabel("position")
        top.tick_params(labelbottom=True)
        top.grid(axis="y", visible=False)
        x, y = [c[0] for c in coverage], [100 * c[1] for c in coverage]
        bottom.fill_between(x, y, color=AFTER, alpha=0.25, linewidth=0)
        bottom.plot(x, y, color=AFTER, linewidth=2)
        for distance, share in milestones(coverage, L, T)[1:2]:
            text, up = f"{100 * share:.3g} % at {distance:,}", 5 if share < 0.8 else -5
            label_point(bottom, text, (distance, 100 * share), up, "center")
        bottom.set_ylim(0, 108)
        bottom.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        bottom.set_xlim(0, T)
        parts = 8 if width >= WIDE and T < 100_000 else 4
        bottom.set_xticks([T * i // parts for i in range(parts + 1)])
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        bottom.set_ylabel("examples\nshowing it")
        bottom.set_xlabel("relative distance of two tokens")
        if L < T:
            bottom.axvline(L, color=INK, linewidth=1, linestyle=":")
            place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points"}
            bottom.annotate("training length", (L, 95), **place, va="top", fontsize=9)
        return figure
