"""The study's tables and plots, from the newest results, into docs/study.md and docs/study/.

python benchmarks/study/figures.py [--check]

Tables replace what stands between `<!-- NAME -->` and `<!-- end -->`; with --check nothing is
written, and what would change is an error.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from settings import (
    ALIGNED,
    DISTILLED,
    FINISHED,
    FULL,
    LINEAR,
    NONE,
    OURS,
    PAPER,
    TARGETS,
    WEIGHTED,
    L,
    Setting,
    at,
    made,
)

ROOT = Path(__file__).parents[2]
RESULTS, DOCS = ROOT / "benchmarks" / "results", ROOT / "docs"
WINDOWS = 64  # of the rows that are shown
NOT_MEASURED = "not measured"
OFF = made(NONE, rope_off=True)


def newest(name: str) -> dict[str, Any] | None:
    files = sorted(RESULTS.glob(f"{name}_2*.json"))
    return json.loads(files[-1].read_text(encoding="utf-8")) if files else None


class Rows:
    """The study's rows by setting; a figure is the mean over the seeds that were measured."""

    def __init__(self) -> None:
        found = newest("study")
        self.rows = [r for r in found["rows"] if r["windows"] == WINDOWS] if found else []

    def of(self, setting: Setting) -> list[dict[str, Any]]:
        """Rows of a setting, one a seed; what is asked beside perplexity does not matter."""

        def mark(values: dict[str, Any]) -> str:
            kept = {k: v for k, v in values.items() if k not in ("seed", "tasks", "curve")}
            return json.dumps({**vars(Setting()), **kept}, sort_keys=True, default=str)

        wanted = mark(dataclasses.asdict(setting))
        rows = {r["setting"]["seed"]: r for r in self.rows if mark(_named(r)) == wanted}
        return list(rows.values())

    def line(self, name: str, setting: Setting, *, tempered: bool = False, note: str = "") -> str:
        """A row of a table: seeds, perplexity and passkeys at every length."""
        rows, lengths = self.of(setting), lengths_of(setting.target)
        if not rows:
            cells = [NOT_MEASURED, *[""] * (2 * len(lengths))]
        else:
            cells = [str(len(rows)) + note]
            for task in ("perplexity", "passkey"):
                for length in lengths:
                    values = [_taken(r, tempered)[task].get(str(length)) for r in rows]
                    cells.append(_shown(task, [v for v in values if v is not None]))
        return f"| {name} | {' | '.join(cells)} |"

    def mean(self, setting: Setting, length: int, *, tempered: bool = False) -> float | None:
        values = [_taken(r, tempered)["perplexity"][str(length)] for r in self.of(setting)]
        return statistics.mean(values) if values else None


def _named(row: dict[str, Any]) -> dict[str, Any]:
    return {**dataclasses.asdict(Setting()), **row["setting"]}


def _taken(row: dict[str, Any], tempered: bool) -> dict[str, Any]:
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


def methods(rows: Rows) -> str:
    T = 2048
    steps = [
        ("base model", at(OFF, T), False),
        ("YaRN, untrained", _untrained(rows, "yarn"), False),
        ("RandPos", at(made(method="randpos"), T), False),
        ("PoSE as published, linear", at(LINEAR, T), False),
        ("PoSE as published, YaRN", at(PAPER, T), False),
        ("+ aligned text", at(ALIGNED, T), False),
        ("+ importance weights", at(WEIGHTED, T), False),
        ("+ llama3 instead of YaRN", at(OURS, T), False),
        ("+ temperature", at(OURS, T), True),
        ("+ self-distillation", at(DISTILLED, T), True),
        ("+ 10 % of the tokens at full length", at(_finish(3e-4), T), True),
        ("... at a third of the rate", at(_finish(1e-4), T), True),
        ("without distillation, 10 % at full length", at(FINISHED, T), True),
        ("full length, equal tokens", at(FULL, T), False),
    ]
    return table(rows, "f = 8", T, steps)


def _untrained(rows: Rows, rope: str) -> Setting:
    """A scaling alone, as it was measured: what is said of the training that there is none of."""
    one = at(made(NONE, rope=rope), 2048)
    return one if rows.of(one) else made(one, content="aligned")


