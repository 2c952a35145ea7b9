"""`attention_temperature: auto`: search the temperature after training, before the export.

Forward passes only. The perplexity of the same target tokens is measured with c and with L tokens
of context. The best temperature has the lowest perplexity at c among those that raise the
perplexity at L by at most 1 %, found by golden section. It stays 1 where it gains less than
0.2 %. Retrieval at T gains more than perplexity does (see the study). The text comes from training
documents; the report measures on other documents.

Shapes:  c = the longer context: T, or less where the documents are short
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.config.machine import is_main_process
from skipwise.config.progress import Progress
from skipwise.config.run_folder import RunFolder
from skipwise.errors import Check, SkipwiseError
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.export.hf import load_for_scoring, require_trained
from skipwise.models.attention.temperature import QueryWeights, check_foldable
from skipwise.models.load import free_memory
from skipwise.models.prepared import PreparedModel
from skipwise.pipeline.choose_separator import with_chosen_separator
from skipwise.pipeline.search import (
    TOO_MUCH,
    fit_search,
    longer_length,
    num_windows,
    search_text,
)
from skipwise.training.checkpoints import add_decision, known_decisions, trained_checkpoint
from skipwise.training.error_hints import is_out_of_memory
from skipwise.training.inputs import TrainingData, text_changed

GRID = tuple(round(1 + 0.05 * i, 2) for i in range(9))  # 1 to 1.4, far coarser than bf16 rounding
_MOST_COST = 0.01  # rise of the perplexity at L
_LEAST_GAIN = 0.002  # fall of the perplexity at c
_MOST_MEASURED = 6  # of the grid, by golden section
_GOLDEN = 0.382  # golden section: share of the larger side that a step goes
_NOT_NOW = "not searched: "  # prefix of reasons that may be temporary


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Perplexities at one temperature."""

    temperature: float
    near: float  # with L tokens of context
    far: float  # with c tokens


def chosen_temperature(
    prepared: PreparedModel,
    run: RunFolder,
    checkpoint: Path | None,
    data: TrainingData | None = None,
) -> float:
    """The temperature of the exported model: the recipe's number, or the result of one search.

    A search that failed is repeated at the next export. If the temperature changes then, results
    of the exported model are deleted, because it is another model.

    Args:
        data: training data that are loaded already.

    Raises:
        SkipwiseError: training has not reached its last step.
    """
    asked = prepared.recipe.attention_temperature
    if asked != "auto":
        if asked != 1:
            run.update(temperature={"value": asked, "detail": "given in the recipe"})
        return asked
    finished = trained_checkpoint(run, prepared.recipe)
    found = run.metadata().get("temperature")
    known = known_decisions(run)[1].get("temperature", found)
    searched = found is not None and not found["detail"].startswith(_NOT_NOW)
    if found and searched and known and found["value"] != known["value"]:
        raise SkipwiseError(
            f"{run.path / 'run.json'} says temperature {found['value']}, and {known['value']} was "
            "found after training\nremove run.json: what decided the run is in its checkpoints"
        )
    if found is None or not searched:
        if prepared.recipe.method != "none":
            require_trained(run, checkpoint)
        prepared = with_chosen_separator(prepared, run)
        before, found = found, _search_of_run(prepared, run, checkpoint, data)
        if before is not None and before["value"] != found["value"] and is_main_process():
            with run.lock():
                run.write_results([row for row in run.results() if row["model"] != "after"])
        if not found["detail"].startswith(_NOT_NOW):
            add_decision(finished, temperature={"value": found["value"]})
        run.update(temperature=found)
        print(f"  temperature {found['value']:g}: {found['detail']}", file=sys.stderr, flush=True)
    return found["value"]


def temperature_check(prepared: PreparedModel) -> list[Check]:
    """What a search will do, in one line; nothing where the recipe has a number."""
    if prepared.recipe.attention_temperature != "auto":
        return []
    detail = f"auto: extend will search {GRID[0]:g} to {GRID[-1]:g} in steps of "
    detail += f"{GRID[1] - GRID[0]:.2f} before it exports, and keep 1 where that gains little"
    try:
        check_foldable(prepared.scaled)
    except SkipwiseError as refused:
        detail = f"auto: 1, because {_reason(refused)}"
    return [Check(name="attention_temperature", passed=True, detail=detail)]


def _reason(refused: SkipwiseError) -> str:
    return str(refused).partition("\n")[0].removeprefix("attention_temperature: ")


def untrained_temperature(
    prepared: PreparedModel, run: RunFolder, data: TrainingData | None
) -> float:
    """The best temperature of the rescaled model before training, as `method: none` finds it.

    Searched once in a run, and again where a search failed.
    """
    asked = prepared.recipe.attention_temperature
    if asked != "auto":
        return asked
    found = run.metadata().get("untrained")
    if found is None or found["detail"].startswith(_NOT_NOW):
        found = _search_of_run(prepared, run, None, data)
        run.update(untrained=found)
        detail = f"temperature {found['value']:g}: {found['detail']}"
        print(f"  rescaled without training: {detail}", file=sys.stderr, flush=True)
    return found["value"]


