"""Documents to examples to batches.

The data set is a pure function of the example number: which document, which cut, which skips all
come from `default_rng([seed, k])` and from permutations seeded the same way. So it does not matter
how many workers or devices read it, or where a run was taken up again.

Memory: 4 bytes a slot (an example that an epoch shows), and as much again for each epoch's order.

Shapes:  B = batch, L = train_length, T = target_length, L_x = tokens in a document
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from skipwise.data.corpus import Corpus, build_corpus
from skipwise.models.attention.masks import with_layer_masks
from skipwise.pose.samplers import Example, Sampler, additive_mask

__all__ = ["Corpus", "PositionCollator", "PositionDataset", "build_corpus"]

_CYCLE = 1000  # examples over which the sources' weights are met exactly


class PositionDataset(torch.utils.data.Dataset):
    """Training examples; item k depends on the seed and k alone.

    An epoch shows a document of L_x tokens max(1, L_x // T) times, for an example can read from T
    tokens of it; the order is drawn anew for every epoch.
    """

    def __init__(self, corpus: Corpus, sampler: Sampler, *, seed: int, num_examples: int) -> None:
        self.corpus, self.sampler, self.seed = corpus, sampler, seed
        self.num_examples = num_examples
        T = sampler.target_length
        self._slots = [
            np.repeat(np.arange(len(n), dtype=np.int32), np.maximum(1, n // T))
            for n in corpus.lengths
        ]
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
        """`input_ids`, `labels`, `position_ids` (L,) int64 and the `example` they come from."""
        tokens = self.document(k)
        example = self.draw(np.random.default_rng([self.seed, k]), tokens)
        input_ids, labels = example.take(tokens)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": example.position_ids(),
            "example": example,
        }

    def draw(self, rng: np.random.Generator, tokens: np.ndarray) -> Example:
        """Where the tokens of an example stand in a document (L_x,)."""
        return self.sampler.sample(rng, len(tokens))

    def document(self, k: int) -> np.ndarray:
        """(L_x,) tokens of the document that example k is cut from; a view unless it was packed."""
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
        # In int32 as in int64 the same order, for millions of slots at half the memory.
        return rng.permutation(np.arange(len(self._slots[group]), dtype=np.int32))

    def _draw_cycle(self, cycle: int) -> tuple[np.ndarray, np.ndarray]:
        """Which group each example of a cycle takes, and how many of its own came before."""
        groups = np.repeat(np.arange(len(self._counts)), self._counts)
        groups = np.random.default_rng([self.seed, cycle, 2]).permutation(groups)
        ranks = np.empty(_CYCLE, int)
        for g, count in enumerate(self._counts):
            ranks[groups == g] = np.arange(count)
        return groups, ranks


class PositionCollator:
    """Examples to a batch that always holds an attention mask.

    Without a mask transformers takes a skip in `position_ids` for the boundary of a packed
    sequence and cuts the chunks off from each other. All ones is right and costs nothing; with
    `weights="importance"` the mask is the additive one, (B, 1, L, L), for sdpa and eager.

    With the `config` of a loaded model the batch holds what a hybrid model needs besides, a mask
    for each kind of layer. `skipwise train` adds these on the device instead, and with `later` the
    weights too: a Trainer fetches the batches of a whole step at once, and 64 masks of 8,192 x
    8,192 take 16 GiB. Then the batch holds `chunk_ids` and `key_weights`, (B, L), for
    `models.masks.with_carrier` or `with_chunk_weights`.

    With a `base_length`, the tokens that the base reads, the batch holds `first_lengths` (B,): how
    many of an example's first tokens read like any text, for `loss.Distillation`.
    """

    def __init__(
        self,
        weights: str = "none",
        config: Any = None,
        later: bool = False,
        base_length: int | None = None,
    ) -> None:
        self.weights, self.config, self.later = weights, config, later
        self.base_length = base_length

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "labels", "position_ids")
        batch = {k: torch.from_numpy(np.stack([item[k] for item in items])) for k in keys}
        if self.weights == "importance" and self.later:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
            batch["chunk_ids"], batch["key_weights"] = (
                torch.from_numpy(np.stack(rows))
                for rows in zip(*(_by_key(item["example"]) for item in items), strict=True)
            )
        elif self.weights == "importance":
            examples: list[Example] = [item["example"] for item in items]
            mask = additive_mask(examples, torch.finfo(torch.bfloat16).min)  # float32 holds it too
            batch["attention_mask"] = torch.from_numpy(mask)
        else:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        if self.base_length is not None:
            first = [min(int(item["example"].lengths[0]), self.base_length) for item in items]
            batch["first_lengths"] = torch.tensor(first)
        return batch if self.config is None else with_layer_masks(self.config, batch)


def _by_key(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """(L,) int32 which chunk a token is of, and (L,) float32 the log weight of its chunk."""
    chunks = np.repeat(np.arange(len(example.lengths), dtype=np.int32), example.lengths)
    return chunks, np.repeat(example.log_weights(), example.lengths).astype(np.float32)
