"""Errors that a user can fix, and the checks that find them before a run and in its JSON.

`system_error` is the boundary to the operating system: what it or a library says of disks, rights,
files and memory becomes two lines with the path and the fix.
"""

from __future__ import annotations

import difflib
import errno
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)  # what writing says in a folder to read only
_AGAIN = "type the same command again"
_SPACE = f"free some space, and {_AGAIN}; finished work is kept"
_RIGHTS = "change its owner or mode, or copy it to a folder of yours; --out sets where a run goes"
_TAKEN = "a file or folder is in the way: move it, or give another name"
_BROKEN = f"check the disk or the connection, and {_AGAIN}"
_FIXES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM), _RIGHTS),
    errno.EROFS: "its disk is read-only: copy the folder to another one, or pass an --out there",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), f"type ulimit -n 4096, and {_AGAIN}"),
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ENOENT: f"check the name, or whether something removed it, and {_AGAIN}",
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY), _TAKEN),
    errno.EFBIG: f"type ulimit -f unlimited, and {_AGAIN}",
}
_NO_SPACE = re.compile(  # the second line: torch.save and safetensors
    r"no space left|os error (28|122)\b|disk quota exceeded|errno (28|122)\b"
    r"|unexpected pos \d+ vs|file write failed|no usable temporary directory",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(  # of torch, oneDNN, Rust, Arrow and the dynamic linker
    r"out of memory|(can't|cannot|could not|unable to) allocate|bad_alloc|os error 12\b"
    r"|CUBLAS_STATUS_ALLOC_FAILED|could not create a (primitive|memory)|(m|re)alloc of size"
    r"|failed to map segment|memory allocation|can't start new thread|array is too big",
    re.IGNORECASE,
)
_DAMAGED = re.compile(r"PytorchStreamReader|deserializing|failed finding central directory")
_NUMBER = int | float | None
_NUMBERS = ("memory_gib", "seconds", "num_tokens", "peak_memory_gib", "num_documents", "chosen")
_RUN = {  # keys of run.json that are read again
    **dict.fromkeys(("checks", "files", "card_files", "reproduce"), list),
    **dict.fromkeys(("model", "data", "identity", "rope", "rope_choice", "separator"), dict),
    **dict.fromkeys(("batch", "training", "finish", "selection", "stages"), dict),
    **dict.fromkeys(("temperature", "untrained", "models", "versions", "machine"), dict),
    **dict.fromkeys(("target_length", "original_length"), int),
    **dict.fromkeys(("status", "name", "kind", "command"), str),
    **dict.fromkeys(("train_length_choice", "exported_files", "gguf_files"), dict),
}
_INSIDE: dict[str, Any] = {  # what their items are
    **dict.fromkeys(("files", "card_files"), str),
    **dict.fromkeys(("checks", "gguf_files", "identity"), dict),
    "exported_files": list,
    "stages": _NUMBER,
}
_ROW = {
    **dict.fromkeys(("model", "task", "metric"), str),
    **dict.fromkeys(("value", "low", "high", "stderr", "depth", "floor"), _NUMBER),
    **dict.fromkeys(("num_samples", "context_length"), int | None),
    **dict.fromkeys(("text", "targets", "asked", "title", "about", "group", "kind"), str | None),
    **dict.fromkeys(("samples", "documents"), list | None),
}


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


def is_no_space(error: BaseException) -> bool:
    """Whether a disk is full, in the system's words or in those of a library."""
    number = getattr(error, "errno", None)
    if number is not None:  # its words have a path, which could match by accident
        return number in (errno.ENOSPC, errno.EDQUOT)
    return bool(_NO_SPACE.search(str(error)))


def is_no_memory(error: BaseException) -> bool:
    """Whether memory, of the machine or of the GPU, is used up."""
    number = getattr(error, "errno", None)
    if isinstance(error, MemoryError) or number is not None:
        return isinstance(error, MemoryError) or number == errno.ENOMEM
    return not isinstance(error, SkipwiseError) and bool(_NO_MEMORY.search(str(error)))


def system_error(error: BaseException, path: Any = None, fix: str = "") -> SkipwiseError | None:
    """What the operating system refused, with the path and the fix; None for errors of other kinds.

    Args:
        path: where it happened, if neither the error nor its traceback tells.
        fix: what to type if a disk is full, or a place cannot be written.
    """
    if isinstance(error, SkipwiseError | KeyboardInterrupt | SystemExit):
        return None
    if is_no_memory(error):
        at = "" if path is None else f"{_shown(path)}: "
        detail = f" ({_short(first_line(error))})" if str(error).strip() else ""
        return SkipwiseError(
            f"{at}out of memory{detail}\nuse less of it: training.micro_batch_size=1, "
            "eval.batch_tokens=2048 or data.num_proc=1, or a machine with more"
        )
    where = _place(error) or (_shown(path) if path is not None else "")
    at = f"{where}: " if where else ""
    if is_no_space(error):
        if not fix and (not where or where.startswith(os.environ.get("TMPDIR") or "/tmp")):
            fix = f"free some space, or set TMPDIR to a folder on a larger disk, and {_AGAIN}"
        return SkipwiseError(f"{at or 'a disk: '}no space left on the disk\n{fix or _SPACE}")
    if isinstance(error, UnicodeDecodeError):
        return SkipwiseError(f"{at}not UTF-8 text (byte {error.start})\nsave it as UTF-8")
    if isinstance(error, UnicodeEncodeError):
        fix = "set PYTHONIOENCODING=utf-8:backslashreplace, or rename the file"
        return SkipwiseError(f"{at}text that {error.encoding} cannot encode\n{fix}")
    if isinstance(error, RecursionError):
        return SkipwiseError(f"{at}nested too deep\nfix or remove it")
    damaged = type(error).__name__ == "SafetensorError" or _DAMAGED.search(str(error))
    if isinstance(error, json.JSONDecodeError) or damaged:
        return SkipwiseError(f"{at}damaged: {_short(first_line(error))}\nrestore or remove it")
    if isinstance(error, ValueError) and str(error).startswith("embedded null"):
        return SkipwiseError(f"{at}a name with a NUL character\ngive another name")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # of expanduser
        return SkipwiseError(f"{at}no such user\ngive the path in full, without ~")
    if not isinstance(error, OSError):
        return None
    if error.errno is None or not error.strerror:  # a library's own words
        return SkipwiseError(at + _short(str(error).strip() or type(error).__name__))
    may_use = error.errno in READ_ONLY and fix
    return SkipwiseError(
        f"{at}{error.strerror[0].lower()}{error.strerror[1:]}\n"
        f"{may_use or _FIXES.get(error.errno, _BROKEN)}"
    )


@contextmanager
def system_errors(path: Any, fix: str = "") -> Iterator[None]:
    """Raise the `system_error` of what the operating system refuses inside."""
    try:
        yield
    except Exception as error:
        known = system_error(error, path, fix)
        if known is None:
            raise
        raise known from error


def _place(error: BaseException) -> str:
    """The path of an error: its own, or of the innermost file or path that its traceback holds."""
    for name in (getattr(error, "filename", None), getattr(error, "filename2", None)):
        if isinstance(name, str | bytes | PurePath) and name:
            return _shown(name)
    frames, trace = [], error.__traceback__
    while trace is not None:
        frames.append(trace.tb_frame)
        trace = trace.tb_next
    for frame in reversed(frames[-200:]):
        for value in reversed(list(frame.f_locals.values())):
            name = getattr(value, "name", None) if isinstance(value, io.IOBase) else value
            named = isinstance(name, PurePath) or (name is not value and isinstance(name, str))
            if named and str(name)[:1] != "<":  # not stdout or stderr
                return _shown(name)
    return ""


def _shown(path: Any) -> str:
    """A path in a message: one line, and not too long."""
    name = os.fsdecode(path)
    name = name if name.isprintable() else repr(name)
    return name if len(name) <= 160 else f"{name[:120]}...{name[-30:]}"


def _short(text: str) -> str:
    """At most two lines of a library's message."""
    return "\n".join(line[:300] for line in text.splitlines()[:2])


def did_you_mean(given: object, choices: Iterable[str]) -> str:
    """The last line of an error: the names that are spelled nearly so. Empty if there are none."""
    near = difflib.get_close_matches(str(given), list(choices), 2)
    return f"\ndid you mean {' or '.join(near)}?" if near else ""


def install(extra: str) -> str:
    """How to install an extra, as long as Skipwise is on no package index."""
    return f"pip install '.[{extra}]' in a clone of Skipwise"


def require(checks: list[Check]) -> None:
    """Stop if a check failed.

    Raises:
        SkipwiseError: names each failed check and its fix.
    """
    failed = [check for check in checks if not check.passed]
    if failed:
        lines = "\n".join(f"{check.name}: {check.detail}" for check in failed)
        raise SkipwiseError(f"the preflight failed\n{lines}")


def run_fault(run: dict[str, Any]) -> str:
    """The key of run.json whose value has another type than what is written; empty if none."""
    for key, value in run.items():
        if value is not None and not isinstance(value, _RUN.get(key, object)):
            return key
        if isinstance(value, dict):
            names = (*_NUMBERS, *(("value",) if key in ("temperature", "untrained") else ()))
            if not all(is_number(value.get(name)) for name in names):
                return key
        if key not in _INSIDE:
            continue
        inside = list(value.values() if isinstance(value, dict) else value or [])
        fits = all(isinstance(item, _INSIDE[key]) for item in inside)
        if not fits or (key == "checks" and not all({"name", "passed"} <= set(c) for c in inside)):
            return key
    return ""


def row_fault(row: Any) -> str:
    """The same of a row of results.json."""
    if not isinstance(row, dict):
        return "row"
    numbers = (key for key, kind in _ROW.items() if kind == _NUMBER and not is_number(row.get(key)))
    wrong = (key for key, kind in _ROW.items() if not isinstance(row.get(key), kind))
    return next((key for keys in (wrong, numbers) for key in keys), "")


def is_number(value: Any) -> bool:
    """Whether a value of JSON is none, or a number that arithmetic can take."""
    return value is None or (isinstance(value, int | float) and not abs(value) > 1e300)
