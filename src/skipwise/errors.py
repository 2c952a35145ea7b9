"""Errors that a user can mend."""

from __future__ import annotations

from dataclasses import dataclass


class SkipwiseError(Exception):
    """An error in one to three lines: the input, the reason, the fix. Shown without a traceback."""


class RunStopped(SkipwiseError):
    """The user stopped the run; it was saved and goes on when the command is typed again."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one preflight check."""

    name: str
    passed: bool
    detail: str  # what was measured, or the mend where it failed

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.detail}"


def require(checks: list[Check]) -> None:
    """Stop at failed checks.

    Raises:
        SkipwiseError: names each of them with its mend.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = "\n".join(f"{check.name}: {check.detail}" for check in failed)
        raise SkipwiseError(f"the preflight failed\n{lines}")
