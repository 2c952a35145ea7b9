"""What is measured of a trained model: perplexity by context, needles, the attention temperature.

Temperature: all logits of attention times t, by the query weights, found on documents of the
training text (`Text.search`): t grows while the loss at T falls.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from settings import L, Setting
from text import Text, read_questions, tokenizer_of_base

from skipwise.config.recipe import ModelSettings
from skipwise.evaluation.scoring import exact_match, recall
from skipwise.evaluation.tasks.perplexity import perplexity
from skipwise.models.attention.temperature import QueryWeights
from skipwise.models.load import best_device, compute_dtype

GRID = [round(1.0 + 0.05 * i, 2) for i in range(11)]


def lengths_to(target: int) -> list[int]:
    return [L << i for i in range(int(math.log2(target // L)) + 1)]


def measured(
    model: Any, setting: Setting, text: Text, folder: Path, windows: int, trials: int
) -> dict[str, Any]:
    """Perplexity and shares right by context length, as trained and at the found temperature."""
    model.eval()
    lengths = lengths_to(setting.target)
    with arithmetic():
        found: dict[str, Any] = {
            "perplexity": perplexities(model, text.held_out, lengths, windows),
            **shares(model, setting, lengths, folder, trials),
        }
        table = search(model, text, setting.target, windows // 4)
        best = min(table, key=lambda row: row["loss"])["temperature"]
        found |= {"temperature": best, "search": table}
        if best != 1.0:
            weights = QueryWeights(model)
            weights.set(best)
            found["tempered"] = {
                "perplexity": perplexities(model, text.held_out, lengths, windows),
                **shares(model, setting, lengths, folder, trials),
            }
            weights.set(1.0)
    return found


def arithmetic() -> Any:
    dtype = compute_dtype(ModelSettings())
    return torch.autocast(best_device().type, dtype, enabled=dtype != torch.float32)


def perplexities(
    model: Any, documents: list[Any], lengths: list[int], windows: int
) -> dict[str, float]:
    rows = perplexity(model, documents, lengths, num_windows=windows, batch_tokens=_batch_tokens())
    return {str(row["context_length"]): row["value"] for row in rows}


def shares(
    model: Any, setting: Setting, lengths: list[int], folder: Path, trials: int
) -> dict[str, Any]:
    """Of each task, the share of the questions answered right, by context length."""
    found: dict[str, dict[str, float]] = {task: {} for task in setting.tasks}
    for task in setting.tasks:
        for length in lengths:
            asked = read_questions(folder, task, length)
            if not asked:
                continue
            asked = asked[:: max(1, len(asked) // trials)]
            if asked[0].num_answer:
                right = [float(r) for r in exact_match(model, asked, _batch_tokens())]
            else:
                right = recall(model, tokenizer_of_base(), asked, _batch_tokens())
            found[task][str(length)] = sum(right) / len(right)
    return found


def search(model: Any, text: Text, target: int, windows: int) -> list[dict[str, float]]:
    """Loss at L and at T on training documents for growing temperatures, until it rises at T."""
    weights = QueryWeights(model)
    table: list[dict[str, float]] = []
    for t in GRID:
        weights.set(t)
        both = perplexities(model, text.search, [L, target], windows)
        row = {"temperature": t, "loss": math.log(both[str(target)])}
        table.append({**row, "short_loss": math.log(both[str(L)])})
        if len(table) > 1 and table[-1]["loss"] > table[-2]["loss"]:
            break
    weights.set(1.0)
    return table


def _batch_tokens() -> int:
    return 1 << 18 if best_device().type == "cuda" else 16384
