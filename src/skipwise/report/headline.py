"""The sentence at the top of the page: what the run reached and where it falls short.

`headline` is for a run, `evaluation_headline` for models that were measured without one.

An extension from L to T "reads" T tokens when none of these holds:
  passkey     below 90 % at T or at a length between L and T, or below what the base finds at L
              where that is less; below 50 % at one depth at T; at L, more than 5 points lower than
              before. Not judged where the base finds less than half of them inside its own window
  perplexity  not finite at T; higher with T tokens of context than with L; higher than the base
              model's with L; or risen by more than 5 % at L
  benchmarks  one got worse by more than the error of the difference
  training    nothing got better, beyond error, than in the base rescaled without training, or
              something got worse
  checks      one failed
It "did not work" when the passkey is found in less than half the trials at T, or the perplexity at
T is not finite or more than 1.5 times that at L. The sentence also names what was not measured.
"""

from __future__ import annotations

from typing import Any

from skipwise.report.area import find_areas, main_areas
from skipwise.report.benchmarks import worse_benchmarks
from skipwise.report.differences import describe_training
from skipwise.report.format import listed, number, percent, short_value
from skipwise.report.rows import (
    Row,
    Rows,
    by_context,
    find,
    is_benchmark,
    models_of,
    other_tasks,
    pooled,
    task_rows,
)
from skipwise.report.ruler import describe_tasks, summarise_ruler

PASSKEY_ENOUGH, PASSKEY_HALF, DEPTH_ENOUGH = 0.9, 0.5, 0.5
PERPLEXITY_RISE, PERPLEXITY_BROKEN = 1.05, 1.5
_MOST_NAMED = 4  # models whose scores the sentence gives


def headline(run: dict[str, Any], rows: Rows) -> str:
    """The result of a run in one or two sentences, computed from the rows."""
    L, T = run.get("original_length"), run.get("target_length")
    name = (run.get("model") or {}).get("name", "The model")
    if not rows or not L or not T:
        return f"{name} is not measured yet."
    judged = _passkey(rows, L, T), _perplexity(rows, L, T)
    results = [text for found, _, _ in judged for text in found] + _other_scores(rows, T)
    results += _areas(rows, (L, T), ("before", "untrained"))
    shortfalls = [text for _, found, _ in judged for text in found]
    broken = any(failed for _, _, failed in judged)
    if worse := worse_benchmarks(rows, "before", "after"):
        shortfalls.append(f"worse beyond error on short contexts: {listed(worse)}")
    added, anything, harm = describe_training(rows, T)
    if added and not anything:
        shortfalls.append(added[0].lower() + added[1:])
    shortfalls += [harm] if harm else []
    failed = [c.get("name", "?") for c in run.get("checks") or [] if not c.get("passed")]
    shortfalls += [f"the check “{check}” failed" for check in failed]
    tasks = ("passkey", "perplexity", *other_tasks(rows))
    if not any(find(rows, "after", task, T) for task in tasks):
        what = "the trained model" if run.get("training") else "it"
        out = (
            f"{name} was set up for {T:,} tokens instead of {L:,}; {what} was not measured at {T:,}"
        )
        return f"{out}, and {'; '.join(shortfalls)}." if shortfalls else f"{out}."
    extended = f"{name} was extended from {L:,} to {T:,} tokens"
    measured, short = "; ".join(results), "; ".join(shortfalls)
    measured += f". {added}" if added and anything else ""
    if broken:
        failure = f"Extending {name} from {L:,} to {T:,} tokens did not work"
        return f"{failure}: {short}. Measured: {measured}."
    if shortfalls:
        return f"{extended} but falls short: {short}. Measured: {measured}."
    if not find(rows, "after", "passkey", T):
        return f"{extended}: {measured}."
    return f"{name} now reads {T:,} tokens instead of {L:,}: {measured}."


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
    results = []
    for model in models:
        found = _measured([row for row in rows if row["model"] == model], model, brief=many)
        if model != models[0] and (worse := worse_benchmarks(rows, models[0], model)):
            found.append(f"worse than {models[0]} beyond error on {listed(worse)}")
        if found:
            results.append((f"{model}: " if len(models) > 1 else "") + "; ".join(found))
    named = f"{len(models)} models" if many else listed(models)
    return f"{named}, {scope}: {'. '.join(results)}." if results else f"{named}, {scope}."