def _finish(learning_rate: float) -> Setting:
    return made(DISTILLED, finish=0.1, finish_learning_rate=learning_rate)


def factors(rows: Rows) -> str:
    parts = []
    for T in TARGETS:
        lines = [
            ("base model", at(OFF, T), False),
            ("PoSE as published, linear", at(LINEAR, T), False),
            ("PoSE as published, YaRN", at(PAPER, T), False),
            ("defaults without distillation", at(OURS, T), True),
            ("defaults", at(DISTILLED, T), True),
            ("full length, equal tokens", at(FULL, T), False),
        ]
        parts.append(table(rows, f"f = {T // L}", T, lines))
    return "\n\n".join(parts)


def texts(rows: Rows) -> str:
    lines = [
        (
            f"{text}{', weights' if strength else ''}",
            at(made(content=text, strength=strength), 2048),
        )
        for strength in (0.0, 1.0)
        for text in ("uniform", "contiguous", "aligned")
    ]
    return table(rows, "text", 2048, [(name, s, False) for name, s in lines])


def chunks(rows: Rows) -> str:
    lines = [(f"N = {n}, as published", at(made(num_chunks=n), 2048)) for n in (1, 2, 3, 4, 8, 256)]
    more = made(WEIGHTED, gaps="sorted")
    lines += [("N = 2, aligned, weights", at(WEIGHTED, 2048))]
    lines += [
        (f"N = {n}, the same, sorted gaps", at(made(more, num_chunks=n), 2048)) for n in (3, 4)
    ]
    return table(rows, "chunks", 2048, [(name, s, False) for name, s in lines])


def scalings(rows: Rows) -> str:
    lines: list[tuple[str, Setting, bool]] = []
    for rope in ("linear", "ntk", "yarn", "llama3"):
        none, trained = _untrained(rows, rope), at(made(WEIGHTED, rope=rope), 2048)
        lines += [
            (f"{rope}, untrained", none, False),
            ("... with temperature", none, True),
            (f"{rope}, aligned text and weights", trained, False),
            ("... with temperature", trained, True),
        ]
    return table(rows, "scaling", 2048, lines)


def leads(rows: Rows) -> str:
    """What was tried one at a time, f = 8 and 32, by the perplexity at L and T with temperature."""
    lines = ["| | at 256 | at T | passkeys at T | f |", "|---|---:|---:|---:|---:|"]
    for T, lr in ((2048, 3e-4), (2048, 1e-3), (8192, 3e-4)):
        base = made(WEIGHTED, target=T, learning_rate=lr)
        for name, changes in _LEADS:
            found = rows.of(made(base, **changes))
            if not found:
                continue
            taken = [_taken(row, True) for row in found]
            near, far, key = (
                statistics.mean(one[task][str(length)] for one in taken)
                for task, length in (("perplexity", L), ("perplexity", T), ("passkey", T))
            )
            rate = "" if changes.get("learning_rate") else f", rate {lr:g}"
            lines.append(f"| {name}{rate} | {near:.2f} | {far:.2f} | {100 * key:.0f} | {T // L} |")
    return "\n".join(lines)


