"""Curves: perplexity and RULER by context length, training loss and checkpoints by step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from skipwise.report.figures import style
from skipwise.report.figures.style import AFTER, BEFORE, INK, MOST_CURVES, STYLE, WIDE
from skipwise.report.format import higher_is_better, is_share, metric_label, number, percent
from skipwise.report.rows import Row, Rows, heading, models_of, task_rows
from skipwise.report.ruler import EFFECTIVE_THRESHOLD, average_rows, summarise_ruler

_MOST_STEPS = 400  # points of the loss curve
_EXPLODED = 1.5  # times the model's lowest value at a shorter length


@matplotlib.rc_context(STYLE)
def plot_perplexity(
    rows: Rows, original_length: int | None = None, width: float = WIDE
) -> Figure | None:
    """Perplexity against context length, one curve per model, with 95 % bands; at most 4 models.

    Values that explode are written at the top, so that the axis shows the others' differences.
    """
    rows = [row for row in task_rows(rows, "perplexity") if row["value"] is not None]
    figure, axes = _plot_by_length(rows, "perplexity", width, 3.6)
    if axes is None:
        return None
    axes.set_xlabel("tokens of context (same target tokens)")
    if original_length:
        lengths = [row["context_length"] for row in rows]
        inside = min(lengths) < original_length < max(lengths)
        _dotted_line(axes, original_length, "original window", "center" if inside else "left")
    return figure


@matplotlib.rc_context(STYLE)
def plot_ruler(rows: Rows, width: float = WIDE) -> Figure | None:
    """The average over the RULER tasks against context length, at most 4 models."""
    rows = average_rows(summarise_ruler(rows))
    figure, axes = _plot_by_length(rows, "mean of the RULER tasks", width)
    if axes is None:
        return None
    axes.axhline(100 * EFFECTIVE_THRESHOLD, color=INK, linewidth=1, linestyle="--")
    beside, place = (1.005, 100 * EFFECTIVE_THRESHOLD), ("axes fraction", "data")
    text = f"{100 * EFFECTIVE_THRESHOLD:.1f} %"
    axes.annotate(text, beside, xycoords=place, va="center", fontsize=9)
    return figure


@matplotlib.rc_context(STYLE)
def plot_metric(rows: Rows, width: float = WIDE) -> Figure | None:
    """The rows of one task and metric against context length, at most 4 models."""
    rows = [row for row in rows if row["value"] is not None]
    return _plot_by_length(rows, metric_label(rows[0]), width)[0] if rows else None


def _plot_by_length(
    rows: Rows, ylabel: str, width: float, height: float = 3.4
) -> tuple[Figure | None, Any]:
    """One curve per model: shares in percent, numbers on a log scale if they differ by much."""
    rows = drawn_rows(rows)
    if not 1 <= len(models_of(rows)) <= MOST_CURVES:
        return None, None
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    values = [row["value"] for row in rows]
    if is_share(rows[0]):
        scaled = [
            {**row, **{k: row[k] and 100 * row[k] for k in ("value", "low", "high")}}
            for row in rows
        ]
        _curves(axes, scaled, lambda value: percent(value / 100), width)
        axes.set_ylim(-14, 112)  # room for the values
        axes.set_yticks([0, 25, 50, 75, 100], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    else:
        off = off_scale(rows)
        inside = [row for row in rows if row not in off]
        values = [row["value"] for row in inside]
        _curves(axes, inside, number, width)
        axes.margins(y=0.12)
        if max(values) > 4 * min(values) > 0:
            axes.set_yscale("log")
            decades = np.log10(max(values) / min(values))
            subs = (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
            axes.yaxis.set_major_locator(LogLocator(subs=subs))
            axes.yaxis.set_minor_locator(NullLocator())
            formatter = FuncFormatter(lambda v, _: f"{v:,g}" if v < 1e6 else f"{v:.0e}")
            axes.yaxis.set_major_formatter(formatter)
        if min(values) > 0:
            _fit_axis(axes, inside, rows, off)
    axes.margins(x=0.07)
    style.length_axis(axes, sorted({row["context_length"] for row in rows}))
    axes.set_xlabel("tokens of context")
    axes.set_ylabel(ylabel)
    _legend(figure, axes, width)
    return figure, axes


def drawn_rows(rows: Rows) -> Rows:
    """The rows of at most 4 models if that leaves out only untrained ones, or bases too."""
    for left_out in ("untrained", "before"):
        if len(models_of(rows)) > MOST_CURVES:
            rows = [row for row in rows if row["model"].partition(" ")[0] != left_out]
    return rows


def off_scale(rows: Rows) -> Rows:
    """The rows that would squeeze the axis: exploded, while another model's are not.

    A value explodes if it is more than 1.5 times the same model's lowest at a shorter length, and
    above all values that do not explode.
    """
    if not rows or is_share(rows[0]) or higher_is_better(rows[0]):
        return []
    exploded: Rows = []
    for model in models_of(rows):
        lowest = np.inf
        own = (row for row in rows if row["model"] == model)
        for row in sorted(own, key=lambda row: row["context_length"]):
            exploded += [row] if row["value"] > _EXPLODED * lowest else []
            lowest = min(lowest, row["value"])
    if len(models_of(exploded)) == len(models_of(rows)):
        return []  # they are what the figure shows
    most = max(row["value"] for row in rows if row not in exploded)
    return [row for row in exploded if row["value"] > most]


def _fit_axis(axes: Any, inside: Rows, rows: Rows, off: Rows) -> None:
    """Limits by the values, with bands as far as they fit; the values off the scale at the top."""
    values = [row["value"] for row in inside]
    lowest, highest = min(values), max(values)
    low = max(min([lowest, *(r["low"] for r in inside if r["low"])]), lowest / 1.5)
    high = min(max([highest, *(r["high"] for r in inside if r["high"])]), highest * 1.5)
    is_log = axes.get_yscale() == "log"
    low, high = np.log([low, high]) if is_log else (low, high)
    room = max(high - low, 1e-3 * abs(high), 1e-9)
    stack = max([0, *(sum(r["context_length"] == n["context_length"] for r in off) for n in off)])
    limits = np.array([low - 0.14 * room, high + (0.14 + 0.25 * stack) * room])
    axes.set_ylim(np.exp(limits) if is_log else limits)
    for model, (colour, marker) in style.palette(models_of(rows)).items():
        own = sorted((r for r in rows if r["model"] == model), key=lambda r: r["context_length"])
        points = []
        for row in own:
            y = row["value"]
            if row in off:
                same = [r["model"] for r in off if r["context_length"] == row["context_length"]]
                place = limits[1] - room * (0.2 + 0.25 * same.index(model))
                y = np.exp(place) if is_log else place
                at = (row["context_length"], y)
                style.label_point(axes, f"↑ {number(row['value'])}", at, 5, "center")
                axes.plot(*at, marker=marker, color=colour)
            points.append((row["context_length"], y, row in off))
        for a, b in itertools.pairwise(points):
            if a[2] or b[2]:
                axes.plot((a[0], b[0]), (a[1], b[1]), color=colour, linestyle=":", linewidth=1.5)


def plot_selection(selection: dict[str, Any], width: float = WIDE) -> Figure | None:
    """The score of each checkpoint by step, with a ring around the chosen one; None below two."""
    points = scored_checkpoints(selection)
    if len(points) < 2:
        return None
    steps, scores = zip(*points, strict=True)
    share = is_share_of(selection)
    scale, unit = (100, " %") if share else (1, "")
    chosen = [(step, score) for step, score in points if step == selection.get("chosen")]
    with matplotlib.rc_context(STYLE):
        figure, axes = _step_axes(width)
        axes.plot(steps, [scale * s for s in scores], color=AFTER, marker="o", linewidth=2)
        for step, score in chosen:
            axes.plot(step, scale * score, "o", ms=14, mfc="none", mec=BEFORE, mew=2.2)
            up = selection.get("higher_is_better", True)  # the curve is on the other side
            text = f"chosen: step {step:,}, {percent(score) if share else number(score)}{unit}"
            ha = {steps[0]: "left", steps[-1]: "right"}.get(step, "center")
            style.label_point(axes, text, (step, scale * score), 13 if up else -13, ha)
        axes.margins(x=0.06, y=0.25)
        most = 8 if width >= WIDE else 4
        few = len(steps) <= most
        locator = FixedLocator(steps) if few else MaxNLocator(most, integer=True)
        axes.xaxis.set_major_locator(locator)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_formatter(
            FuncFormatter(lambda v, _: "" if share and not 0 <= v <= 100 else f"{v:,g}{unit}")
        )
        axes.set_ylabel(str(selection.get("metric") or "score"))
        return figure


def scored_checkpoints(selection: dict[str, Any]) -> list[tuple[int, float]]:
    """(step, score) of the candidates that have both, in order of steps."""
    pairs = ((c.get("step"), c.get("score")) for c in selection.get("candidates") or [])
    return sorted(
        (step, score)
        for step, score in pairs
        if step is not None and score is not None and np.isfinite(score)
    )


def is_share_of(selection: dict[str, Any]) -> bool:
    """Whether the scores are shares: higher is better, and all are in 0 .. 1."""
    higher = selection.get("higher_is_better", True)
    return bool(higher) and all(0 <= score <= 1 for _, score in scored_checkpoints(selection))


def plot_loss(metrics: list[dict[str, Any]], width: float = WIDE) -> Figure | None:
    """Training loss by step, with a running mean; above 400 steps, the range in equal bins."""
    points = [(m["step"], m["loss"]) for m in metrics if m.get("loss") is not None and "step" in m]
    if len(points) < 2:
        return None
    steps, losses = (np.array(x, float) for x in zip(*points, strict=True))
    with matplotlib.rc_context(STYLE):
        figure, axes = _step_axes(width)
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
        first = finish_step(metrics)
        if first is not None:
            ha = "center" if first < 0.9 * steps[-1] else "right"
            _dotted_line(axes, first - 0.5, "full length", ha)
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(8 if width >= WIDE else 4, integer=True))
        axes.set_ylabel("loss (nats a token)")
        return figure


def finish_step(metrics: list[dict[str, Any]]) -> int | None:
    """The first step at full length, if any."""
    return next((m["step"] for m in metrics if m.get("phase") == "finish"), None)


def _step_axes(width: float) -> tuple[Figure, Any]:
    """A figure whose x axis is the training step."""
    figure = Figure(figsize=(width, 2.9), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))
    axes.set_xlabel("step")
    return figure, axes


def _dotted_line(axes: Any, x: float, text: str, ha: str) -> None:
    """A vertical line with its name above the axes."""
    axes.axvline(x, color=INK, linewidth=1, linestyle=":")
    above = ("data", "axes fraction")
    axes.annotate(text, (x, 1.01), xycoords=above, ha=ha, va="bottom", fontsize=9)


def _curves(axes: Any, rows: Rows, write: Any, width: float) -> None:
    """A line and a band per model; with one or two models, values are written at the points."""
    models = models_of(rows)
    few = len({row["context_length"] for row in rows}) <= (8 if width >= WIDE else 5)
    means = {m: np.mean([r["value"] for r in rows if r["model"] == m]) for m in models}
    styles = style.palette(models)
    for model in models:
        colour, marker = styles[model]
        points: Sequence[Row] = sorted(
            (r for r in rows if r["model"] == model), key=lambda r: r["context_length"]
        )
        x, y = ([p[key] for p in points] for key in ("context_length", "value"))
        axes.plot(x, y, marker=marker, color=colour, label=_label(model), linewidth=2)
        bands = [p for p in points if p["low"] is not None and p["high"] is not None]
        at, low, high = ([p[key] for p in bands] for key in ("context_length", "low", "high"))
        axes.fill_between(at, low, high, color=colour, alpha=0.15, linewidth=0)
        if len(bands) == 1:  # a band of one length would have no width
            axes.vlines(at, low, high, color=colour, alpha=0.4)
        if len(models) > 2 or not few:
            continue
        up = 1 if means[model] == max(means.values()) else -1  # the upper curve's above it
        others = {(r["context_length"], write(r["value"])) for r in rows if r["model"] != model}
        for at, value in zip(x, y, strict=True):
            if up < 0 and (at, write(value)) in others:
                continue  # written above already
            style.label_point(axes, write(value), (at, value), 7 * up, "center")


def _label(model: str) -> str:
    """A legend label: matplotlib leaves out names that start with an underscore."""
    name = style.shorten(heading(model), 40)
    return f" {name}" if name.startswith("_") else name


def _legend(figure: Figure, axes: Any, width: float) -> None:
    """Above the axes, in as many columns as fit."""
    names = axes.get_legend_handles_labels()[1]
    room = 80 if width >= WIDE else 40  # characters
    columns = len(names)
    while columns > 1 and columns * (max(map(len, names)) + 6) > room:
        columns -= 1
    figure.legend(loc="outside upper right", ncols=columns)
