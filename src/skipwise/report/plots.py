"""Figures of a run with matplotlib: as PNG, and as SVG whose ink follows the page's colours."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from skipwise.report.tables import Rows

BEFORE, AFTER, CHUNKS = "#d9730d", "#2f6fde", ("#2f6fde", "#d9730d", "#1a936f", "#8f5bd6")
_INK, _GRID = "#3a3f47", "#c9ccd1"  # in SVG: currentColor and var(--line)
_SHARES = LinearSegmentedColormap.from_list("shares", ["#d9730d", "#efe3d3", "#2f6fde"])
_STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "skipwise",
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
}


def plot_perplexity(rows: Rows, original_length: int) -> Figure | None:
    """Perplexity against context length, before and after, with 95 % bands."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 3.4), layout="constrained")
        axes = figure.subplots()
        values: list[float] = []
        for model, colour in (("before", BEFORE), ("after", AFTER)):
            points = sorted(
                (r for r in rows if r["model"] == model and r["task"] == "perplexity"),
                key=lambda r: r["context_length"],
            )
            points = [p for p in points if p["value"] is not None]
            if not points:
                continue
            x = [p["context_length"] for p in points]
            y = [p["value"] for p in points]
            axes.plot(x, y, "o-", color=colour, label=model, linewidth=2)
            bands = [p for p in points if p["low"] is not None and p["high"] is not None]
            axes.fill_between(
                [p["context_length"] for p in bands],
                [p["low"] for p in bands],
                [p["high"] for p in bands],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            values += y
        if not values:
            return None
        if max(values) > 4 * min(values):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        _length_axis(axes, [r["context_length"] for r in rows if r["task"] == "perplexity"])
        axes.axvline(original_length, color=_INK, linewidth=1, linestyle=":")
        axes.annotate(
            " original window",
            (original_length, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            fontsize=8,
        )
        axes.set_xlabel("tokens of context (same target tokens)")
        axes.set_ylabel("perplexity")
        axes.legend()
        return figure


def plot_passkey(rows: Rows) -> Figure | None:
    """Heat maps of retrieval by depth and context length, a panel a model."""
    rows = [r for r in rows if r["task"] == "passkey" and "depth" in r]
    models = [m for m in ("before", "after") if any(r["model"] == m for r in rows)]
    models = models or list(dict.fromkeys(r["model"] for r in rows))
    if not rows:
        return None
    lengths = sorted({r["context_length"] for r in rows})
    depths = sorted({r["depth"] for r in rows})
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        width = 1.4 + len(models) * (0.6 + 0.62 * len(lengths))
        figure = Figure(figsize=(max(5.4, width), 0.9 + 0.27 * len(depths)), layout="constrained")
        panels = np.atleast_1d(figure.subplots(1, len(models), sharey=True))
        for axes, model in zip(panels, models, strict=True):
            table = np.full((len(depths), len(lengths)), np.nan)
            for r in rows:
                if r["model"] == model:
                    at = depths.index(r["depth"]), lengths.index(r["context_length"])
                    table[at] = r["value"]
            axes.imshow(table, cmap=_SHARES, vmin=0, vmax=1, aspect="auto")
            for (i, j), value in np.ndenumerate(table):
                if np.isfinite(value):
                    ink = "#1b1e23" if 0.15 < value < 0.85 else "#ffffff"
                    axes.text(j, i, f"{value:.0%}", ha="center", va="center", color=ink, fontsize=9)
            axes.set_xticks(range(len(lengths)), [_short(n) for n in lengths])
            axes.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
            axes.set_title(model, fontsize=11, color=_INK)
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("depth of the passkey")
        figure.supxlabel("tokens of context", fontsize=10, color=_INK)
        return figure


def plot_loss(metrics: list[dict[str, Any]]) -> Figure | None:
    """Training loss by step, with a running mean."""
    points = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None]
    if len(points) < 2:
        return None
    steps, losses = (np.array(x, float) for x in zip(*points, strict=True))
    window = max(1, len(losses) // 20)
    sums = np.cumsum(np.insert(losses, 0, 0.0))
    smooth = (sums[window:] - sums[:-window]) / window
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 2.8), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, color=AFTER, alpha=0.3, linewidth=1)
        axes.plot(steps[window - 1 :], smooth, color=AFTER, linewidth=2)
        axes.set_xlabel("step")
        axes.set_ylabel("training loss (nats a token)")
        return figure


def plot_positions(
    examples: Sequence[dict[str, Any]],
    coverage: Sequence[tuple[int, float]],
    train_length: int,
    target_length: int,
) -> Figure:
    """Examples as chunks on 0 .. T, and the share of examples that show each distance.

    Args:
        examples: `lengths` and `position_starts` of the chunks of each.
        coverage: (distance, share) pairs.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[1.6, 1])
        for row, example in enumerate(examples):
            chunks = zip(example["position_starts"], example["lengths"], strict=True)
            for i, (start, length) in enumerate(chunks):
                top.barh(row, length, left=start, height=0.7, color=CHUNKS[i % len(CHUNKS)])
        top.invert_yaxis()
        top.set_yticks([])
        top.set_ylabel("examples")
        top.grid(axis="y", visible=False)
        x, y = zip(*coverage, strict=True)
        bottom.fill_between(x, [100 * v for v in y], color=AFTER, alpha=0.25, linewidth=0)
        bottom.plot(x, [100 * v for v in y], color=AFTER, linewidth=2)
        bottom.set_ylim(0, 105)
        bottom.set_xlim(0, target_length)
        bottom.set_ylabel("examples that\nshow it (%)")
        bottom.set_xlabel("position (above), relative distance (below), in tokens")
        bottom.axvline(train_length, color=_INK, linewidth=1, linestyle=":")
        bottom.annotate(" training length", (train_length, 100), va="top", fontsize=8, color=_INK)
        return figure


def to_svg(figure: Figure, label: str) -> str:
    """Inline SVG with a text alternative; its ink and lines take the page's colours."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--line)")
    head, _, rest = svg.partition(">")
    return f'{head} role="img" aria-label="{label}">{rest}'


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def _length_axis(axes: Any, lengths: list[int]) -> None:
    ticks = sorted(set(lengths))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(int(v))))


def _short(tokens: int) -> str:
    return f"{tokens // 1024}k" if tokens % 1024 == 0 and tokens >= 8192 else f"{tokens:,}"
