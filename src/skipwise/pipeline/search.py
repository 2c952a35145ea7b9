"""What the searches for scaling, temperature and separator may cost, and the text they read.

The budget is 3 % of the training's operations, or two minutes if that is more. It holds for each
search by itself. Two minutes are counted in operations too, at a rate that is assumed for the
machine: by the clock, two runs on one machine could choose differently.

The text is that of the training documents. The evaluation reads other ones.

Shapes:  c = the longer context of a search: T, or less where the documents are short
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from skipwise.config.machine import num_cores
from skipwise.errors import SkipwiseError
from skipwise.evaluation.run import documents_for_search
from skipwise.models.prepared import PreparedModel
from skipwise.planning.flops import forward_flops, step_flops
from skipwise.planning.gpus import GPUS, UTILISATION
from skipwise.planning.job import make_jobs, read_model
from skipwise.training.inputs import TrainingData, load_training_data

_SHARE = 0.03  # of the training's operations
_SECONDS = 120.0
_QUICK_SECONDS = 10.0
_CORE_FLOPS = 5e10  # a second, of one CPU core
_MOST_CORES = 16
_OTHER_TFLOPS = 100.0  # of a GPU that is not in the table
_LEAST_WINDOWS = 2
_TARGETS = 1024  # least number of target tokens of a perplexity
_WINDOWS = 8  # least number of windows
TOO_MUCH = "it costs more than 3 % of the training and than two minutes"


@dataclass(frozen=True, kw_only=True)
class Search:
    """How much a search measures."""

    contexts: tuple[int, ...]
    num_windows: int
    num_candidates: int
    note: str = ""  # what was reduced, with the reason


def fit_search(
    prepared: PreparedModel,
    contexts: Sequence[int],
    num_windows: int,
    *,
    num_candidates: int = 1,
    passes: int,
    trials: float = 0.0,
    quick: bool = False,
) -> Search | None:
    """The search within the budget; None if not even the smallest is.

    In turn, contexts between L and c are left out, the windows and c are halved, then candidates
    are left out.

    Args:
        num_candidates: models to measure. At least two of several are.
        passes: of each candidate over each window.
        trials: passkeys of c tokens of each candidate, for each window.
        quick: nothing is reduced, and the budget is ten seconds.
    """
    full, recipe = (tuple(contexts), num_windows, num_candidates), prepared.recipe
    try:
        architecture = read_model(recipe)[1]
    except SkipwiseError:  # its config does not say how large it is
        return Search(contexts=full[0], num_windows=num_windows, num_candidates=num_candidates)
    jobs = () if recipe.method == "none" else make_jobs(recipe, prepared.info, architecture)
    training = sum(job.num_steps * step_flops(job) for job in jobs if job is not None)
    budget = max(_SHARE * training, _SECONDS * flops_per_second())
    budget = _QUICK_SECONDS * flops_per_second() if quick else budget
    for lengths, windows, candidates in _smaller(*full):
        cost = passes * sum(forward_flops(architecture, c) for c in lengths)
        cost += trials * forward_flops(architecture, lengths[-1])
        if candidates * windows * cost <= budget:
            note = ""
            if (lengths, windows, candidates) != full:
                note = f"{windows} windows of up to {lengths[-1]:,} tokens, within the larger of "
                note += f"{_SHARE * 100:.0f} % of the training and {_SECONDS / 60:.0f} minutes"
            amounts = {"num_windows": windows, "num_candidates": candidates}
            return Search(contexts=lengths, **amounts, note=note)
        if quick:
            break
    return None


def flops_per_second() -> float:
    """The assumed rate of this process: its GPU, or its CPU."""
    if not torch.cuda.is_available():
        return min(num_cores(), _MOST_CORES) * _CORE_FLOPS
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    known = [gpu.tflops or 0 for gpu in GPUS if gpu.name.lower().split("-")[0] in name]
    return max(known, default=_OTHER_TFLOPS) * 1e12 * UTILISATION


def _smaller(
    contexts: tuple[int, ...], windows: int, candidates: int
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    yield contexts, windows, candidates
    shortest, longest = contexts[0], contexts[-1]
    ends = tuple(dict.fromkeys((shortest, longest)))
    yield ends, windows, candidates
    while windows > _LEAST_WINDOWS or longest // 2 > shortest:
        if windows > _LEAST_WINDOWS:
            windows //= 2
            yield ends, windows, candidates
        if longest // 2 > shortest:
            longest //= 2
            ends = shortest, longest
            yield ends, windows, candidates
    for fewer in range(candidates - 1, 1, -1):
        yield ends, windows, fewer


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
