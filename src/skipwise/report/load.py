"""Reads the folder of a run or an evaluation: JSON only, with errors that name the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from skipwise.errors import SkipwiseError, is_number, row_fault, run_fault
from skipwise.report.rows import Rows

_KEYS = ("model", "task", "metric", "value")  # that every row has


def read_json(file: Path) -> Any:
    """The content of a JSON file. None if there is no such file.

    Raises:
        SkipwiseError: the file is not JSON.
    """
    if file.exists() and not file.is_file():
        raise SkipwiseError(f"{file} is not a regular file: remove it")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise SkipwiseError(f"{file} is not JSON: {error}") from error


def read_run(folder: Path) -> dict[str, Any] | None:
    """run.json; None if there is no file.

    Raises:
        SkipwiseError: it is not JSON, or a value has the wrong type.
    """
    run = read_json(folder / "run.json")
    if isinstance(run, dict) and (key := run_fault(run)):
        raise SkipwiseError(f"{folder / 'run.json'} has {key}: {str(run[key])[:60]!r}\nrestore it")
    return run if isinstance(run, dict) else None


def read_rows(folder: Path) -> Rows | None:
    """The tidy rows of results.json; None if there is no file.

    Raises:
        SkipwiseError: not JSON, or not a list of rows.
    """
    file = folder / "results.json"
    rows = read_json(file)
    if rows is None:
        return None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SkipwiseError(f"{file} is not a list of rows: measure again with skipwise eval")
    for row in rows:
        missing = [key for key in _KEYS if key not in row]
        if missing:
            raise SkipwiseError(
                f"{file} has a row without {', '.join(missing)}: measure again with skipwise eval"
            )
        if key := row_fault(row):
            wrong = "value that is not a number" if key == "value" else f"wrong {key}"
            raise SkipwiseError(f"{file} has a {wrong}: {str(row.get(key))[:60]!r}")
    return rows


def read_lines(file: Path) -> list[dict[str, Any]]:
    """JSON lines of numbers; incomplete ones are skipped."""
    if not file.is_file():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # the last line of a killed run
            continue
        fits = isinstance(found, dict) and all(is_number(found.get(k)) for k in ("step", "loss"))
        lines += [found] if fits else []
    return lines


def is_evaluation(run: dict[str, Any]) -> bool:
    return run.get("kind") == "evaluation"


def nested(run: dict[str, Any], key: str) -> dict[str, Any]:
    """A dictionary inside run.json; empty if it is missing."""
    found = run.get(key)
    return found if isinstance(found, dict) else {}


def all_training(run: dict[str, Any]) -> dict[str, Any]:
    """Tokens, seconds and peak memory of all training stages, as far as recorded."""
    finish = nested(run, "finish")
    stages = [nested(run, "training"), *([finish] if finish.get("seconds") is not None else [])]
    found = {}
    for key, join in (("num_tokens", sum), ("seconds", sum), ("peak_memory_gib", max)):
        if values := [one[key] for one in stages if one.get(key)]:
            found[key] = join(values)
    return found


def count(found: dict[str, Any], key: str, noun: str) -> str | None:
    """`1,234 documents`, or None if unknown."""
    return None if found.get(key) is None else f"{found[key]:,} {noun}"
