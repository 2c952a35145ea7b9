"""Documents to training examples.

The dataset is a pure function of the example number k: the document, the cut and the skips come
from `default_rng([seed, k])` and from permutations with the same seed. So the examples do not
depend on the number of workers or devices, or on where a run resumed.

Memory: 4 bytes per slot (an example of an epoch), and as much again for each epoch's order.

Shapes:  L = train_length, T = target_length, L_x = tokens in a document
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from skipwise.data.chat import ChatTokens
from skipwise.data.corpus import Corpus
from skipwise.pose.samplers import IGNORE_INDEX, Example, Sampler

_TRIES = 256  # draws of an example of conversations
_CYCLE = 1000  # every cycle of this many examples has the exact proportions of the sources


class PoSEDataset(torch.utils.data.Dataset):
    """Training examples; item k depends only on the seed and k.

    An epoch uses a document of L_x tokens max(1, L_x // T) times, because an example spans up to T
    of its tokens. Every epoch has a new random order.
    """

    def __init__(self, corpus: Corpus, sampler: Sampler, *, seed: int, num_examples: int) -> None:
        self.corpus, self.sampler, self.seed = corpus, sampler, seed
        self.num_examples = num_examples
        T = sampler.target_length
        uses = [np.maximum(1, lengths // T) for lengths in corpus.lengths]  # in an epoch
        self._slots = [np.repeat(np.arange(len(n), dtype=np.int32), n) for n in uses]
        self._order = functools.lru_cache(maxsize=2 * len(self._slots))(self._draw_order)
        self._cycle = functools.lru_cache(maxsize=2)(self._draw_cycle)
        exact = np.array(corpus.shares) * _CYCLE
        counts = np.floor(exact).astype(int)
        for g in np.argsort(counts - exact, kind="stable")[: _CYCLE - counts.sum()]:
            counts[g] += 1  # largest remainders first
        self._counts = counts

    def __len__(self) -> int:
        return self.num_examples

    def __getitem__(self, k: int) -> dict[str, Any]:
        """`input_ids`, `labels`, `position_ids` (L,) int64, `example`, and k as `number`."""
        tokens = self.document(k)
        example = self.draw(np.random.default_rng([self.seed, k]), tokens)
        input_ids, labels = example.take(np.asarray(tokens))
        if isinstance(tokens, ChatTokens):
            labels[example.take(tokens.masked)[0] == 1] = IGNORE_INDEX
        item = {"input_ids": input_ids, "labels": labels, "number": k}
        return {**item, "position_ids": example.position_ids(), "example": example}

    def draw(self, rng: np.random.Generator, tokens: np.ndarray) -> Example:
        """Draw an example: which tokens of a document (L_x,) it takes, at which positions.

        Of conversations it is drawn again until no chunk begins or ends inside a turn marker and it
        has a label. If that takes too long, which happens where turns have a few tokens only, it is
        one chunk around a token of the assistant.
        """
        L_x, L = len(tokens), self.sampler.train_length
        example = self.sampler.sample(rng, L_x)
        if not isinstance(tokens, ChatTokens):
            return example
        for _ in range(_TRIES):
            cuts = example.text_starts, (example.text_starts + example.lengths)[:-1]
            # A sampler without chunks skips at every token; only its start can be chosen.
            cut = np.concatenate(cuts) if self.sampler.has_chunks else example.text_starts[:1]
            labels = example.take(~tokens.masked)[1]
            if not tokens.in_marker[cut].any() and (labels[1:] == 1).any():
                return example
            example = self.sampler.sample(rng, L_x)
        answer = int(rng.choice(np.flatnonzero(~tokens.masked)))
        start = min(max(0, answer - L // 2), L_x - L)
        while tokens.in_marker[start]:
            start -= 1
        return Example.contiguous(L, start)

    def document(self, k: int) -> np.ndarray:
        """(L_x,) tokens of example k's document; a view, or a copy if it was packed."""
        cycle, offset = divmod(k, _CYCLE)
        group, before = 0, k
        if len(self._slots) > 1:
            groups, ranks = self._cycle(cycle)
            group = int(groups[offset])
            before = cycle * int(self._counts[group]) + int(ranks[offset])
        epoch, i = divmod(before, len(self._slots[group]))
        row = int(self._slots[group][self._order(group, epoch)[i]])
        return self.corpus.document(group, row)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        del state["_order"], state["_cycle"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._order = functools.lru_cache(maxsize=2 * len(self._slots))(self._draw_order)
        self._cycle = functools.lru_cache(maxsize=2)(self._draw_cycle)

    def _draw_order(self, group: int, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch, group, 1])
        # int32 gives the same order as int64 in half the memory.
        return rng.permutation(np.arange(len(self._slots[group]), dtype=np.int32))

    def _draw_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Each example's group in a cycle, and how many examples of that group came before."""
        groups = np.repeat(np.arange(len(self._counts)), self._counts)
        groups = np.random.default_rng([self.seed, cycle, 2]).permutation(groups)
        ranks = np.empty(_CYCLE, int)
        for g, count in enumerate(self._counts):
            ranks[groups == g] = np.arange(count)
        return groups, ranks
