"""Skipwise extends the context window of a RoPE language model by PoSE training.

Only numpy is loaded here; everything that needs torch lives in submodules.
"""

from typing import TYPE_CHECKING, Any

from skipwise.errors import SkipwiseError
from skipwise.pose.coverage import coverage
from skipwise.pose.samplers import CREAM, Example, FullLength, PoSE, RandPos

if TYPE_CHECKING:
    from skipwise.integrations.collator import PoSECollator
    from skipwise.integrations.preflight_callback import PreflightCallback, finalize_checkpoint

__version__ = "0.1.0"
__all__ = [
    "CREAM",
    "Example",
    "FullLength",
    "PoSE",
    "PoSECollator",
    "PreflightCallback",
    "RandPos",
    "SkipwiseError",
    "coverage",
    "finalize_checkpoint",
]

_LAZY = {  # these load torch
    "PoSECollator": "integrations.collator",
    "PreflightCallback": "integrations.preflight_callback",
    "finalize_checkpoint": "integrations.preflight_callback",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'skipwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"skipwise.{_LAZY[name]}"), name)
