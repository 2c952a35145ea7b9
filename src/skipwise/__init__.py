"""Skipwise extends the context window of a RoPE language model by PoSE training.

`import skipwise` loads numpy alone. Names that need torch are imported at their first use.
"""

from typing import TYPE_CHECKING, Any

from skipwise.errors import SkipwiseError
from skipwise.pose.coverage import coverage
from skipwise.pose.samplers import CREAM, Example, FullLength, PoSE, RandPos

if TYPE_CHECKING:
    from skipwise.integrations.collator import PoSECollator
    from skipwise.integrations.preflight_callback import PreflightCallback, finalize_checkpoint
    from skipwise.models.prepared import load_scaled

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
    "load_scaled",
]

_LAZY = {  # name: the module that defines it, which imports torch
    "PoSECollator": "integrations.collator",
    "PreflightCallback": "integrations.preflight_callback",
    "finalize_checkpoint": "integrations.preflight_callback",
    "load_scaled": "models.prepared",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'skipwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"skipwise.{_LAZY[name]}"), name)