_DISTIL = {"distil": 0.5, "plain_fraction": 0.2}
_LEADS: list[tuple[str, dict[str, Any]]] = [
    ("aligned text, weights, YaRN", {}),
    ("no weights", {"strength": 0.0}),
    *((f"weights' logarithm times {s:g}", {"strength": s}) for s in (0.25, 0.5, 0.75, 1.25)),
    *((f"{p:.0%} plain examples", {"plain_fraction": p}) for p in (0.1, 0.2, 0.4)),
    ("20 % plain, distilled on them (0.5)", _DISTIL),
    *(
        (f"distilled on first chunks ({d:g})", {"distil": d, "distil_on": "first"})
        for d in (0.2, 0.5, 1.5)
    ),
    ("cut in the first half", {"cut": "first-half"}),
    *((f"N = {n}, sorted gaps", {"num_chunks": n, "gaps": "sorted"}) for n in (3, 4, 8, 16, 32)),
    *((f"{n} sections before near text", {"variant": f"sections:{n}"}) for n in (4, 8, 16, 32)),
    *((f"most related of {n} draws", {"variant": f"related:{n}"}) for n in (4, 16, 64)),
    ("10 % end at the last position", {"variant": "topup:0.1"}),
    ("CREAM with weights", {"method": "cream"}),
    ("60 warm-up steps", {"warmup": 60}),
    ("AdamW beta2 = 0.999", {"beta2": 0.999}),
    ("LoRA rank 16", {"lora_rank": 16}),
    ("100 steps", {"steps": 100}),
    ("1,000 steps", {"steps": 1000}),
    *(
        (f"10 % at full length, at {lr:g}", {"finish": 0.1, "finish_learning_rate": lr})
        for lr in (3e-4, 1e-3)
    ),
    ("30 % at full length", {"finish": 0.3, "finish_learning_rate": 3e-4}),
]


def bars(rows: Rows) -> str:
    """Perplexity against the paper's settings and against full length, in percent."""
    lines = [
        "| f | paper, YaRN | at its best rate | without distillation | defaults | full length | "
        "the better over paper at its best | behind full length |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for T in TARGETS:
        paper, full = rows.mean(at(PAPER, T), T), rows.mean(at(FULL, T), T)
        tried = [rows.mean(at(PAPER, T, learning_rate=lr), T) for lr in _rates(rows, T)]
        lowest = min(filter(None, tried), default=None)
        plain = rows.mean(at(OURS, T), T, tempered=True)
        ours = rows.mean(at(DISTILLED, T), T, tempered=True)
        best = ours or plain
        cells = [f"{v:.2f}" if v else NOT_MEASURED for v in (paper, lowest, plain, ours, full)]
        over = f"{100 * (best / lowest - 1):+.1f} %" if best and lowest else NOT_MEASURED
        behind = f"{100 * (best / full - 1):+.1f} %" if best and full else NOT_MEASURED
        lines.append(f"| {T // L} | {' | '.join(cells)} | {over} | {behind} |")
    return "\n".join(lines)


def _rates(rows: Rows, target: int) -> list[float]:
    """Learning rates that the paper's settings were trained at, for a target."""
    settings = [row["setting"] for row in rows.rows if row["setting"]["target"] == target]
    return sorted({s["learning_rate"] for s in settings})


def cost() -> str:
    """Mistral 7B's shape on a GPU."""
    found = newest("method_cost")
    lines = [
        "| | example | peak GiB | seconds an example | hours for 1,000 x 64 examples' tokens |",
        "|---|---|---:|---:|---:|",
    ]
    for row in found["rows"] if found else []:
        kind = "PoSE" if row["method"] == "pose" else "full length"
        memory = row["memory"][-1]["peak_gib"]
        lines.append(
            f"| {row['mode']}, {kind} to {row['target_length']:,} | {row['train_length']:,} tokens "
            f"| {memory:.1f} | {row['seconds_per_example']:.2f} | {row['hours_same_tokens']:.1f} |"
        )
    return "\n".join(lines) if found else NOT_MEASURED


def tables() -> dict[str, str]:
    rows = Rows()
    made_tables = (bars, methods, factors, texts, chunks, scalings, leads)
    return {one.__name__: one(rows) for one in made_tables} | {"cost": cost()}


def filled(text: str) -> str:
    """The page with every table's block filled anew; a table without a block is an error."""
    for name, new in tables().items():
        block = re.compile(rf"<!-- {name} -->\n((?!<!-- ).*\n)*<!-- end -->")
        text, count = block.subn(f"<!-- {name} -->\n\n{new}\n\n<!-- end -->", text)
        assert count == 1, f"{count} blocks for {name}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = DOCS / "study.md"
    old = page.read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        sys.exit(0 if old == new else f"{page.name} does not show the newest results")
    page.write_text(new, encoding="utf-8")
    from plots import write_plots

    write_plots(Rows(), DOCS / "study")


if __name__ == "__main__":
    main()
