"""The figures in words, for those who hear the page; and how the page writes quantities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from skipwise.report.tables import Rows, finite, number, percent, pooled


def say_perplexity(rows: Rows) -> str:
    """Every value, by model and length."""
    said = []
    for model in ("before", "after"):
        points = [r for r in finite(rows) if (r["model"], r["task"]) == (model, "perplexity")]
        values = ", ".join(
            f"{number(r['value']) if r['value'] is not None else 'beyond measure'} "
            f"at {r['context_length']:,}"
            for r in sorted(points, key=lambda r: r["context_length"])
        )
        if values:
            said.append(f"{model}: {values}")
    return f"Perplexity by tokens of context. {'; '.join(said)}."


def say_passkey(rows: Rows) -> str:
    """The share over all depths by model and length, and the weakest depth of each."""
    trials = [r for r in finite(rows) if r["task"] == "passkey" and r["value"] is not None]
    said = []
    for row in pooled(trials):
        at = (row["model"], row["context_length"])
        depths = [
            r
            for r in trials
            if (r["model"], r["context_length"]) == at and r.get("depth") is not None
        ]
        text = f"{row['model']} at {row['context_length']:,}: {percent(row['value'])} %"
        weakest = min(depths, key=lambda r: r["value"], default=None)
        if weakest and weakest["value"] < row["value"]:
            text += f" ({percent(weakest['value'])} % at {percent(weakest['depth'])} % depth)"
        said.append(text)
    return f"Passkey retrieval over all depths. {'; '.join(said)}."


def say_loss(metrics: list[dict[str, Any]]) -> str:
    losses = [m["loss"] for m in metrics if m.get("loss") is not None]
    if not losses:
        return "Training loss."
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    return (
        f"Training loss over {len(losses):,} logged steps: {first:.3f} on average over the first "
        f"tenth, {last:.3f} over the last."
    )


def say_positions(
    examples: Sequence[dict[str, Any]], coverage: Sequence[tuple[int, float]], L: int, T: int
) -> str:
    """How far the examples reach and how often near, middle and far distances are shown."""
    ends = [e["position_starts"][-1] + e["lengths"][-1] for e in examples if e["lengths"]]
    said = f"{len(examples)} training examples of {L:,} tokens as chunks on positions 0 to {T:,}"
    if ends:
        said += f", the furthest reaching position {max(ends):,}"
    shares = ", ".join(
        f"{distance:,} by {share:.1%}" for distance, share in milestones(coverage, L, T)
    )
    return f"{said}. Share of examples that show a relative distance: {shares}."


def milestones(coverage: Sequence[tuple[int, float]], L: int, T: int) -> list[tuple[int, float]]:
    """The points of the coverage nearest to half the training length, half the target, its end."""
    wanted = (L // 2, T // 2, T)
    return (
        [min(coverage, key=lambda point: abs(point[0] - at)) for at in wanted] if coverage else []
    )


def length_names(lengths: Sequence[int]) -> list[str]:
    """`256`, `2,048`; all in k where the longest is 8k or more and all are whole k."""
    if max(lengths) >= 8192 and all(n % 1024 == 0 for n in lengths):
        return [f"{n // 1024}k" for n in lengths]
    return [f"{n:,}" for n in lengths]


def duration(seconds: float) -> str:
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes / 60:.1f} h"


def short_count(count: float) -> str:
    """`126 M`, `8.06 G`: three figures and the SI prefix."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= size:
            digits = 2 if count < 10 * size else 1 if count < 100 * size else 0
            return f"{count / size:,.{digits}f} {unit}"
    return f"{count:,.0f}"
