"""`rope.type: auto`: which scaling reads this model's long texts best before it is trained.

Forward passes only, on a few training documents: each scaling that the family takes is put on the
base model, and the mean loss over the context lengths L, 2L, .. c is measured at a few attention
temperatures (where `temperature: auto` will search one after training), with a few passkeys at c.
The lowest is taken, if it is lower than YaRN's by 0.01 nat. research/study: at f = 8 the
order of the scalings untrained was their order after training.

Shapes:  c = the longest context measured: T, or less where the text is short
"""

from __future__ import annotations

import dataclasses
import gc
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from skipwise.config.recipe import Recipe
from skipwise.config.run_folder import RunFolder
from skipwise.errors import SkipwiseError
from skipwise.evaluation.scoring import exact_match
from skipwise.evaluation.tasks.passkey import passkey_trials
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.models.attention.temperature import QueryWeights
from skipwise.models.load import compute_dtype, load_for_evaluation
from skipwise.models.prepared import PreparedModel, prepare_model
from skipwise.pipeline.search_text import longer_length, search_text
from skipwise.pose.rope import Unscaled
from skipwise.training.checkpoints import last_checkpoint
from skipwise.training.error_hints import is_out_of_memory

SCALINGS = ("yarn", "llama3", "ntk", "linear")  # the first, unless another is clearly better
_LEAST_GAIN = 0.01  # nats
_TEMPERATURES = (1.0, 1.2, 1.4)
_WINDOWS = 8
_TRIALS = 10  # passkeys
_TOO_HIGH = 700.0  # nats


def with_choice(recipe: Recipe, run: RunFolder) -> Recipe:
    """The recipe with the scaling that was chosen in this run, if one was."""
    chosen = run.metadata().get("rope_choice", {}).get("type")
    if recipe.rope.type != "auto" or chosen is None:
        return recipe
    return dataclasses.replace(recipe, rope=dataclasses.replace(recipe.rope, type=chosen))


def choose_scaling(prepared: PreparedModel, run: RunFolder) -> PreparedModel:
    """The plan with a scaling for `rope.type: auto`, measured once; else the plan as it is.

    A model that is scaled already keeps its scaling. Where `skipwise train` alone has trained, it
    was with the first that the family takes, and so it is where the text is too short to tell.
    """
    recipe = prepared.recipe
    if recipe.rope.type != "auto" or not isinstance(prepared.info.scaling, Unscaled):
        return prepared
    if "rope_choice" not in run.metadata():
        trained = last_checkpoint(run) is not None
        run.update(rope_choice=_as_trained(prepared) if trained else _measure(prepared))
        print(f"  rope: {run.metadata()['rope_choice']['detail']}", file=sys.stderr, flush=True)
    chosen = prepare_model(with_choice(recipe, run))
    return dataclasses.replace(
        prepared, recipe=chosen.recipe, scaled=_tied(chosen, prepared), scaling=chosen.scaling
    )


def _as_trained(prepared: PreparedModel) -> dict[str, Any]:
    name = prepared.scaling.name
    return {"type": name, "detail": f"{name}, with which it was trained unmeasured"}


def _tied(chosen: PreparedModel, prepared: PreparedModel) -> Any:
    """The chosen config, with what was learned when the weights were made ready."""
    chosen.scaled.tie_word_embeddings = prepared.scaled.tie_word_embeddings
    return chosen.scaled


