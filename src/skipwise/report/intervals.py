"""Wilson's 95 % interval of a share, which never collapses at 0 and 1.

Source:  Wilson 1927, "Probable inference", JASA 22, 209-212; Brown, Cai & DasGupta 2001, "Interval
         estimation for a binomial proportion", section 3.1.1
"""

from __future__ import annotations

import math

Z = 1.959963984540054  # 97.5 % point of the normal distribution


def wilson(num_hits: float, num_samples: int) -> tuple[float, float]:
    n, z2 = num_samples, Z * Z
    p = num_hits / n
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    low = 0.0 if num_hits == 0 else centre - half
    high = 1.0 if num_hits == n else centre + half
    return max(0.0, low), min(1.0, high)
