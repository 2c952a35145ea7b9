"""Differences between two models that were measured on the same trials or windows.

`describe_training` says what training added to rescaling alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from skipwise.report.format import higher_is_better, is_share, metric_name, signed
from skipwise.report.intervals import clustered_mean, paired_difference
from skipwise.report.rows import Row, Rows, find, other_tasks


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Of one row minus another: in points of a share, relative in percent, or in nats."""

    task: str
    value: float
    low: float | None  # None where there are too few documents for an interval
    high: float | None
    unit: str  # "points", "%" or "nats"
    higher_is_better: bool

    @property
    def better(self) -> bool:
        """Whether it is an improvement beyond its interval."""
        return self.direction() > 0

    @property
    def worse(self) -> bool:
        return self.direction() < 0

    def direction(self, among: int = 1) -> int:
        """1 for an improvement beyond error, -1 for a loss, else 0.

        Args:
            among: so many comparisons together are wrong in 5 % (Bonferroni).
        """
        if self.low is None or self.high is None:
            return 0
        wider = _quantile(0.025 / among) / _quantile(0.025)  # of one comparison exactly 1
        low, high = (self.value + wider * (x - self.value) for x in (self.low, self.high))
        sign = int(low > 0) - int(high < 0)
        return sign if self.higher_is_better else -sign

    def __str__(self) -> str:
        """`passkey +61 points [51, 70]`, `perplexity −19 % [−21, −17]`."""
        digits = {"points": 0, "nats": 3}.get(self.unit, 1)
        out = f"{self.task} {signed(self.value, digits)} {self.unit}"
        if self.low is None or self.high is None:
            return out
        return f"{out} [{signed(self.low, digits)}, {signed(self.high, digits)}]"


def difference(row: Row | None, other: Row | None) -> PairedDifference | None:
    """Row minus other; None unless both have the scores of the same trials or windows."""
    if not row or not other or not same_trials(row, other):
        return None
    values, others = (np.array(r["samples"], float) for r in (row, other))
    better = higher_is_better(row)
    if row["task"] == "perplexity":
        bounds = clustered_mean(values - others, np.array(haystacks(row, other)))
        if not math.isfinite(bounds[0]):
            return None
        value, low, high = (100 * math.expm1(min(x, 700.0)) for x in bounds)
        if not math.isfinite(bounds[1]):
            low = high = None
        unit = "%"
    elif is_share(row):
        change = paired_difference(values.tolist(), others.tolist(), haystacks(row, other))
        value = 100 * change[0]
        low, high = (None if x is None else 100 * x for x in change[1:])
        unit = "points"
    else:
        return None
    name = metric_name(row) if row["task"] == "perplexity" else row["task"]
    return PairedDifference(
        task=name, value=value, low=low, high=high, unit=unit, higher_is_better=better
    )


def same_trials(row: Row, other: Row) -> bool:
    """Whether both have scores, one for one of the same trials or of the same target tokens."""
    same = row.get("text") == other.get("text")
    for key in ("targets", "asked", "documents"):  # older rows have fewer of them
        pair = row.get(key), other.get(key)
        same = same and (None in pair or pair[0] == pair[1])
    found = [row.get("samples") or [], other.get("samples") or []]
    return same and len(found[0]) == len(found[1]) > 0


def haystacks(row: Row, other: Row) -> list[int] | None:
    """The haystack of each trial, as either of two rows of the same trials knows it."""
    return row.get("documents") or other.get("documents")


def differences(rows: Rows, model: str, other: str, length: int) -> list[PairedDifference]:
    """Of every task that both models were measured on at this context length."""
    found = []
    for task in ("perplexity", "passkey", "needle", *other_tasks(rows)):
        pair = (find(rows, name, task, length) for name in (model, other))
        if (one := difference(*pair)) is not None:
            found.append(one)
    return found


def describe_training(rows: Rows, length: int) -> tuple[str, bool, str]:
    """What training added to rescaling alone at a context length, and what it took away.

    Returns:
        text that is empty where the untrained model was not measured; whether anything was added;
        what got worse beyond error.
    """
    found = differences(rows, "after", "untrained", length)
    if not found:
        return "", True, ""
    worse, same, better = ([d for d in found if d.direction(len(found)) == i] for i in (-1, 0, 1))
    harm = f"training made worse than rescaling alone: {_listed(worse)}" if worse else ""
    if better:
        text = f"Training added to rescaling alone at {length:,} tokens: {_listed(better)}"
        return text + (f"; within error: {_listed(same)}" if same else ""), True, harm
    within = f": {_listed(same)}" if same else ""
    return f"Training added nothing beyond error to rescaling alone{within}", False, harm


def _quantile(tail: float) -> float:
    return NormalDist().inv_cdf(1 - tail)


def _listed(found: list[PairedDifference]) -> str:
    return ", ".join(map(str, found))
