"""95 % intervals: Wilson's for shares, Student's t over clusters for means."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from skipwise.report.intervals import Z, wilson


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """Mean of values that are correlated within clusters, and its t interval.

    Args:
        values: (n,) one for each window.
        clusters: (n,) the document of each window; with one document, each window is a cluster.

    Returns:
        mean, low, high; the interval is (-inf, inf) with a single value.
    """
    mean = float(values.mean())
    _, ids = np.unique(clusters, return_inverse=True)
    if ids.max() == 0:
        ids = np.arange(len(values))
    num = int(ids.max()) + 1
    if num < 2:
        return mean, -math.inf, math.inf
    sums = np.bincount(ids, values - mean)  # errors shared within a document do not average out
    error = math.sqrt(float((sums**2).sum()) * num / (num - 1)) / len(values)
    half = t_quantile(num - 1) * error
    return mean, mean - half, mean + half


def t_quantile(degrees: int) -> float:
    """97.5 % point of Student's t; exact for 1 and 2 degrees, else to 1 % (Abramowitz 26.7.5)."""
    if degrees == 1:
        return math.tan(math.pi * 0.475)
    if degrees == 2:
        return 0.95 * math.sqrt(2 / (1 - 0.95**2))
    z, v = Z, float(degrees)
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
    )


def mean_interval(shares: Sequence[float]) -> tuple[float, float, float]:
    """Mean of shares and its Wilson interval, which never collapses at 0 and 1.

    Shares of several answers vary less than hits and misses of the same mean; for those the
    interval is wider than needed.
    """
    value = float(np.mean(shares))
    return value, *wilson(value * len(shares), len(shares))
