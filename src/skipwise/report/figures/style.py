"""Shared by all figures: style, colours, axes, and the conversion to PNG and SVG.

Each figure is drawn twice: wide for a laptop, and narrow for a phone, where the wide one's text
would shrink to six pixels. Blue and orange differ for every common form of colour blindness,
and each curve has its own marker. In the SVG the colours are the page's variables.

Reading order:  curves.py (perplexity, RULER, loss, checkpoints)  heatmaps.py (depth x
                length)  positions.py (positions seen in training)  alt_text.py (figures in words)
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
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from skipwise.report.format import length_names

WIDE, NARROW = 8.4, 4.9  # inches; 72 SVG units each
MOST_CURVES = 4  # colours that can be told apart; more models appear only in the table
BEFORE, AFTER, CHUNKS = "#d9730d", "#2f6fde", ("#2f6fde", "#d9730d", "#1a936f", "#8f5bd6")
INK, GRID = "#3a3f47", "#c9ccd1"
_MARKERS = ("s", "o", "^", "D")
_VARIABLES = {
    INK: "currentColor",
    GRID: "var(--line)",
    BEFORE: "var(--before)",
    AFTER: "var(--after)",
    CHUNKS[2]: "var(--third)",
    CHUNKS[3]: "var(--fourth)",
}
_SHARES = LinearSegmentedColormap.from_list("shares", ["#e8862e", "#efe3d3", "#2b66d0"])
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "skipwise",
    "text.parse_math": False,  # a dollar sign in a name is not math
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": GRID,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
}


def palette(models: Sequence[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each model: before is orange, after blue, untrained between them."""
    styles = list(zip((BEFORE, AFTER, *CHUNKS[2:]), _MARKERS, strict=True))
    fixed = {m: styles[i] for i, m in enumerate(("before", "after", "untrained")) if m in models}
    left = [style for style in styles if style not in fixed.values()]
    others = [m for m in models if m not in fixed]
    return {**fixed, **dict(zip(others, left, strict=False))}


def share_colours(share: float) -> tuple[str, str]:
    """Background from orange (none) to blue (all), and the text colour that is readable on it."""
    background = to_hex(_SHARES(share))
    return background, _readable(background)


def shorten(name: str, room: int) -> str:
    """At most `room` characters, with dots for the middle of a longer name."""
    if len(name) <= room:
        return name
    tail = max((room - 1) // 2, 1)
    return f"{name[: max(room - 1 - tail, 1)]}…{name[-tail:]}"


def to_svg(figure: Figure, name: str, kind: str) -> str:
    """Inline SVG of class `kind`: no metadata, unique ids, the page's colours and font."""
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    figure.set_layout_engine(None)  # it is laid out: the next file takes half the time
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
    figure.set_layout_engine(None)
    return buffer.getvalue()


def length_axis(axes: Any, lengths: list[int]) -> None:
    """A log2 axis with a label at every length, as far as there is room."""
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


def label_point(axes: Any, text: str, point: tuple[float, float], up: float, ha: str) -> None:
    """Text at a distance of `up` points above a data point, or below it if `up` is negative."""
    place, va = {"xytext": (0, up), "textcoords": "offset points"}, "bottom" if up > 0 else "top"
    axes.annotate(text, point, **place, ha=ha, va=va, fontsize=9)


def _readable(background: str) -> str:
    """The ink, dark or white, with the higher contrast (WCAG 2.2, relative luminance)."""
    channels = [int(background[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#ffffff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.061 else "#1b1e23"
