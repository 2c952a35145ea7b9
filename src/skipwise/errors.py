"""Errors that a user can fix, and the result of one preflight check."""

from __future__ import annotations

from dataclasses import dataclass


class SkipwiseError(Exception):
    """An error in one to three lines: the input, the reason, the fix. Shown without a traceback."""


class RunStopped(SkipwiseError):
    """The user stopped the run. It was saved, and the same command resumes it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one preflight check."""

    name: str
    passed: bool
    detail: str  # what was measured, or how to fix a failure

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.detail}"


def require(checks: list[Check]) -> None:
    """Raise if a check failed.

    Raises:
        SkipwiseError: lists each failed check and how to fix it.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = "\n".join(f"{check.name}: {check.detail}" for check in failed)
        raise SkipwiseError(f"the preflight failed\n{lines}")
