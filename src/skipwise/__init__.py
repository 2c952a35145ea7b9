"""Skipwise extends the context window of a RoPE language model by PoSE training.

Only numpy is loaded here; everything that needs torch lives in submodules.
"""

from skipwise.errors import SkipwiseError
from skipwise.positions import CREAM, Example, FullLength, PoSE, RandPos, coverage

__version__ = "0.1.0"
__all__ = [
    "CREAM",
    "Example",
    "FullLength",
    "PoSE",
    "RandPos",
    "SkipwiseError",
    "coverage",
]
