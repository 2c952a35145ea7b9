"""Errors that a user can fix, and the checks that find them before a run."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


class SkipwiseError(Exception):
    """An error in one to three lines: the input, the reason, the fix. Shown without a traceback."""


class RunStopped(SkipwiseError):
    """The user stopped the run; it was saved, and the same command continues it."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one preflight check."""

    name: str
    passed: bool
    detail: str  # one sentence: what was found, and how to fix it if the check failed
    numbers: dict[str, Any] = field(default_factory=dict)  # the measurements behind it
    is_warning: bool = False  # it passed, and something that the run promises will be missing

    def __str__(self) -> str:
        word = "FAIL" if not self.passed else "warn" if self.is_warning else "ok  "
        return f"{word} {self.name}: {self.detail}"


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or the error's type where it has no text."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """The last line of an error: the names that are spelled nearly so. Empty if there are none."""
    near = difflib.get_close_matches(str(given), list(choices), 2)
    return f"\ndid you mean {' or '.join(near)}?" if near else ""


def require(checks: list[Check]) -> None:
    """Stop if a check failed.

    Raises:
        SkipwiseError: names each failed check and its fix.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = "\n".join(f"{check.name}: {check.detail}" for check in failed)
        raise SkipwiseError(f"the preflight failed\n{lines}")
