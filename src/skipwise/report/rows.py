"""Tidy rows, the format of all results: how to select, pool and order them.

Rows:    {"model", "task", "metric", "context_length", ["depth"], "value", "low", "high",
         "num_samples"}; a value that is null or not finite was measured, but cannot be shown.
         "samples" are the scores of its trials, in the order that is the same for every model; of
         perplexity the losses of its windows. "documents" is the document of each window, or the
         haystack of each trial where trials share one; "targets" a digest of the tokens that were
         predicted, "asked" one of the settings that decide a task's questions.
         A benchmark's row has "kind": "benchmark", no context length, "num_fewshot", "stderr".
         A row may say how it is shown: "title", "about", "higher_is_better", "is_share".
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from skipwise.report.intervals import mean_interval, wilson

Row = dict[str, Any]
Rows = list[Row]

# Skipwise's versions of RULER tasks (arXiv 2404.06654); the original suite has 13
RULER_TASKS = (
    "niah_single_words",
    "niah_single_numbers",
    "niah_single_uuids",
    "niah_multikey",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
)
RULER_AVERAGE = "ruler average"
# The base; the base with the chosen scaling and its best attention temperature; the exported model
RUN_MODELS = ("before", "untrained", "after")
_ORDER = ("perplexity", "passkey", "needle", *RULER_TASKS)


def finite(rows: Iterable[Row]) -> Rows:
    """The rows with None in place of NaN and infinity, which JSON may hold."""
    out = []
    for row in rows:
        numbers = {key: row.get(key) for key in ("value", "low", "high")}
        known = {k: v if v is not None and math.isfinite(v) else None for k, v in numbers.items()}
        out.append({**row, **known, "num_samples": row.get("num_samples") or 0})
    return out


def is_benchmark(row: Row) -> bool:
    return row.get("kind") == "benchmark" or row.get("context_length") is None


def is_ruler(row: Row) -> bool:
    return not is_benchmark(row) and (row.get("group") == "ruler" or row["task"] in RULER_TASKS)


def by_context(rows: Rows) -> Rows:
    """The rows measured at a context length, which is all but the benchmarks."""
    return [row for row in rows if not is_benchmark(row)]


def task_rows(rows: Rows, task: str, metric: str | None = None) -> Rows:
    """The rows of a task at context lengths; for perplexity, not those in bits per byte."""
    metric = metric or ("perplexity" if task == "perplexity" else None)
    kept = (r for r in by_context(rows) if r["task"] == task and metric in (None, r["metric"]))
    return finite(kept)


def other_tasks(rows: Rows) -> list[str]:
    """The tasks at context lengths that the page has no section for by name."""
    kept = (row["task"] for row in by_context(rows) if not is_ruler(row))
    return sorted({task for task in kept if task not in _ORDER})


def models_of(rows: Rows) -> list[str]:
    """The models of the rows: those of a run first, the others in order of appearance."""
    names = dict.fromkeys(row["model"] for row in rows)
    return sorted(names, key=lambda name: RUN_MODELS.index(name) if name in RUN_MODELS else 3)


def heading(model: str) -> str:
    """The model's name as a heading: `Before`, `Before (a)`, and other names as they are."""
    return model[:1].upper() + model[1:] if model.partition(" ")[0] in RUN_MODELS else model


def pooled(rows: Rows) -> Rows:
    """One row for each model, task and length; scores at several depths are pooled.

    The pooled share is weighted by samples. Its interval is Wilson's of the pooled counts, or where
    trials share haystacks that of `mean_interval`.
    """
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in finite(by_context(rows)):
        key = (row["model"], row["task"], row["metric"], row["context_length"])
        groups.setdefault(key, []).append(row)
    out = []
    for group in groups.values():
        row = dict(group[0])
        if row.pop("depth", None) is not None:
            counted = [r for r in group if r["value"] is not None and r["num_samples"]]
            count = sum(r["num_samples"] for r in counted)
            hits = round(sum(r["value"] * r["num_samples"] for r in counted))
            low, high = wilson(hits, count) if count else (None, None)
            value = hits / count if count else None
            by_depth = sorted(group, key=lambda r: r["depth"])
            for key in ("samples", "documents"):
                row[key] = [one for r in by_depth for one in r.get(key) or ()]
                if not all(r.get(key) for r in group):
                    del row[key]
            if row.get("documents"):
                value, low, high = mean_interval(row["samples"], row["documents"])
            row.update(value=value, low=low, high=high, num_samples=count)
        out.append(row)
    return out


def find(rows: Rows, model: str, task: str, length: int) -> Row | None:
    """The pooled row of a model, task and length, if measured; its value may be None."""
    for row in pooled(task_rows(rows, task)):
        if (row["model"], row["context_length"]) == (model, length):
            return row
    return None


def describe_mixed_texts(rows: Rows) -> str:
    """A warning that names the tasks measured on different texts, or with different questions."""
    said = []
    for key, what in (("text", "on the same text"), ("asked", "with the same questions")):
        found: dict[tuple[str, Any], set[str]] = {}
        for row in (row for row in rows if row.get(key)):
            place = row["task"], row.get("context_length") if key == "asked" else 0
            found.setdefault(place, set()).add(row[key])
        mixed = sorted({task for (task, _), digests in found.items() if len(digests) > 1})
        said += [f"Not {what} everywhere: {', '.join(mixed)}."] if mixed else []
    return " ".join(said)


def describe_key_tokens(rows: Rows) -> str:
    """What LongPPL and the gain are measured with; empty where they are not in the rows."""
    found = [row for row in rows if row["metric"] == "long_ppl" and row.get("evaluator_contexts")]
    if not found:
        return ""
    if len({row.get("key_tokens") for row in found}) > 1:
        return "LongPPL and gain are not of the same key tokens everywhere, and do not compare."
    short, long = found[0]["evaluator_contexts"]
    return (
        f"LongPPL: perplexity on {found[0]['num_samples']:,} key tokens, which "
        f"{found[0]['evaluator']} predicts far better with {long:,} than with {short:,} tokens of "
        "context. Gain: 0 is its loss on all tokens with the shorter context, 1 with the longer."
    )


def line_order(line: tuple[str, str, int]) -> tuple[Any, ...]:
    """Sort key: perplexity, bits per byte, passkey, needle, RULER, other tasks, RULER average."""
    task, metric, length = line
    rank = _ORDER.index(task) if task in _ORDER else len(_ORDER)
    return task == RULER_AVERAGE, rank, task, metric != "perplexity", metric, length