def _measured(rows: Rows, model: str, brief: bool) -> list[str]:
    """Effective length, passkeys and needles at the longest length, perplexity by length."""
    results = [
        f"effective length {summary.effective}"
        + ("" if brief else f" (RULER, {describe_tasks([summary])})")
        for summary in summarise_ruler(rows)
        if summary.averages
    ]
    for task in ("passkey", "needle", *other_tasks(rows)):
        length = max((row["context_length"] for row in task_rows(rows, task)), default=0)
        row = find(rows, model, task, length)
        if row and row["value"] is not None:
            results.append(_score(row, brief=brief))
    results += [] if brief else _areas(rows, None)
    points = sorted(task_rows(rows, "perplexity"), key=lambda row: row["context_length"])
    if brief or len(points) > 4:  # the longest, or the ends
        points = points[-1:] if brief else [points[0], points[-1]]
    values = [
        f"{'beyond measure' if p['value'] is None else number(p['value'])} at "
        f"{p['context_length']:,}"
        for p in points
    ]
    if values:
        results.append(f"perplexity {', '.join(values)}")
    if not results and (num := len({row["task"] for row in rows if is_benchmark(row)})):
        results.append(f"{num} {'benchmark' if num == 1 else 'benchmarks'}")
    return results


def _score(
    row: Row, before: Row | None = None, untrained: Row | None = None, brief: bool = False
) -> str:
    """`needle found in 98 % of 100 trials at 4,096 (0 % before, 38 % untrained)`."""
    found = "found in " if row["task"] in ("passkey", "needle") else ""
    trials = "" if brief or not found else f" of {row['num_samples']:,} trials"
    others = (before, "before"), (untrained, "untrained")
    known = [f"{short_value(r)} {word}" for r, word in others if r and r["value"] is not None]
    was = f" ({', '.join(known)})" if known else ""
    return f"{row['task']} {found}{short_value(row)}{trials} at {row['context_length']:,}{was}"


def _areas(rows: Rows, ends: tuple[int, int] | None, others: tuple[str, ...] = ()) -> list[str]:
    """`area 98 % from 256 to 2,048 (14 % before, 78 % untrained)` of the tasks, not perplexity.

    Args:
        others: models to name beside `after`. Without any, the rows are of one model.
    """
    results = []
    for area in main_areas(find_areas(rows, ends)[0]):
        model = "after" if others else rows[0]["model"]
        row = area.row(model)
        if row is None or area.metric != "area":
            continue
        found = [(other, area.row(other)) for other in others]
        known = [f"{short_value(cell)} {other}" for other, cell in found if cell]
        was = f" ({', '.join(known)})" if known else ""
        results.append(f"area of {area.name} {short_value(row)} over {area.span} tokens{was}")
    return results


