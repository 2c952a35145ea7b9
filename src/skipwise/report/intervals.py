"""95 % intervals: Wilson's for shares, Student's t over documents for means, and of differences.

A difference between two models is paired: both were measured on the same trials or windows, so what
makes a trial hard for both drops out.

Source:  Wilson 1927, "Probable inference", JASA 22, 209-212; Brown, Cai & DasGupta 2001, "Interval
         estimation for a binomial proportion", section 3.1.1; Agresti & Min 2005, "Simple improved
         confidence intervals for comparing matched proportions", Statistics in Medicine 24, 729-740
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

Z = 1.959963984540054  # 97.5 % point of the normal distribution
FEWEST_DOCUMENTS = 5  # with an interval
Interval = tuple[float, float | None, float | None]  # value, low, high


def wilson(num_hits: float, num_samples: int) -> tuple[float, float]:
    n, z2 = num_samples, Z * Z
    p = num_hits / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if num_hits == 0 else centre - half
    high = 1.0 if num_hits == n else centre + half
    return max(0.0, low), min(1.0, high)


def paired_difference(
    values: Sequence[float], others: Sequence[float], clusters: Sequence[int] | None = None
) -> Interval:
    """Mean difference of paired shares in 0 .. 1 and its interval, which never collapses.

    Agresti and Min add half a trial to each of the four outcomes of hits and misses.

    Args:
        clusters: the haystack of each trial; where trials share one, the interval is at least that
            of `clustered_mean`, and there is none with fewer than 5 haystacks.
    """
    change = np.asarray(values, float) - np.asarray(others, float)
    num = len(change) + 2
    centre = float(change.sum()) / num
    spread = math.sqrt((float((change**2).sum()) + 1) / num - centre**2)
    half = Z * spread / math.sqrt(num)
    return _at_least(change, clusters, (max(-1.0, centre - half), min(1.0, centre + half)), -1.0)


def _at_least(
    values: np.ndarray, clusters: Sequence[int] | None, bounds: tuple[float, float], lowest: float
) -> Interval:
    """The mean of values and these bounds, or wider ones where values share a cluster."""
    if not clusters or len(set(clusters)) == len(values):
        return float(values.mean()), *bounds
    mean, low, high = clustered_mean(values, np.array(clusters))
    if not math.isfinite(low):
        return mean, None, None
    return mean, max(lowest, min(low, bounds[0])), min(1.0, max(high, bounds[1]))


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float, float]:
    """Mean of values that are correlated within clusters, and its t interval.

    Args:
        values: (n,) one for each window.
        clusters: (n,) the document of each window.

    Returns:
        mean, low, high; the interval is (-inf, inf) with fewer than 5 documents, because Student's
        t is then so wide, and the normal distribution so doubtful, that a band tells nothing.
    """
    mean = float(values.mean())
    _, ids = np.unique(clusters, return_inverse=True)
    num = int(ids.max()) + 1
    if num < FEWEST_DOCUMENTS:
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


def mean_interval(shares: Sequence[float], clusters: Sequence[int] | None = None) -> Interval:
    """Mean of shares and its Wilson interval, which never collapses at 0 and 1.

    `clusters` as in `paired_difference`.

    Shares of several answers vary less than hits and misses of the same mean; for those the
    interval is wider than needed.
    """
    values = np.asarray(shares, float)
    return _at_least(values, clusters, wilson(float(values.sum()), len(shares)), 0.0)