def search_temperature(
    model: Any,
    documents: Sequence[np.ndarray],
    original_length: int,
    longer_length: int,
    *,
    windows: int | None = None,
    batch_tokens: int = 16384,
) -> tuple[float, list[Candidate]]:
    """The temperature with the lowest perplexity at the longer length, and all candidates.

    The model is unchanged afterwards.

    Args:
        documents: token ids, each of at least the longer length.
        windows: of each perplexity. Defaults to 1,024 target tokens.

    Raises:
        SkipwiseError: a temperature cannot be folded into the model's weights.
    """
    weights = QueryWeights(model)
    weights.check(GRID[-1])
    contexts, count = (original_length, longer_length), windows or num_windows(original_length)

    label = "search the attention temperature"
    bar = Progress(label, None, unit=" temperatures")

    def measure(t: float) -> Candidate:
        weights.set(t)
        bar.advance(1, f"temperature {t:g}")
        rows = perplexity(
            model,
            documents,
            contexts,
            num_windows=count,
            batch_tokens=batch_tokens,
            tick=lambda _: bar.advance(0, f"temperature {t:g}"),
        )
        near, far = (math.inf if row["value"] is None else row["value"] for row in rows)
        return Candidate(temperature=t, near=near, far=far)

    try:
        return golden_section_search(measure)
    finally:
        bar.close()
        weights.set(1.0)


def golden_section_search(
    measure: Callable[[float], Candidate],
) -> tuple[float, list[Candidate]]:
    """The temperature on the grid with the lowest perplexity at c, and all that were measured.

    A temperature that raises the perplexity at L by more than 1 % counts as the highest. With one
    minimum on the grid this finds it, in at most 6 measurements of 9.
    """
    measured = {0: measure(GRID[0])}
    plain = measured[0]

    def far(i: int) -> float:
        if i not in measured:
            measured[i] = measure(GRID[i])
        return math.inf if measured[i].near > plain.near * (1 + _MOST_COST) else measured[i].far

    below, best, above = -1, 0, len(GRID)  # the minimum is between the first and the last
    while above - below > 2:
        lower, higher = best - below - 1, above - best - 1  # temperatures left on either side
        step = max(1, int(_GOLDEN * (max(lower, higher) + 1)))
        tried = best + step if higher >= lower else best - step
        if (far(tried), tried) < (far(best), best):  # of equals, the lower
            below, best, above = (best, tried, above) if tried > best else (below, tried, best)
        else:
            below, above = (below, tried) if tried > best else (tried, above)
    worth = far(best) <= plain.far * (1 - _LEAST_GAIN)
    candidates = [measured[i] for i in sorted(measured)]
    return GRID[best] if worth else 1.0, candidates


def _search_of_run(
    prepared: PreparedModel, run: RunFolder, checkpoint: Path | None, data: TrainingData | None
) -> dict[str, Any]:
    """The entry of run.json: the temperature with its measurements, or 1 with the reason."""
    recipe, L = prepared.recipe, prepared.info.original_length
    lengths, read, digest = search_text(prepared, data)
    if text_changed(run, digest):  # it may contain evaluation documents
        return {"value": 1.0, "detail": f"{_NOT_NOW}the text has changed since training"}
    c, chosen = longer_length(lengths, L, recipe.target_length)
    if not c:
        longest = max(lengths, default=0)
        detail = f"too little text to search on, the longest document has {longest:,} tokens"
        return {"value": 1.0, "detail": detail}
    search = fit_search(prepared, (L, c), num_windows(L), passes=_MOST_MEASURED)
    if search is None:
        return {"value": 1.0, "detail": f"not searched, because {TOO_MUCH}"}
    c = search.contexts[-1]
    documents = [np.asarray(read(int(i)), np.int64) for i in chosen]
    model = None
    try:
        model = load_for_scoring(prepared, checkpoint)
        try:
            amounts = {"windows": search.num_windows, "batch_tokens": recipe.eval.batch_tokens}
            value, tried = search_temperature(model, documents, L, c, **amounts)
        except SkipwiseError as refused:  # auto may fall back to 1
            return {"value": 1.0, "detail": _reason(refused)}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return {"value": 1.0, "detail": f"{_NOT_NOW}there is no memory to measure with"}
    finally:
        del model
        free_memory()
    detail = _describe(value, tried, L, c, len(documents))
    return {
        "value": value,
        "detail": "; ".join(filter(None, (detail, search.note))),
        "context_lengths": [L, c],
        "num_documents": len(documents),
        "num_windows": search.num_windows,
        "searched": [
            {
                "temperature": one.temperature,
                "perplexity": [x if math.isfinite(x) else None for x in (one.near, one.far)],
            }
            for one in tried
        ],
    }


def _describe(value: float, tried: list[Candidate], L: int, c: int, num_documents: int) -> str:
    """The perplexities at 1 and at the chosen temperature, or at the next one if 1 was chosen."""
    rows = {one.temperature: one for one in tried}
    plain, shown = tried[0], rows[value] if value != 1 else tried[1]
    instead = "" if value != 1 else f" with {shown.temperature:g}, which does not pay"
    return (
        f"perplexity {plain.far:.4g} -> {shown.far:.4g} at {c:,} tokens, "
        f"{plain.near:.4g} -> {shown.near:.4g} at {L:,}{instead} "
        f"({num_documents} documents that the evaluation does not use)"
    )
