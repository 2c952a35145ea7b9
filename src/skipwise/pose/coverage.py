"""How often each relative distance occurs: exact for PoSE, by sampling for other samplers."""

from __future__ import annotations

import numpy as np

from skipwise.errors import SkipwiseError
from skipwise.pose.samplers import FullLength, PoSE, Sampler

_LONGEST_SAMPLED = 1 << 22  # tokens; beyond, arrays of twice that length take seconds each


def coverage(
    sampler: Sampler,
    *,
    num_samples: int = 2000,
    rng: np.random.Generator | None = None,
    distances: np.ndarray | None = None,
) -> np.ndarray:
    """Probability that one example contains each relative distance.

    Exact for PoSE with one or two chunks and for full length, sampled otherwise.

    Args:
        distances: in tokens. Defaults to 0 .. T-1.

    Returns:
        float64; one entry for each distance: the probability that two of the tokens are that far
        apart.

    Raises:
        SkipwiseError: it would have to be sampled over a window beyond memory.
    """
    T = sampler.target_length
    exact = isinstance(sampler, PoSE) and sampler.num_chunks <= 2
    if not exact and not isinstance(sampler, FullLength) and T > _LONGEST_SAMPLED:
        raise SkipwiseError(
            f"the coverage of {type(sampler).__name__} is sampled, up to {_LONGEST_SAMPLED:,} "
            f"tokens, and the target has {T:,}\n"
            "type a shorter target, or method=pose with num_chunks=2"
        )
    wanted = np.arange(T) if distances is None else distances
    if isinstance(sampler, FullLength):
        return np.ones(len(wanted))
    if isinstance(sampler, PoSE) and exact:
        return _exact_coverage(sampler, wanted)
    rng = rng or np.random.default_rng(0)
    shown = np.zeros(T)
    num_samples = max(8, min(num_samples, _LONGEST_SAMPLED * 32 // T))
    for _ in range(num_samples):
        position_ids = sampler.sample(rng, T).position_ids()
        used = np.zeros(2 * T)
        used[position_ids] = 1.0
        pairs = np.fft.irfft(np.abs(np.fft.rfft(used)) ** 2, 2 * T)[:T]  # autocorrelation
        shown += pairs > 0.5
    return shown[wanted] / num_samples


def _exact_coverage(sampler: PoSE, distance: np.ndarray) -> np.ndarray:
    """Distances 0 .. max(l_0, l_1)-1 inside two chunks, u+1 .. u+L-1 across; l_0, u independent."""
    L, T = sampler.train_length, sampler.target_length
    plain = (distance < L).astype(float)
    if sampler.num_chunks == 1:
        return plain
    longest = (L + 1) // 2 if sampler.chunk_lengths == "first-half" else L - 1  # of l_0 >= 1
    shorter = np.minimum(longest, distance) - np.maximum(1, L - distance) + 1  # l_0, L - l_0 <= d
    inside = 1.0 - np.clip(shorter, 0, None) / longest
    lowest, highest = np.maximum(0, distance - L + 1), np.minimum(T - L, distance - 1)
    across = np.clip(highest - lowest + 1, 0, None) / (T - L + 1)
    shown = 1.0 - (1.0 - inside) * (1.0 - across)
    return sampler.unskipped_fraction * plain + (1.0 - sampler.unskipped_fraction) * shown
