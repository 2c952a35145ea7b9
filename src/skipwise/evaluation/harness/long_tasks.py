"""Tasks of lm-evaluation-harness that come in several context lengths: its RULER and BABILong.

The harness takes the length from metadata, 4,096 or 0k without it, and cuts longer prompts at the
window of the config, in silence. Here each context length is measured by itself, with prompts of
that length and a window that holds them, so that rows stand beside those of other tasks.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from skipwise.errors import SkipwiseError
from skipwise.report.rows import Row, Rows

RULER = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2"),
    *("niah_multikey_3", "niah_multiquery", "niah_multivalue", "ruler_vt", "ruler_cwe"),
    *("ruler_fwe", "ruler_qa_squad", "ruler_qa_hotpot"),
)
BABILONG = tuple(f"babilong_qa{i}" for i in range(1, 6))  # the other 15 have no long version
_BABILONG_LENGTHS = tuple(1024 * 2**i for i in range(8))  # to 128k, as its data set has them
ROOM = 256  # tokens that RULER does not count in: the start of the answer, special tokens


def has_lengths(name: str) -> bool:
    return name in ("ruler", "babilong_longctx", *RULER, *BABILONG)


def fits(name: str, length: int) -> bool:
    """Whether the harness has prompts of this length, in tokens."""
    return name == "ruler" or name in RULER or length in _BABILONG_LENGTHS


def check_requirements(name: str) -> None:
    """Raise if a package is missing that only these tasks need, before the model is loaded."""
    needed = ("wonderwords", "nltk") if name == "ruler" or name in RULER else ()
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise SkipwiseError(
            f"{name} of lm-eval needs {' and '.join(missing)}: pip install 'lm_eval[ruler]'"
        )


def metadata(name: str, length: int, tokenizer_folder: str) -> dict[str, Any]:
    """What the harness's functions for these data sets read."""
    if name == "ruler" or name in RULER:
        return {"max_seq_lengths": [length], "tokenizer": tokenizer_folder}
    return {"max_seq_lengths": f"{length // 1024}k"}


def rows_at(length: int, rows: Rows, name: str) -> Rows:
    """The rows of one context length; for `ruler` also the mean over its tasks, the first row.

    RULER's metrics are named by length, and those of other lengths are -1.
    """
    if not (name == "ruler" or name in RULER):
        return [_at(length, row, row["metric"]) for row in rows]
    found = [_at(length, row, "string_match") for row in rows if row["metric"] == str(length)]
    parts = [{**row, "part_of": "ruler"} for row in found]  # the area counts their mean alone
    return [_mean(found), *parts] if name == "ruler" and found else found


def _at(length: int, row: Row, metric: str) -> Row:
    left_out = ("kind", "num_fewshot", "stderr")
    kept = {key: value for key, value in row.items() if key not in left_out}
    if row["low"] is not None:
        kept |= {"low": max(0.0, row["low"]), "high": min(1.0, row["high"])}
    return {**kept, "metric": metric, "context_length": length, "is_share": True}


def _mean(rows: Sequence[Row]) -> Row:
    """RULER's score: each task counts the same. Its interval is known if theirs are."""
    count = len(rows)
    value = sum(row["value"] for row in rows) / count
    halves = [(row["high"] - row["low"]) / 2 for row in rows if row["high"] is not None]
    half = math.sqrt(sum(h * h for h in halves)) / count if len(halves) == count else None
    low, high = (None, None) if half is None else (max(0.0, value - half), min(1.0, value + half))
    samples = sum(row["num_samples"] for row in rows)
    return {**rows[0], "task": "ruler", "value": value, "low": low, "high": high} | {
        "num_samples": samples
    }
