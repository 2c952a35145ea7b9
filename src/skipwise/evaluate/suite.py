"""All measurements of one model, as tidy rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from skipwise.evaluate.passkey import passkey_retrieval
from skipwise.evaluate.perplexity import perplexity
from skipwise.recipe import EvalSettings


def evaluate_model(
    model: Any,
    tokenizer: Any,
    documents: Sequence[np.ndarray],
    context_lengths: Sequence[int],
    settings: EvalSettings,
    *,
    label: str,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Perplexity and passkey at each context length.

    Args:
        model: any causal language model of transformers, on its device.
        documents: token ids for perplexity.
        label: what the rows' `model` says: before, after, or a name.
    """
    model.eval()
    rows = perplexity(
        model,
        documents,
        context_lengths,
        num_windows=settings.perplexity_documents,
        batch_tokens=settings.batch_tokens,
        progress=progress,
    ) + passkey_retrieval(
        model,
        tokenizer,
        context_lengths,
        num_trials=settings.passkey_trials,
        num_depths=settings.passkey_depths,
        batch_tokens=settings.batch_tokens,
        progress=progress,
    )
    return [{"model": label, **row} for row in rows]
