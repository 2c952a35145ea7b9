"""How often each relative distance occurs: exact for PoSE, by sampling for other samplers."""

from __future__ import annotations

import numpy as np

from skipwise.pose.samplers import FullLength, PoSE, Sampler


def coverage(
    sampler: Sampler, *, num_samples: int = 2000, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Probability that one example contains each relative distance.

    Exact for PoSE with one or two chunks and for full length, sampled otherwise.

    Returns:
        (T,) float64; entry d is the probability that two of the tokens are d positions apart.
    """
    if isinstance(sampler, FullLength):
        return np.ones(sampler.target_length)
    if isinstance(sampler, PoSE) and sampler.num_chunks <= 2:
        return _exact_coverage(sampler)
    rng = rng or np.random.default_rng(0)
    T = sampler.target_length
    shown = np.zeros(T)
    for _ in range(num_samples):
        position_ids = sampler.sample(rng, T).position_ids()
        used = np.zeros(2 * T)
        used[position_ids] = 1.0
        pairs = np.fft.irfft(np.abs(np.fft.rfft(used)) ** 2, 2 * T)[:T]  # autocorrelation
        shown += pairs > 0.5
    return shown / num_samples


def _exact_coverage(sampler: PoSE) -> np.ndarray:
    """Distances 0 .. max(l_0, l_1)-1 inside two chunks, u+1 .. u+L-1 across; l_0, u independent."""
    L, T = sampler.train_length, sampler.target_length
    distance = np.arange(T)
    plain = (distance < L).astype(float)
    if sampler.num_chunks == 1:
        return plain
    first = np.arange(1, (L + 1) // 2 + 1 if sampler.chunk_lengths == "first-half" else L)
    longest = np.sort(np.maximum(first, L - first))
    inside = 1.0 - np.searchsorted(longest, distance, side="right") / len(longest)
    lowest, highest = np.maximum(0, distance - L + 1), np.minimum(T - L, distance - 1)
    across = np.clip(highest - lowest + 1, 0, None) / (T - L + 1)
    shown = 1.0 - (1.0 - inside) * (1.0 - across)
    return sampler.unskipped_fraction * plain + (1.0 - sampler.unskipped_fraction) * shown
