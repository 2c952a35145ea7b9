"""The text on which scaling and attention temperature are chosen.

It comes from the training documents. The evaluation reads other ones.

Shapes:  c = the longer context of a search: T, or less where the documents are short
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skipwise.evaluation.run import documents_for_search
from skipwise.models.prepared import PreparedModel
from skipwise.training.inputs import load_training_data

_TARGETS = 2048  # tokens that a perplexity is of, at least


_WINDOWS = 8  # at least


def longer_length(
    lengths: np.ndarray, original_length: int, target_length: int
) -> tuple[int, np.ndarray]:
    """(c, documents to search on): T, or half of it and so on, where the text has enough windows.

    Args:
        lengths: (n,) tokens of each document.

    Returns:
        c, 0 where there is too little text; and indices of documents of c tokens or more, spread
        evenly.
    """
    wanted, c = num_windows(original_length), target_length
    while c > original_length:
        usable = np.flatnonzero(lengths >= c)
        if int(((lengths[usable] - c) // _stride(original_length) + 1).sum()) >= wanted:
            places = np.linspace(0, len(usable) - 1, min(wanted, len(usable)))
            return c, usable[places.round().astype(int)]
        c //= 2
    return 0, np.array([], int)


def search_text(prepared: PreparedModel) -> tuple[np.ndarray, Callable[[int], np.ndarray], str]:
    """Lengths of the documents to search on, what reads one, and the digest of training data."""
    if prepared.recipe.method == "none":
        documents = documents_for_search(prepared.recipe, prepared.tokenizer)
        return np.array([len(d) for d in documents], int), lambda i: documents[i], ""
    data = load_training_data(prepared, None, progress=False)
    corpus = data.corpus
    ends = np.cumsum([len(group) for group in corpus.lengths])

    def read(i: int) -> np.ndarray:
        group = int(np.searchsorted(ends, i, "right"))
        return corpus.document(group, i - int(ends[group] - len(corpus.lengths[group])))

    return np.concatenate(corpus.lengths), read, data.digest


def _stride(original_length: int) -> int:
    """Targets of a window, as `perplexity` has it where none are given."""
    return max(1, min(original_length // 2, 512))


def num_windows(original_length: int) -> int:
    return max(_WINDOWS, -(-_TARGETS // _stride(original_length)))
