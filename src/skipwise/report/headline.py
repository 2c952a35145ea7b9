"""The sentence at the top of the page: what was reached, and in the same breath what was not.

`headline` is of a run, `evaluation_headline` of models that were measured without one.

An extension from L to T "reads" T tokens when nothing of this holds:
  passkey     below 90 % at T or at a length between, below 50 % at one depth of T, lower at L than
              before by more than 5 points
  perplexity  beyond measure at T, higher with T tokens of context than with L, higher than the
              base model's with L, or risen by more than 5 % at L
  benchmarks  one got worse beyond the error of the difference
  checks      one has failed
It "did not work" when the passkey is found in less than half the trials at T, or the perplexity at
T is beyond measure or more than 1.5 times that at L. What was not measured is said as well.
"""

from __future__ import annotations

from typing import Any

from skipwise.report.benchmarks import fallen
from skipwise.report.format import listed, number, percent, short_value
from skipwise.report.rows import (
    Row,
    Rows,
    by_context,
    find,
    is_benchmark,
    models_of,
    of,
    other_tasks,
    pooled,
)
from skipwise.report.ruler import describe_tasks, summarise_ruler

PASSKEY_ENOUGH, PASSKEY_HALF, DEPTH_ENOUGH = 0.9, 0.5, 0.5
PERPLEXITY_RISE, PERPLEXITY_BROKEN = 1.05, 1.5
_MOST_NAMED = 4  # models whose figures stand in the sentence


def headline(run: dict[str, Any], rows: Rows) -> str:
    """What came of the run in one or two sentences, computed from the rows."""
    L, T = run.get("original_length"), run.get("target_length")
    name = (run.get("model") or {}).get("name", "The model")
    if not rows or not L or not T:
        return f"{name} is not measured yet."
    said, short, broken = _passkey(rows, L, T)
    more_said, more_short, more_broken = _perplexity(rows, L, T)
    said, short, broken = said + more_said, short + more_short, broken or more_broken
    said += _harder(rows, T)
    if worse := fallen(rows, "before", "after"):
        short.append(f"worse beyond error on short contexts: {listed(worse)}")
    failed = [c.get("name", "?") for c in run.get("checks") or [] if not c.get("passed")]
    short += [f"the check “{check}” failed" for check in failed]
    if not any(find(rows, "after", task, T) for task in ("passkey", "perplexity")):
        out = f"{name} was set up for {T:,} tokens instead of {L:,}; it was not measured at {T:,}"
        return f"{out}, and {'; '.join(short)}." if short else f"{out}."
    if broken:
        return (
            f"Extending {name} from {L:,} to {T:,} tokens did not work: {'; '.join(short)}. "
            f"Measured: {'; '.join(said)}."
        )
    if short:
        return (
            f"{name} was extended from {L:,} to {T:,} tokens but falls short: {'; '.join(short)}. "
            f"Measured: {'; '.join(said)}."
        )
    if not find(rows, "after", "passkey", T):
        return f"{name} was extended from {L:,} to {T:,} tokens: {'; '.join(said)}."
    return f"{name} now reads {T:,} tokens instead of {L:,}: {'; '.join(said)}."


def evaluation_headline(run: dict[str, Any], rows: Rows) -> str:
    """What was measured for which model; no claim that anything was extended."""
    models = models_of(rows)
    if not models:
        return f"{run.get('name') or 'The evaluation'} is not measured yet."
    lengths = sorted({row["context_length"] for row in by_context(rows)})
    if not lengths:
        scope = "measured on benchmarks of short contexts"
    elif len(lengths) == 1:
        scope = f"measured at {lengths[0]:,} tokens"
    else:
        scope = f"measured from {lengths[0]:,} to {lengths[-1]:,} tokens"
    if len(models) > _MOST_NAMED:
        return f"{len(models)} models, {scope}."
    many = len(models) > 2
    said = []
    for model in models:
        found = _measured([row for row in rows if row["model"] == model], model, brief=many)
        if model != models[0] and (worse := fallen(rows, models[0], model)):
            found.append(f"worse than {models[0]} beyond error on {listed(worse)}")
        if found:
            said.append((f"{model}: " if len(models) > 1 else "") + "; ".join(found))
    named = f"{len(models)} models" if many else listed(models)
    return f"{named}, {scope}: {'. '.join(said)}." if said else f"{named}, {scope}."


def _measured(rows: Rows, model: str, brief: bool) -> list[str]:
    """Effective length, passkeys and needles at the longest length, perplexity by length."""
    said = [
        f"effective length {summary.effective}"
        + ("" if brief else f" (RULER, {describe_tasks([summary])})")
        for summary in summarise_ruler(rows)
        if summary.averages
    ]
    for task in ("passkey", "needle", *other_tasks(rows)):
        length = max((row["context_length"] for row in of(rows, task)), default=0)
        row = find(rows, model, task, length)
        if row and row["value"] is not None:
            said.append(_score(row, brief=brief))
    points = sorted(of(rows, "perplexity"), key=lambda row: row["context_length"])
    if brief or len(points) > 4:  # the longest, or the ends
        points = points[-1:] if brief else [points[0], points[-1]]
    values = [
        f"{'beyond measure' if p['value'] is None else number(p['value'])} at "
        f"{p['context_length']:,}"
        for p in points
    ]
    if values:
        said.append(f"perplexity {', '.join(values)}")
    if not said and (num := len({row["task"] for row in rows if is_benchmark(row)})):
        said.append(f"{num} {'benchmark' if num == 1 else 'benchmarks'}")
    return said


