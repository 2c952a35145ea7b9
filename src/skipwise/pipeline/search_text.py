"""The text on which scaling and attention temperature are chosen.

It comes from the training documents. The evaluation reads other ones.

Shapes:  c = the longer context of a search: T, or less where the documents are short
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from skipwise.evaluation.run import documents_for_search
from skipwise.models.prepared import PreparedModel
from skipwise.training.inputs import TrainingData, load_training_data

_TARGETS = 1024  # least number of target tokens of a perplexity
_WINDOWS = 8  # least number of windows


def longer_length(
    lengths: np.ndarray, original_length: int, target_length: int
) -> tuple[int, np.ndarray]:
    """The longer context c, and the documents to search on.

    c is T, or T/2, T/4 and so on: the longest for which the text has enough windows.

    Args:
        lengths: (n,) tokens of each document.

    Returns:
        c, or 0 where there is too little text; indices of evenly spaced documents of at least c
        tokens.
    """
    wanted, c = num_windows(original_length), target_length
    while c > original_length:
        usable = np.flatnonzero(lengths >= c)
        if int(((lengths[usable] - c) // _stride(original_length) + 1).sum()) >= wanted:
            places = np.linspace(0, len(usable) - 1, min(wanted, len(usable)))
            return c, usable[places.round().astype(int)]
        c //= 2
    return 0, np.array([], int)


def search_text(
    prepared: PreparedModel, data: TrainingData | None = None
) -> tuple[np.ndarray, Callable[[int], np.ndarray], str]:
    """The documents to search on.

    Args:
        data: training data that are loaded already. Loaded here by default.

    Returns:
        (n,) document lengths in tokens; a function from an index to its tokens; the digest of the
        training data.
    """
    if prepared.recipe.method == "none":
        around = prepared.separator
        documents = documents_for_search(prepared.recipe, prepared.tokenizer, around)
        return np.array([len(d) for d in documents], int), lambda i: documents[i], ""
    if data is None:
        data = load_training_data(prepared, None, progress=False)
    corpus = data.corpus
    ends = np.cumsum([len(group) for group in corpus.lengths])

    def read(i: int) -> np.ndarray:
        group = int(np.searchsorted(ends, i, "right"))
        return corpus.document(group, i - int(ends[group] - len(corpus.lengths[group])))

    return np.concatenate(corpus.lengths), read, data.digest


def _stride(original_length: int) -> int:
    """Target tokens of a window: the default of `perplexity`."""
    return max(1, min(original_length // 2, 512))


def num_windows(original_length: int) -> int:
    return max(_WINDOWS, -(-_TARGETS // _stride(original_length)))
