"""`rope.type: auto`: choose the scaling with the lowest loss on long documents before training.

Forward passes on a few training documents. Each scaling that the family takes is applied to the
base model. The mean loss over the context lengths L, 2L, .. c is measured, at rising attention
temperatures while it falls (or at that of the recipe), and a few passkeys at c. A scaling
that is far behind at temperature 1 is not measured further. The lowest loss wins if it is at least
0.01 nats below YaRN's. Study: at f = 8 the untrained scalings ranked as they did
after training.

Shapes:  c = the longest measured context: T, or less where the documents are short
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from skipwise.config.progress import Progress
from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.evaluation.scoring import exact_match
from skipwise.evaluation.tasks.passkey import passkey_trials
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.models.attention.temperature import QueryWeights
from skipwise.models.load import compute_dtype, free_memory, load_for_evaluation
from skipwise.models.prepared import PreparedModel, rescale
from skipwise.models.scaled_config import auto_scalings
from skipwise.pipeline.search import TOO_MUCH, Search, fit_search, longer_length, search_text
from skipwise.pose.rope import Unscaled
from skipwise.training.checkpoints import last_checkpoint
from skipwise.training.error_hints import is_out_of_memory
from skipwise.training.inputs import TrainingData

_LEAST_GAIN = 0.01  # nats
_TEMPERATURES = (1.0, 1.2, 1.4)
_WINDOWS = 8
_TRIALS = 10  # passkeys
_FAR_BEHIND = 0.5  # nats; on the bundled model the best temperature gains 0.2
_TOO_HIGH = 700.0  # nats


def with_chosen_scaling(prepared: PreparedModel, run: RunFolder) -> PreparedModel:
    """The model with the scaling that this run chose before, if it did."""
    chosen = run.metadata().get("rope_choice", {}).get("type")
    if prepared.recipe.rope.type != "auto" or chosen is None:
        return prepared
    return rescale(prepared, chosen)


def choose_scaling(
    prepared: PreparedModel, run: RunFolder, data: TrainingData | None = None
) -> PreparedModel:
    """The model with a measured scaling where `rope.type` is auto. Measured once in a run.

    A model that is scaled already keeps its scaling. A run that `skipwise train` has trained keeps
    the scaling it was trained with: the first one that the family takes. That one is also the
    choice where the text is too short to measure.

    Args:
        data: training data that are loaded already.
    """
    recipe = prepared.recipe
    if recipe.rope.type != "auto" or not isinstance(prepared.info.scaling, Unscaled):
        return prepared
    if "rope_choice" not in run.metadata():
        trained = last_checkpoint(run) is not None
        name = prepared.scaling.name
        detail = f"{name}, not measured: training had started with it"
        as_trained = {"type": name, "detail": detail}
        run.update(rope_choice=as_trained if trained else _measure(prepared, data))
        print(f"  rope: {run.metadata()['rope_choice']['detail']}", file=sys.stderr, flush=True)
    return with_chosen_scaling(prepared, run)


def _measure(prepared: PreparedModel, data: TrainingData | None = None) -> dict[str, Any]:
    """The entry of run.json: the chosen type, the measurements of each, and one line of text."""
    L, T = prepared.info.original_length, prepared.recipe.target_length
    fallback = prepared.scaling.name
    recipe = prepared.recipe
    names, why = auto_scalings(recipe, prepared.info)
    if not names:
        return {"type": fallback, "detail": f"{fallback}, {why}"}
    lengths, read, _ = search_text(prepared, data)
    c, chosen = longer_length(lengths, L, T)
    if not c:
        longest = max(lengths, default=0)
        detail = f"{fallback}, not measured: the longest document has {longest:,} tokens"
        return {"type": fallback, "detail": detail}
    documents = [np.asarray(read(int(i)), np.int64) for i in chosen]
    contexts = sorted({*(L << i for i in range(int(math.log2(c / L)) + 1)), c})
    passes = len(_temperatures(recipe))
    amounts: Any = {"num_candidates": len(names), "passes": passes, "trials": _TRIALS / _WINDOWS}
    search = fit_search(prepared, contexts, _WINDOWS, **amounts)
    if search is None:
        return {"type": fallback, "detail": f"{fallback}, not measured: {TOO_MUCH}"}
    rows, left_out, names = [], {}, names[: search.num_candidates]
    bar = Progress("measure scalings", len(names), unit=" scalings")
    for name in names:
        try:
            best = min((row["loss"] for row in rows), default=math.inf)
            rows.append(_of_one(prepared, name, documents, search, bar, best))
        except Exception as error:  # the model does not take it, or out of memory
            if not isinstance(error, SkipwiseError) and not is_out_of_memory(error):
                raise
            left_out[name] = str(error).partition("\n")[0]
        bar.advance(1, name)
    bar.close()
    if not rows:
        detail = f"{fallback}, not measured: {left_out[names[0]]}"
        return {"type": fallback, "detail": detail, "left_out": left_out}
    best = min(rows, key=lambda row: row["loss"])
    if best["loss"] > rows[0]["loss"] - _LEAST_GAIN:
        best = rows[0]
    others = [f"{row['type']} {_perplexity(row)}" for row in rows if row["type"] != best["type"]]
    others += [f"{name} left out ({why})" for name, why in left_out.items()]
    detail = f"{best['type']}, perplexity {_perplexity(best)} untrained over {L:,} to "
    detail += f"{search.contexts[-1]:,} tokens, {best['passkeys']} of {best['num_passkeys']} "
    detail += f"passkeys; {', '.join(others)} ({len(documents)} documents)"
    detail += f"; {search.note}" if search.note else ""
    found = {"type": best["type"], "detail": detail, "measured": rows, "left_out": left_out}
    return {**found, "context_lengths": search.contexts, "num_windows": search.num_windows}


def _of_one(
    prepared: PreparedModel,
    name: str,
    documents: Sequence[np.ndarray],
    search: Search,
    bar: Progress,
    best_loss: float = math.inf,
) -> dict[str, Any]:
    """Measure one scaling at its best temperature. Raises if the model does not take it.

    Args:
        best_loss: of the scalings measured before, in nats.
    """
    recipe, scaled = prepared.recipe, rescale(prepared, name).scaled
    batch_tokens = recipe.eval.batch_tokens
    dtype = compute_dtype(recipe.load)
    model = load_for_evaluation(prepared.source, scaled, prepared.load, dtype=dtype)
    try:
        weights = _queries(recipe, model)
        best: dict[str, Any] = {}
        tried = _temperatures(recipe) if weights is not None else (1.0,)
        for t in tried:
            if weights is not None:
                weights.set(t)
            found = perplexity(
                model,
                documents,
                search.contexts,
                num_windows=search.num_windows,
                batch_tokens=batch_tokens,
                tick=lambda _: bar.advance(0, name),
            )
            values = [row["value"] for row in found]  # None: too high to print
            loss = float(np.mean([_TOO_HIGH if v is None else math.log(v) for v in values]))
            if best and loss >= best["loss"]:
                break
            best = {"type": name, "temperature": t, "loss": loss, "perplexity": values}
            if t == tried[0] and loss > best_loss + _FAR_BEHIND:
                return best
        if weights is not None:
            weights.set(best["temperature"])
        count = max(1, _TRIALS * search.num_windows // _WINDOWS)
        counts = {"num_trials": count, "num_depths": count}
        trials = passkey_trials(prepared.prompt_tokenizer, search.contexts[-1], **counts, seed=1)
        right = exact_match(model, trials, batch_tokens)
        return {**best, "passkeys": sum(right), "num_passkeys": len(right)}
    finally:
        del model
        free_memory()


def _temperatures(recipe: Recipe) -> tuple[float, ...]:
    asked = recipe.attention_temperature
    return _TEMPERATURES if asked == "auto" else (float(asked),)


def _queries(recipe: Recipe, model: Any) -> QueryWeights | None:
    """Sets the attention temperature; None if it stays 1 or the model takes none."""
    if recipe.attention_temperature == 1:
        return None
    try:
        weights = QueryWeights(model)
        weights.set(1.0)
        return weights
    except SkipwiseError:
        return None


def _perplexity(row: dict[str, Any]) -> str:
    return f"{math.exp(row['loss']):.4g}"