def _passkey(rows: Rows, L: int, T: int) -> tuple[list[str], list[str], bool]:
    """Results, shortfalls, and whether the extension did not work."""
    after = find(rows, "after", "passkey", T)
    if not after or after["value"] is None:
        return [f"passkey not measured at {T:,}"], [], False
    before, untrained = (find(rows, m, "passkey", T) for m in ("before", "untrained"))
    results = [_score(after, before, untrained)]
    shortfalls = []
    near, base = find(rows, "after", "passkey", L), find(rows, "before", "passkey", L)
    ability = base["value"] if base and base["value"] is not None else 1.0
    if ability < PASSKEY_HALF:
        results.append(
            f"the base finds {percent(ability)} % of the passkeys inside its own window of {L:,} "
            "tokens, so they do not judge the extension"
        )
        return results, shortfalls, False
    enough = PASSKEY_ENOUGH if ability >= PASSKEY_ENOUGH else ability - 0.05
    own = [r for r in task_rows(rows, "passkey") if r["model"] == "after"]
    beyond = [r for r in pooled(own) if L < r["context_length"] <= T and r["value"] is not None]
    if low := [r for r in beyond if r["value"] < enough]:
        lengths = ", ".join(f"{n:,}" for n in sorted(r["context_length"] for r in low))
        worst = min(r["value"] for r in low)
        shortfalls.append(
            f"passkey below {100 * enough:.0f} % at {lengths} (lowest {percent(worst)} %)"
        )
    at_depths = [r for r in own if r["context_length"] == T and r.get("depth") is not None]
    depths = [r for r in at_depths if r["value"] is not None]
    weakest = min(depths, key=lambda r: r["value"], default=None)
    if weakest and weakest["value"] < DEPTH_ENOUGH and after["value"] >= PASSKEY_ENOUGH:
        shortfalls.append(
            f"at {percent(weakest['depth'])} % of the depth of {T:,} tokens the passkey is found "
            f"in {percent(weakest['value'])} % of trials"
        )
    values = [row["value"] for row in (near, base) if row and row["value"] is not None]
    if L < T and len(values) == 2 and values[0] < values[1] - 0.05:
        shortfalls.append(
            f"at the original {L:,} tokens the passkey is found in {percent(values[0])} % of "
            f"trials ({percent(values[1])} % before)"
        )
    return results, shortfalls, after["value"] < PASSKEY_HALF


def _other_scores(rows: Rows, T: int) -> list[str]:
    """Scores at T and RULER's effective length, before and after. They are not judged."""
    results = []
    for task in ("needle", *other_tasks(rows)):
        after, before, untrained = (
            find(rows, model, task, T) for model in ("after", "before", "untrained")
        )
        if after and after["value"] is not None:
            results.append(_score(after, before, untrained))
    known = {s.model: s for s in summarise_ruler(rows) if s.averages}
    if "after" in known:
        before_too = f", {known['before'].effective} before" if "before" in known else ""
        tasks = describe_tasks([known["after"]])
        results.append(f"effective length {known['after'].effective}{before_too} (RULER, {tasks})")
    return results


def _perplexity(rows: Rows, L: int, T: int) -> tuple[list[str], list[str], bool]:
    far, near = find(rows, "after", "perplexity", T), find(rows, "after", "perplexity", L)
    base, untrained = (
        find(rows, "before", "perplexity", L),
        find(rows, "untrained", "perplexity", T),
    )
    if not far:
        results, shortfalls = [f"perplexity not measured at {T:,}"], []
        _check_original_length(shortfalls, near, base, L)
        return results, shortfalls, False
    if far["value"] is None:
        results = [f"perplexity beyond measure with {T:,} tokens of context"]
        return results, [f"perplexity is beyond measure with {T:,} tokens of context"], True
    known = [
        f"{number(row['value'])} {words}"
        for row, words in (
            (untrained, "untrained"),
            (near, f"with {L:,}"),
            (base, f"before extension with {L:,}"),
        )
        if row and row["value"] is not None
    ]
    results = [
        f"perplexity on the same target tokens {number(far['value'])} with {T:,} tokens of context"
        + "".join(f", {one}" for one in known)
    ]
    shortfalls = []
    broken = False
    if near and near["value"] is not None and far["value"] > near["value"]:
        broken = far["value"] > PERPLEXITY_BROKEN * near["value"]
        shortfalls.append(f"perplexity is higher with {T:,} tokens of context than with {L:,}")
    elif base and base["value"] is not None and far["value"] > base["value"]:
        broken = far["value"] > PERPLEXITY_BROKEN * base["value"]
        shortfalls.append(
            f"perplexity with {T:,} tokens of context is higher than the base model's with {L:,}"
        )
    _check_original_length(shortfalls, near, base, L)
    return results, shortfalls, broken


def _check_original_length(
    shortfalls: list[str], near: dict[str, Any] | None, base: dict[str, Any] | None, L: int
) -> None:
    if near and near["value"] is None:
        shortfalls.append(f"perplexity is beyond measure at the original {L:,} tokens")
    elif near and base and base["value"] and near["value"] > PERPLEXITY_RISE * base["value"]:
        rise = near["value"] / base["value"] - 1
        shortfalls.append(f"perplexity at the original {L:,} tokens has risen by {rise:.0%}")
