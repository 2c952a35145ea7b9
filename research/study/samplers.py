"""Ways to make examples that the study tries and the library does not have.

related:K    of K draws, the one whose chunks share the most rare tokens
topup:P      a share P of the examples ends at the last position of the window
sections:K   the last chunk has a quarter to three quarters of L; the rest is K - 1 equal sections,
             their gaps sorted: a sample of the full context before a stretch of near text

Shapes:  L = train_length, T = target_length, N = num_chunks
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from skipwise.data.dataset import PoSEDataset
from skipwise.pose.samplers import Example, PoSE


class VariantDataset(PoSEDataset):
    """The library's data set with another way to draw from a document."""

    def __init__(self, variant: str, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kind, _, number = variant.partition(":")
        self.number = float(number)
        counts = np.ones(1 << 16)
        for store in self.corpus.stores:
            counts += np.bincount(store.tokens, minlength=1 << 16)
        self.rarity = np.log(counts.sum() / counts)

    def draw(self, rng: np.random.Generator, tokens: np.ndarray) -> Example:
        sampler: Any = self.sampler
        example = sampler.sample(rng, len(tokens))
        if self.kind == "related":
            draws = [example]
            draws += [sampler.sample(rng, len(tokens)) for _ in range(int(self.number) - 1)]
            return max(draws, key=lambda one: self._shared(one, tokens))
        if self.kind == "topup" and rng.random() < self.number:
            return _moved_to_end(example, sampler, len(tokens))
        if self.kind == "sections":
            return _sections(rng, sampler, len(tokens), int(self.number))
        return example

    def _shared(self, example: Example, tokens: np.ndarray) -> float:
        """Rarity of the tokens that the last chunk has in common with those before, per token."""
        input_ids, _ = example.take(tokens)
        cut = int(example.lengths[:-1].sum())
        shared = np.intersect1d(input_ids[:cut], input_ids[cut:])
        return float(self.rarity[shared].sum()) / np.sqrt(cut * (len(input_ids) - cut) + 1)


def _moved_to_end(example: Example, sampler: PoSE, num_tokens: int) -> Example:
    L, T = sampler.train_length, sampler.target_length
    positions, starts = example.position_starts.copy(), example.text_starts.copy()
    positions[-1] = T - example.lengths[-1]
    if sampler.content == "aligned":
        window = min(T, num_tokens)
        starts[-1] = starts[0] + window - L + example.lengths[:-1].sum()
    return dataclasses.replace(example, position_starts=positions, text_starts=starts)


def _sections(rng: np.random.Generator, sampler: PoSE, num_tokens: int, count: int) -> Example:
    L, T = sampler.train_length, sampler.target_length
    last = int(rng.integers(L // 4, 3 * L // 4 + 1))
    cuts = np.round(np.linspace(0, L - last, count)).astype(int)
    lengths = np.concatenate([np.diff(cuts), [last]])
    lengths = lengths[lengths > 0]
    offsets = np.cumsum(lengths) - lengths
    biases = np.zeros(len(lengths), np.int64)
    biases[1:] = np.sort(rng.integers(0, T - L + 1, len(lengths) - 1))
    window = min(T, num_tokens)
    base = int(rng.integers(num_tokens - window + 1))
    text = np.minimum(biases, window - L)
    return Example(
        lengths=lengths, position_starts=offsets + biases, text_starts=base + offsets + text
    )