def _score(row: Row, before: Row | None = None, brief: bool = False) -> str:
    """`needle found in 98 % of 100 trials at 4,096 (50 % before)`, `NAME 3.20 at 4,096`."""
    found = "found in " if row["task"] in ("passkey", "needle") else ""
    trials = "" if brief or not found else f" of {row['num_samples']:,} trials"
    was = f" ({short_value(before)} before)" if before and before["value"] is not None else ""
    return f"{row['task']} {found}{short_value(row)}{trials} at {row['context_length']:,}{was}"


def _passkey(rows: Rows, L: int, T: int) -> tuple[list[str], list[str], bool]:
    """What was found, where it falls short, whether it is broken."""
    after = find(rows, "after", "passkey", T)
    if not after or after["value"] is None:
        return [f"passkey not measured at {T:,}"], [], False
    before = find(rows, "before", "passkey", T)
    said = [_score(after, before)]
    short = []
    low = [
        r
        for r in pooled(of(rows, "passkey"))
        if r["model"] == "after"
        and L < r["context_length"] <= T
        and r["value"] is not None
        and r["value"] < PASSKEY_ENOUGH
    ]
    if low:
        lengths = ", ".join(f"{n:,}" for n in sorted(r["context_length"] for r in low))
        worst = min(r["value"] for r in low)
        short.append(
            f"passkey below {100 * PASSKEY_ENOUGH:.0f} % at {lengths} (lowest {percent(worst)} %)"
        )
    depths = [
        r
        for r in of(rows, "passkey")
        if (r["model"], r["context_length"]) == ("after", T)
        and r.get("depth") is not None
        and r["value"] is not None
    ]
    weakest = min(depths, key=lambda r: r["value"], default=None)
    if weakest and weakest["value"] < DEPTH_ENOUGH and after["value"] >= PASSKEY_ENOUGH:
        short.append(
            f"at {percent(weakest['depth'])} % of the depth of {T:,} tokens the passkey is found "
            f"in {percent(weakest['value'])} % of trials"
        )
    near, base = find(rows, "after", "passkey", L), find(rows, "before", "passkey", L)
    values = [row["value"] for row in (near, base) if row and row["value"] is not None]
    if L < T and len(values) == 2 and values[0] < values[1] - 0.05:
        short.append(
            f"at the original {L:,} tokens the passkey is found in {percent(values[0])} % of "
            f"trials ({percent(values[1])} % before)"
        )
    return said, short, after["value"] < PASSKEY_HALF


def _harder(rows: Rows, T: int) -> list[str]:
    """Needles at T and RULER's effective length, before and after; told, not judged."""
    said = []
    for task in ("needle", *other_tasks(rows)):
        after, before = (find(rows, model, task, T) for model in ("after", "before"))
        if after and after["value"] is not None:
            said.append(_score(after, before))
    known = {s.model: s for s in summarise_ruler(rows) if s.averages}
    if "after" in known:
        before_too = f", {known['before'].effective} before" if "before" in known else ""
        tasks = describe_tasks([known["after"]])
        said.append(f"effective length {known['after'].effective}{before_too} (RULER, {tasks})")
    return said


def _perplexity(rows: Rows, L: int, T: int) -> tuple[list[str], list[str], bool]:
    far, near = find(rows, "after", "perplexity", T), find(rows, "after", "perplexity", L)
    base = find(rows, "before", "perplexity", L)
    if not far:
        said, short = [f"perplexity not measured at {T:,}"], []
        _rise(short, near, base, L)
        return said, short, False
    if far["value"] is None:
        said = [f"perplexity beyond measure with {T:,} tokens of context"]
        return said, [f"perplexity is beyond measure with {T:,} tokens of context"], True
    known = [
        f"{number(row['value'])} {words}"
        for row, words in ((near, f"with {L:,}"), (base, f"before extension with {L:,}"))
        if row and row["value"] is not None
    ]
    said = [
        f"perplexity on the same target tokens {number(far['value'])} with {T:,} tokens of context"
        + "".join(f", {one}" for one in known)
    ]
    short = []
    broken = False
    if near and near["value"] is not None and far["value"] > near["value"]:
        broken = far["value"] > PERPLEXITY_BROKEN * near["value"]
        short.append(f"perplexity is higher with {T:,} tokens of context than with {L:,}")
    elif base and base["value"] is not None and far["value"] > base["value"]:
        broken = far["value"] > PERPLEXITY_BROKEN * base["value"]
        short.append(
            f"perplexity with {T:,} tokens of context is higher than the base model's with {L:,}"
        )
    _rise(short, near, base, L)
    return said, short, broken


def _rise(
    short: list[str], near: dict[str, Any] | None, base: dict[str, Any] | None, L: int
) -> None:
    if near and near["value"] is None:
        short.append(f"perplexity is beyond measure at the original {L:,} tokens")
    elif near and base and base["value"] and near["value"] > PERPLEXITY_RISE * base["value"]:
        rise = near["value"] / base["value"] - 1
        short.append(f"perplexity at the original {L:,} tokens has risen by {rise:.0%}")
