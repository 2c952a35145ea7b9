"""How the tables, the figures and the page write numbers, shares, lengths and times."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

METRIC_NAMES = {
    "bits_per_byte": "bits per byte",
    "exact_match": "exact match",
    "long_ppl": "LongPPL",
    "context_gain": "gain by context",
    "area": "mean score",
    "loss": "mean loss in nats",
}
_NUMBERS = ("perplexity", "bits_per_byte", "word_perplexity", "byte_perplexity")  # no shares
_THREE_DIGITS = ("bits_per_byte", "loss")


def is_share(row: dict[str, Any]) -> bool:
    """Whether values are in 0 .. 1 and written in percent: as the row says, else by its metric."""
    given = row.get("is_share")
    return row["metric"] not in _NUMBERS if given is None else bool(given)


def higher_is_better(row: dict[str, Any]) -> bool:
    given = row.get("higher_is_better")
    return is_share(row) if given is None else bool(given)


def metric_name(row: dict[str, Any]) -> str:
    metric: str = row["metric"]
    return METRIC_NAMES.get(metric, metric)


def metric_label(row: dict[str, Any]) -> str:
    """`exact match ↑`: the metric and which direction is better."""
    return f"{metric_name(row)} {'↑' if higher_is_better(row) else '↓'}"


def format_value(row: dict[str, Any]) -> str:
    """`8.14 [7.90, 8.40]`, or `98 % [93, 99]` for a share."""
    value, low, high = row["value"], row["low"], row["high"]
    known = low is not None or high is not None
    if value is None and row.get("reason"):
        return str(row["reason"])
    if value is None:
        return "not measured" if is_share(row) else "beyond measure"
    if not is_share(row):
        digits = 3 if row["metric"] in _THREE_DIGITS else 2
        shown = number(value, digits)
        interval = f"{number(low, digits)}, {number(high, digits)}"
    else:
        shown = f"{percent(value)} %"
        low, high = 100 * (low or 0), 100 * (1 if high is None else high)
        # no decimals if the rounded interval holds the value
        digits = 0 if round(low) <= 100 * value <= round(high) else 1
        interval = f"{low:.{digits}f}, {high:.{digits}f}"
    return f"{shown} [{interval}]" if known else shown


def short_value(row: dict[str, Any]) -> str:
    """`8.14` or `98 %`, without the interval."""
    return format_value(row).partition(" [")[0]


def percent(share: float) -> str:
    """A share in percent: no decimals if it has none, and 0 or 100 only if it is exactly that."""
    value = 100 * share
    if round(value, 6) == round(value):
        return f"{value:.0f}"
    return f"{min(max(value, 0.1), 99.9):.1f}"


def number(value: float | None, digits: int = 2) -> str:
    """`7.75`, `92.50`, `12,345`, `3.2e+08`."""
    if value is None or not math.isfinite(value):
        return "∞"
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}f}"


def signed(value: float, digits: int = 1) -> str:
    """`+0.4`, `−1.2`, `0.0`: with a true minus sign, and no sign for zero."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return ("−" if value < 0 else "+") + text


def length_names(lengths: Sequence[int]) -> list[str]:
    """`256`, `2,048`; all in k if the longest is 8k or more and all are multiples of 1,024."""
    if max(lengths) >= 8192 and all(n % 1024 == 0 for n in lengths):
        return [f"{n // 1024}k" for n in lengths]
    return [f"{n:,}" for n in lengths]


def listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(part for part in (", ".join(names[:-1]), *names[-1:]) if part)


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes / 60:.1f} h"


def short_count(count: float) -> str:
    """`126 M`, `8.06 G`: three digits and the SI prefix."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            digits = 2 if count < 10 * size else 1 if count < 100 * size else 0
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:,.0f}"
