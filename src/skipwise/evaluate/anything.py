"""Evaluate any model: a folder, a hub name, or the model of a run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from skipwise.documents import parse_sources
from skipwise.errors import SkipwiseError
from skipwise.evaluate.suite import evaluate_model
from skipwise.models.configs import load_config
from skipwise.models.load import best_device, compute_dtype, load_model, load_tokenizer
from skipwise.recipe import context_lengths, parse_recipe
from skipwise.run import RunFolder
from skipwise.tokens import tokenize_source


def evaluate_anything(
    thing: str, lengths: list[int], data: list[str], overrides: list[str]
) -> list[dict[str, Any]]:
    """Tidy rows of a model, with its own config.

    Args:
        thing: model folder, hub name, or run folder (its exported model, lengths and text).
        lengths: context lengths; none given: the run's own.
        data: text for perplexity; none given: the run's own, or no perplexity.

    Raises:
        SkipwiseError: a run without a model, a model without lengths.
    """
    run = RunFolder(thing)
    is_run = run.recipe_file.exists()
    if is_run:
        recipe = run.recipe()
        if not run.model.is_dir():
            raise SkipwiseError(f"{run.path} has no model yet: type skipwise export {run.path}")
        original = run.facts().get("original_length", recipe.target_length)
        lengths = lengths or list(context_lengths(recipe, original))
        tree: dict[str, Any] = {
            "model": str(run.model),
            "load": dataclasses.asdict(recipe.load),
            "eval": dataclasses.asdict(recipe.eval),
        }
    else:
        tree = {"model": thing}
    if not lengths:
        raise SkipwiseError("at which context lengths? type --lengths 4k,8k,16k")
    tree["target_length"] = max(lengths)
    asked = parse_recipe(tree, overrides)
    config = load_config(asked.model, asked.load)
    tokenizer = load_tokenizer(asked.model, asked.load)
    sources = parse_sources(data or (run.recipe().data.eval_sources if is_run else []))
    if is_run and not sources and run.eval_documents.exists():
        sources = parse_sources([str(run.eval_documents)])
    stores = [tokenize_source(source, tokenizer) for source in sources]
    documents = [store.document(i) for store in stores for i in range(store.num_documents)]
    model = load_model(asked.model, config, asked.load, dtype=compute_dtype(asked.load))
    model.to(best_device())
    label = "after" if is_run else Path(thing).name
    return evaluate_model(model, tokenizer, documents, lengths, asked.eval, label=label)
