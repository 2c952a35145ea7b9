"""The additive mask of importance weights, by its definition: an oracle for the masks of src."""

from __future__ import annotations

import numpy as np

from skipwise.pose.samplers import Example


def additive_mask(examples: list[Example], minimum: float) -> np.ndarray:
    """(B, 1, L, L) float32: causal, with each chunk's log weight on what later chunks see of it.

    `minimum` is what a masked pair gets: the lowest number of the dtype in use.
    """
    L = examples[0].num_tokens
    mask = np.empty((len(examples), 1, L, L), np.float32)
    future = np.triu(np.ones((L, L), bool), 1)
    for row, example in enumerate(examples):
        weights = np.repeat(example.log_weights(), example.lengths)  # (L,) by key
        out = mask[row, 0]
        out[:] = weights
        at = 0
        for length in example.lengths.tolist():  # own chunk: weight 1
            out[at : at + length, at : at + length] = 0.0
            at += length
        out[future] = minimum
    return mask
