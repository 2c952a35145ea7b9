"""The study's rows as they were measured, and lines of tables made of them."""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from settings import L, Setting

RESULTS = Path(__file__).parents[1] / "results"
WINDOWS = 64  # of the rows that are shown
NOT_MEASURED = "not measured"


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

    def line(self, name: str, setting: Setting, *, tempered: bool = False) -> str:
        """A row of a table: seeds, perplexity and passkeys at every length."""
        rows, lengths = self.of(setting), lengths_of(setting.target)
        if not rows:
            cells = [NOT_MEASURED, *[""] * (2 * len(lengths))]
        else:
            cells = [str(len(rows))]
            for task in ("perplexity", "passkey"):
                for length in lengths:
                    values = [taken(r, tempered)[task].get(str(length)) for r in rows]
                    cells.append(_shown(task, [v for v in values if v is not None]))
        return f"| {name} | {' | '.join(cells)} |"

    def both(self, setting: Setting, *, tempered: bool = True) -> list[str]:
        """Perplexity at L and at T, passkeys at T; nothing where it was not measured."""
        found = [taken(row, tempered) for row in self.of(setting)]
        asked = (("perplexity", L), ("perplexity", setting.target), ("passkey", setting.target))
        return [_shown(task, [one[task][str(n)] for one in found]) for task, n in asked]

    def mean(self, setting: Setting, length: int, *, tempered: bool = False) -> float | None:
        values = [taken(r, tempered)["perplexity"][str(length)] for r in self.of(setting)]
        return statistics.mean(values) if values else None


def _mark(values: dict[str, Any]) -> str:
    """What rows of one table line have in common: all of a setting but seed and questions."""
    kept = {k: v for k, v in values.items() if k not in ("seed", "tasks", "curve")}
    return json.dumps({**vars(Setting()), **kept}, sort_keys=True, default=str)


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return {**dataclasses.asdict(Setting()), **row["setting"]}


def taken(row: dict[str, Any], tempered: bool) -> dict[str, Any]:
    return row["tempered"] if tempered and "tempered" in row else row


def _shown(task: str, values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.mean(values)
    return f"{mean:.2f}" if task == "perplexity" else f"{100 * mean:.0f}"


def lengths_of(target: int) -> list[int]:
    found = [L]
    while found[-1] < target:
        found.append(2 * found[-1])
    return found


def head(first: str, target: int) -> list[str]:
    lengths = [f"{n:,}" for n in lengths_of(target)]
    passkeys = [f"key {n}" for n in lengths]
    titles = [first, "seeds", *lengths, *passkeys]
    return ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]


def table(rows: Rows, first: str, target: int, lines: list[tuple[str, Setting, bool]]) -> str:
    made_lines = [rows.line(name, s, tempered=tempered) for name, s, tempered in lines]
    return "\n".join([*head(first, target), *made_lines])
