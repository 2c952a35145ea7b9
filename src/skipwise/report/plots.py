"""Figures of a run with matplotlib: as PNG, and as SVG whose colours are the page's variables.

Each figure is drawn twice: wide for a laptop, and narrow for a phone, where the wide one's text
would shrink to six pixels. Blue and orange are told apart in every common colour blindness.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from skipwise.report.tables import Rows, finite, number
from skipwise.report.words import length_names, milestones

WIDE, NARROW = 8.4, 4.9  # inches; 72 SVG units each
BEFORE, AFTER, CHUNKS = "#d9730d", "#2f6fde", ("#2f6fde", "#d9730d", "#1a936f", "#8f5bd6")
_INK, _GRID = "#3a3f47", "#c9ccd1"
_VARIABLES = {
    _INK: "currentColor",
    _GRID: "var(--line)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    CHUNKS[2]: "var(--third)",
    CHUNKS[3]: "var(--fourth)",
}
_SHARES = LinearSegmentedColormap.from_list("shares", ["#e8862e", "#efe3d3", "#2b66d0"])
_MOST_CHUNKS = 600  # rectangles in the picture of positions
_MOST_STEPS = 400  # points of the loss curve
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
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def plot_perplexity(rows: Rows, original_length: int, width: float = WIDE) -> Figure | None:
    """Perplexity against context length, before and after, with 95 % bands."""
    rows = [r for r in finite(rows) if r["task"] == "perplexity" and r["value"] is not None]
    if not rows:
        return None
    lengths = sorted({r["context_length"] for r in rows})
    values = [r["value"] for r in rows]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, 3.6), layout="constrained")
        axes = figure.subplots()
        for model, colour, marker, up in (("before", BEFORE, "s", 1), ("after", AFTER, "o", -1)):
            points = sorted(
                (r for r in rows if r["model"] == model), key=lambda r: r["context_length"]
            )
            if not points:
                continue
            x, y = ([p[key] for p in points] for key in ("context_length", "value"))
            axes.plot(x, y, marker=marker, color=colour, label=model, linewidth=2)
            bands = [p for p in points if p["low"] is not None and p["high"] is not None]
            axes.fill_between(
                [p["context_length"] for p in bands],
                [p["low"] for p in bands],
                [p["high"] for p in bands],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            if len(lengths) <= (8 if width >= WIDE else 5):
                for at, value in zip(x, y, strict=True):
                    axes.annotate(
                        number(value),
                        (at, value),
                        xytext=(0, 7 * up),
                        textcoords="offset points",
                        ha="center",
                        va="bottom" if up > 0 else "top",
                        fontsize=9,
                    )
        if max(values) > 4 * min(values):
            axes.set_yscale("log")
            decades = np.log10(max(values) / min(values))
            axes.yaxis.set_major_locator(
                LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,))
            )
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda v, _: f"{v:,g}" if v < 1e6 else f"{v:.0e}")
            )
        axes.margins(x=0.07, y=0.12)
        _length_axis(axes, lengths)
        axes.axvline(original_length, color=_INK, linewidth=1, linestyle=":")
        axes.annotate(
            "original window",
            (original_length, 1.01),
            xycoords=("data", "axes fraction"),
            ha="center" if lengths[0] < original_length < lengths[-1] else "left",
            va="bottom",
            fontsize=9,
        )
        axes.set_xlabel("tokens of context (same target tokens)")
        axes.set_ylabel("perplexity")
        figure.legend(loc="outside upper right", ncols=2)
        return figure


def plot_passkey(rows: Rows, width: float = WIDE) -> Figure | None:
    """Heat maps of retrieval by depth and context length, a panel a model."""
    rows = [r for r in finite(rows) if r["task"] == "passkey" and r.get("depth") is not None]
    if not rows:
        return None
    models = [m for m in ("before", "after") if any(r["model"] == m for r in rows)]
    models = models or list(dict.fromkeys(r["model"] for r in rows))
    lengths = sorted({r["context_length"] for r in rows})
    depths = sorted({r["depth"] for r in rows})
    beside = len(lengths) * len(models) <= (18 if width >= WIDE else 8)
    shape = (1, len(models)) if beside else (len(models), 1)
    height = (0.27 * len(depths) + 0.35) * shape[0] + 0.6
    with matplotlib.rc_context({**_STYLE, "axes.grid": False}):
        figure = Figure(figsize=(width, max(height, 1.6)), layout="constrained")
        panels = figure.subplots(*shape, sharey=True, sharex=True, squeeze=False).ravel()
        cell = 72 * width / (len(lengths) * shape[1] + 1)  # points, roughly
        for axes, model in zip(panels, models, strict=True):
            for row in (r for r in rows if r["model"] == model and r["value"] is not None):
                x, y = lengths.index(row["context_length"]), depths.index(row["depth"])
                colour = to_hex(_SHARES(row["value"]))
                square = Rectangle((x - 0.48, y - 0.46), 0.96, 0.92, facecolor=colour, lw=0)
                square.set_clip_on(False)
                axes.add_patch(square)
                axes.text(
                    x,
                    y,
                    f"{100 * row['value']:.0f}{' %' if cell > 34 else ''}",
                    ha="center",
                    va="center",
                    color=_readable(colour),
                    fontsize=9 if cell > 26 else 7,
                )
            axes.set_xlim(-0.5, len(lengths) - 0.5)
            axes.set_ylim(len(depths) - 0.5, -0.5)
            axes.set_xticks(range(len(lengths)), length_names(lengths))
            axes.set_yticks(range(len(depths)), [f"{100 * d:.0f} %" for d in depths])
            axes.set_title(model, fontsize=11, color=_INK)
            axes.spines[:].set_visible(False)
        figure.supylabel("depth of the passkey", fontsize=10, color=_INK)
        figure.supxlabel("tokens of context", fontsize=10, color=_INK)
        return figure


def plot_loss(metrics: list[dict[str, Any]], width: float = WIDE) -> Figure | None:
    """Training loss by step, with a running mean; beyond 400 steps the range of equal bins."""
    points = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None and "step" in m]
    if len(points) < 2:
        return None
    steps, losses = (np.array(x, float) for x in zip(*points, strict=True))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, 2.9), layout="constrained")
        axes = figure.subplots()
        if len(steps) > _MOST_STEPS:
            edges = np.linspace(0, len(steps), _MOST_STEPS // 2 + 1).astype(int)[:-1]
            lows, highs = np.minimum.reduceat(losses, edges), np.maximum.reduceat(losses, edges)
            axes.fill_between(steps[edges], lows, highs, color=AFTER, alpha=0.25, linewidth=0)
        else:
            axes.plot(steps, losses, color=AFTER, alpha=0.35, linewidth=1)
        window = max(1, len(losses) // 20)
        sums = np.cumsum(np.insert(losses, 0, 0.0))
        smooth = (sums[window:] - sums[:-window]) / window
        every = max(1, len(smooth) // _MOST_STEPS)
        axes.plot(steps[window - 1 :][::every], smooth[::every], color=AFTER, linewidth=2)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(8 if width >= WIDE else 4, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
        axes.set_xlabel("step")
        axes.set_ylabel("loss (nats a token)")
        return figure


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
    with matplotlib.rc_context(_STYLE):
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
            bottom.annotate(
                f"{100 * share:.3g} % at {distance:,}",
                (distance, 100 * share),
                xytext=(0, 5 if share < 0.8 else -5),
                textcoords="offset points",
                ha="center",
                va="bottom" if share < 0.8 else "top",
                fontsize=9,
            )
        bottom.set_ylim(0, 108)
        bottom.set_yticks([0, 50, 100], ["0 %", "50 %", "100 %"])
        bottom.set_xlim(0, T)
        parts = 8 if width >= WIDE and T < 100_000 else 4
        bottom.set_xticks([T * i // parts for i in range(parts + 1)])
        bottom.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
        bottom.set_ylabel("examples\nshowing it")
        bottom.set_xlabel("relative distance of two tokens")
        if L < T:
            bottom.axvline(L, color=_INK, linewidth=1, linestyle=":")
            bottom.annotate(
                "training length",
                (L, 95),
                xytext=(4, 0),
                textcoords="offset points",
                va="top",
                fontsize=9,
            )
        return figure


def to_svg(figure: Figure, name: str, kind: str) -> str:
    """Inline SVG of class `kind`: no metadata, ids of its own, the page's colours and font."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # a hundredth of a point is enough; text between tags stays as it is
    svg = re.sub(r"<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), svg)
    svg = re.sub(r"font-family: [^;\"]*;?\s*", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    # one page holds many figures, and an id belongs to one element
    svg = re.sub(r'\bid="', f'id="{name}-{kind}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-{kind}-', svg)
    svg = svg.replace("url(#", f"url(#{name}-{kind}-")
    svg = re.sub(r">\s+<", "><", svg)
    return svg.replace("<svg ", f'<svg class="{kind}" aria-hidden="true" ', 1)


def to_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144, facecolor="white")
    return buffer.getvalue()


def _length_axis(axes: Any, lengths: list[int]) -> None:
    """Log2; a label at every length that has room for one."""
    room = (np.log2(lengths[-1]) - np.log2(lengths[0])) / 9
    ticks = [lengths[-1]]
    for length in reversed(lengths[:-1]):
        if np.log2(ticks[-1]) - np.log2(length) >= room:
            ticks.append(length)
    names = dict(zip(lengths, length_names(lengths), strict=True))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: names.get(round(v), "")))


def _readable(background: str) -> str:
    """The ink, dark or white, with the higher contrast (WCAG 2.2, relative luminance)."""
    channels = [int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.061 else "#1b1e23"
