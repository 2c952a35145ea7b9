"""The study's rows as they were measured, and their means over seeds."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from settings import L, Setting

RESULTS = Path(__file__).parents[1] / "results"
WINDOWS = 64  # of the rows that are shown


def newest(name: str) -> dict[str, Any] | None:
    files = sorted(RESULTS.glob(f"{name}_2*.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


class Rows:
    """The study's rows by setting; a figure is the mean over the seeds that were measured."""

    def __init__(self) -> None:
        found = newest("study")
        self.rows = [r for r in found["rows"] if r["windows"] == WINDOWS] if found else []
        self.by_mark: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows:
            self.by_mark.setdefault(_mark(_named(row)), []).append(row)

    def of(self, setting: Setting) -> list[dict[str, Any]]:
        """Rows of a setting, one a seed; what is asked beside perplexity does not matter."""
        return list({r["setting"]["seed"]: r for r in self.all_of(setting)}.values())

    def all_of(self, setting: Setting) -> list[dict[str, Any]]:
        """Every row of a setting, those measured again among them."""
        return self.by_mark.get(_mark(dataclasses.asdict(setting)), [])

    def mean(
        self, setting: Setting, length: int, *, task: str = "perplexity", tempered: bool = False
    ) -> float | None:
        values = [taken(r, tempered)[task][str(length)] for r in self.of(setting)]
        return statistics.mean(values) if values else None


def _mark(values: dict[str, Any]) -> str:
    """What rows of one mean have in common: all of a setting but seed and questions."""
    kept = {k: v for k, v in values.items() if k not in ("seed", "tasks", "curve")}
    return json.dumps({**vars(Setting()), **kept}, sort_keys=True, default=str)


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return {**dataclasses.asdict(Setting()), **row["setting"]}


def taken(row: dict[str, Any], tempered: bool) -> dict[str, Any]:
    return row["tempered"] if tempered and "tempered" in row else row


def lengths_of(target: int) -> list[int]:
    found = [L]
    while found[-1] < target:
        found.append(2 * found[-1])
    return found