def _measure(prepared: PreparedModel) -> dict[str, Any]:
    """What run.json says: the type, what was measured of each, a line of it."""
    L, T = prepared.info.original_length, prepared.recipe.target_length
    fallback = prepared.scaling.name
    names = [name for name in SCALINGS if name not in prepared.info.refused_types]
    if len(names) < 2:
        return {"type": fallback, "detail": f"{fallback}, the only one that the family takes"}
    spare = prepared.recipe.attention_temperature == "auto" or bool(
        prepared.recipe.data.eval_sources
    )
    if prepared.recipe.method == "none" and not spare:  # all the text is what is measured with
        return {"type": fallback, "detail": f"{fallback}, not measured: no text to spare"}
    lengths, read, _ = search_text(prepared)
    c, chosen = longer_length(lengths, L, T)
    if not c:
        longest = max(lengths, default=0)
        detail = f"{fallback}, not measured: the longest document has {longest:,} tokens"
        return {"type": fallback, "detail": detail}
    documents = [np.asarray(read(int(i)), np.int64) for i in chosen]
    contexts = sorted({*(L << i for i in range(int(math.log2(c / L)) + 1)), c})
    rows, left_out = [], {}
    for name in names:
        try:
            rows.append(_of_one(prepared, name, documents, contexts))
        except Exception as error:  # the model does not take it, or there is no room to measure
            if not isinstance(error, SkipwiseError) and not is_out_of_memory(error):
                raise
            left_out[name] = str(error).partition("\n")[0]
    if not rows:
        detail = f"{fallback}, not measured: {left_out[names[0]]}"
        return {"type": fallback, "detail": detail, "left_out": left_out}
    best = min(rows, key=lambda row: row["loss"])
    if best["loss"] > rows[0]["loss"] - _LEAST_GAIN:
        best = rows[0]
    others = ", ".join(
        [f"{row['type']} {_perplexity(row)}" for row in rows if row["type"] != best["type"]]
        + [f"{name} left out ({why})" for name, why in left_out.items()]
    )
    detail = (
        f"{best['type']}, perplexity {_perplexity(best)} untrained over {L:,} to {contexts[-1]:,} "
        f"tokens, {best['passkeys']} of {best['num_passkeys']} passkeys; {others} "
        f"({len(documents)} documents)"
    )
    found = {"type": best["type"], "detail": detail, "measured": rows}
    return {**found, "left_out": left_out, "context_lengths": contexts}


def _of_one(
    prepared: PreparedModel, name: str, documents: Sequence[np.ndarray], contexts: list[int]
) -> dict[str, Any]:
    """One scaling at the temperature that suits it.

    Raises:
        SkipwiseError: the model does not take it.
    """
    recipe = prepared.recipe
    rope = dataclasses.replace(recipe.rope, type=name)
    scaled = _tied(prepare_model(dataclasses.replace(recipe, rope=rope)), prepared)
    batch_tokens = recipe.eval.batch_tokens
    dtype = compute_dtype(recipe.load)
    model = load_for_evaluation(prepared.source, scaled, prepared.load, dtype=dtype)
    try:
        weights = _queries(recipe, model)
        tried = []
        for t in _TEMPERATURES if weights is not None else (1.0,):
            if weights is not None:
                weights.set(t)
            found = perplexity(
                model, documents, contexts, num_windows=_WINDOWS, batch_tokens=batch_tokens
            )
            values = [row["value"] for row in found]  # None: too high to be written
            loss = float(np.mean([_TOO_HIGH if v is None else math.log(v) for v in values]))
            tried.append({"type": name, "temperature": t, "loss": loss, "perplexity": values})
        best = min(tried, key=lambda row: row["loss"])
        if weights is not None:
            weights.set(best["temperature"])
        trials = passkey_trials(
            prepared.tokenizer, contexts[-1], num_trials=_TRIALS, num_depths=_TRIALS, seed=1
        )
        right = exact_match(model, trials, batch_tokens)
        return {**best, "passkeys": sum(right), "num_passkeys": len(right)}
    finally:
        del model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _queries(recipe: Recipe, model: Any) -> QueryWeights | None:
    """What sets the temperature; None where none will be searched, or none can be set."""
    if recipe.attention_temperature != "auto":
        return None
    try:
        weights = QueryWeights(model)
        weights.set(1.0)
        return weights
    except SkipwiseError:
        return None


def _perplexity(row: dict[str, Any]) -> str:
    return f"{math.exp(row['loss']):.4g}"
