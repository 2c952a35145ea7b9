"""The search of the attention temperature: forward passes only, after training, before export.

Going up from 1, the perplexity of the same target tokens is measured with T and with L tokens of
context. The temperature with the lowest at T is taken among those that cost at most 1 % at L; where
it gains next to nothing it stays 1. Retrieval at T gains more (research/study). The text is of
the training documents: what the report shows is measured on others.

Shapes:  c = the longer context: T, or less where the text is short
"""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipwise.config.machine import is_main_process
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.export.hf import load_for_scoring, require_trained
from skipwise.models.attention.temperature import QueryWeights
from skipwise.models.prepared import PreparedModel
from skipwise.pipeline.search_text import longer_length, num_windows, search_text
from skipwise.training.error_hints import is_out_of_memory
from skipwise.training.inputs import text_changed

GRID = tuple(round(1 + 0.05 * i, 2) for i in range(9))  # 1 to 1.4; far coarser than bf16 rounding
_MOST_COST = 0.01  # rise of the perplexity at L
_LEAST_GAIN = 0.002  # fall of the perplexity at c
_NOT_NOW = "not searched: "  # for a reason that may pass


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Perplexities at one temperature."""

    temperature: float
    near: float  # with L tokens of context
    far: float  # with c tokens


def chosen_temperature(prepared: PreparedModel, run: RunFolder, checkpoint: Path | None) -> float:
    """The temperature to export with: the recipe's number, or the result of a search, made once.

    A search that could not be made is tried again at the next export. Where that changes the
    temperature, what was measured of the exported model is forgotten: it is another model.

    Raises:
        SkipwiseError: training has not reached its end.
    """
    asked = prepared.recipe.attention_temperature
    if asked != "auto":
        if asked != 1:
            run.update(temperature={"value": asked, "detail": "as the recipe says"})
        return asked
    found = run.metadata().get("temperature")
    if found is None or found["detail"].startswith(_NOT_NOW):
        if prepared.recipe.method != "none":
            require_trained(run, checkpoint)
        before, found = found, _search_of_run(prepared, run, checkpoint)
        if before is not None and before["value"] != found["value"] and is_main_process():
            with run.lock():
                run.write_results([row for row in run.results() if row["model"] != "after"])
        run.update(temperature=found)
        print(f"  temperature {found['value']:g}: {found['detail']}", file=sys.stderr, flush=True)
    return found["value"]


def search_temperature(
    model: Any,
    documents: Sequence[np.ndarray],
    original_length: int,
    longer_length: int,
    *,
    batch_tokens: int = 16384,
) -> tuple[float, list[Candidate]]:
    """The temperature with the lowest perplexity at the longer length, and what was tried.

    The model is as it was afterwards.

    Args:
        documents: token ids, of the longer length or more.

    Raises:
        SkipwiseError: the model's weights cannot carry a temperature.
    """
    weights = QueryWeights(model)
    weights.check(GRID[-1])

    def measure(t: float) -> Candidate:
        weights.set(t)
        rows = perplexity(
            model,
            documents,
            (original_length, longer_length),
            num_windows=num_windows(original_length),
            batch_tokens=batch_tokens,
        )
        near, far = (math.inf if row["value"] is None else row["value"] for row in rows)
        return Candidate(temperature=t, near=near, far=far)

    try:
        return hill_climb(measure)
    finally:
        weights.set(1.0)


def hill_climb(measure: Callable[[float], Candidate]) -> tuple[float, list[Candidate]]:
    """Up the grid while the perplexity at c falls and that at L has not risen too far."""
    plain = best = measure(GRID[0])
    tried = [plain]
    for t in GRID[1:]:
        tried.append(measure(t))
        if tried[-1].far >= best.far or tried[-1].near > plain.near * (1 + _MOST_COST):
            break
        best = tried[-1]
    worth = best.far <= plain.far * (1 - _LEAST_GAIN)
    return best.temperature if worth else 1.0, tried


def _search_of_run(
    prepared: PreparedModel, run: RunFolder, checkpoint: Path | None
) -> dict[str, Any]:
    """What run.json says of the search, or why there was none: then it is 1."""
    recipe, L = prepared.recipe, prepared.info.original_length
    lengths, read, digest = search_text(prepared)
    if text_changed(run, digest):  # it may be what the evaluation reads
        return {"value": 1.0, "detail": f"{_NOT_NOW}the text has changed since training"}
    c, chosen = longer_length(lengths, L, recipe.target_length)
    if not c:
        longest = max(lengths, default=0)
        detail = f"too little text to search on, the longest document has {longest:,} tokens"
        return {"value": 1.0, "detail": detail}
    documents = [np.asarray(read(int(i)), np.int64) for i in chosen]
    model = None
    try:
        model = load_for_scoring(prepared, checkpoint)
        try:
            value, tried = search_temperature(
                model, documents, L, c, batch_tokens=recipe.eval.batch_tokens
            )
        except SkipwiseError as refused:  # auto: nothing was promised
            detail = str(refused).partition("\n")[0].removeprefix("attention_temperature: ")
            return {"value": 1.0, "detail": detail}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"value": 1.0, "detail": f"{_NOT_NOW}there is no memory to measure with"}
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return {
        "value": value,
        "detail": _describe(value, tried, L, c, len(documents)),
        "context_lengths": [L, c],
        "num_documents": len(documents),
        "num_windows": num_windows(L),
        "searched": [
            {
                "temperature": one.temperature,
                "perplexity": [x if math.isfinite(x) else None for x in (one.near, one.far)],
            }
            for one in tried
        ],
    }


def _describe(value: float, tried: list[Candidate], L: int, c: int, num_documents: int) -> str:
    """The perplexities at 1 and at what was chosen; where nothing was, at what came nearest."""
    rows = {one.temperature: one for one in tried}
    plain, shown = tried[0], rows[value] if value != 1 else tried[1]
    instead = "" if value != 1 else f" with {shown.temperature:g}, which does not pay"
    return (
        f"perplexity {plain.far:.4g} -> {shown.far:.4g} at {c:,} tokens, "
        f"{plain.near:.4g} -> {shown.near:.4g} at {L:,}{instead} "
        f"({num_documents} documents that the evaluation does not use)"
    )
