"""What a search may cost: 3 % of the training's operations, or two minutes if that is more.

It holds for each search by itself. Two minutes are counted in operations too, at a rate that is
assumed for the machine: by the clock, two runs on one machine could choose differently.

Shapes:  c = the longest context of a search
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from skipwise.errors import SkipwiseError
from skipwise.models.prepared import PreparedModel
from skipwise.planning.flops import forward_flops, step_flops
from skipwise.planning.gpus import GPUS, UTILISATION
from skipwise.planning.job import make_jobs, read_model

_SHARE = 0.03  # of the training's operations
_SECONDS = 120.0
_QUICK_SECONDS = 10.0
_CORE_FLOPS = 5e10  # a second, of one CPU core
_MOST_CORES = 16
_OTHER_TFLOPS = 100.0  # of a GPU that is not in the table
_LEAST_WINDOWS = 2
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
        return min(os.cpu_count() or 1, _MOST_CORES) * _CORE_FLOPS
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
