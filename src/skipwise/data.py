"""Documents to tokens to examples to batches.

The data set is a pure function of the example number: which document, which cut, which skips all
come from `default_rng([seed, k])` and from permutations seeded the same way. So it does not matter
how many workers or devices read it, or where a run was taken up again.

Shapes:  B = batch, L = train_length, T = target_length, L_x = tokens in a document
"""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skipwise.errors import SkipwiseError
from skipwise.models.masks import with_layer_masks
from skipwise.positions import Example, Sampler, additive_mask
from skipwise.tokens import TokenStore

_CYCLE = 1000  # examples over which the sources' weights are met exactly


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The documents of a run: spans of the stores' tokens, in groups that share the examples."""

    stores: list[TokenStore]
    store_ids: list[np.ndarray]  # of each group: (n,) which store
    starts: list[np.ndarray]  # (n,) first token in the store
    lengths: list[np.ndarray]  # (n,) L_x
    shares: list[float]  # of the examples, sum 1
    num_short: int  # documents below the length, dropped or packed
    short_documents: str
    held_out: list[np.ndarray]  # token ids of the documents kept for evaluation

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.lengths))

    @property
    def num_tokens(self) -> int:
        return int(sum(lengths.sum() for lengths in self.lengths))

    @property
    def longest(self) -> int:
        return max(int(lengths.max()) for lengths in self.lengths)


def build_corpus(
    stores: list[TokenStore],
    weights: list[float | None],
    *,
    min_length: int,
    target_length: int,
    short_documents: str = "drop",
    separator: int | None = None,
    num_held_out: int = 0,
) -> Corpus:
    """Choose the documents that examples are cut from.

    Documents below `min_length` tokens are dropped, or packed: joined in their order, with the
    `separator` token between them, until T tokens are reached. `num_held_out` documents of at
    least T tokens, those with the smallest hash of their tokens, are kept for evaluation (copies of
    them as well); with a single long document its last part is.

    Raises:
        SkipwiseError: no document is long enough; it says how long they are.
    """
    stores = list(stores)
    groups = [[i] for i in range(len(stores))]
    if all(weight is None for weight in weights):
        groups, shares = [list(range(len(stores)))], [1.0]
    else:
        shares = [1.0 if weight is None else float(weight) for weight in weights]
    table: list[list[tuple[int, np.ndarray, np.ndarray]]] = []
    num_short = 0
    for group in groups:
        rows = []
        for i in group:
            store = stores[i]
            lengths = np.diff(store.offsets)
            long = lengths >= min_length
            num_short += int((~long).sum())
            rows.append((i, store.offsets[:-1][long], lengths[long]))
            if short_documents == "pack" and not long.all():
                packed = _pack(store, np.flatnonzero(~long), min_length, target_length, separator)
                stores.append(packed)
                rows.append((len(stores) - 1, packed.offsets[:-1], np.diff(packed.offsets)))
        table.append(rows)
    store_ids = [np.concatenate([np.full(len(s), i) for i, s, _ in rows]) for rows in table]
    starts = [np.concatenate([s for _, s, _ in rows]) for rows in table]
    lengths = [np.concatenate([n for _, _, n in rows]) for rows in table]
    if num_held_out:
        held_out = _hold_out(stores, store_ids, starts, lengths, target_length, num_held_out)
    else:
        held_out = []
    keep = [g for g in range(len(groups)) if len(lengths[g]) and shares[g] > 0]
    if not keep:
        raise SkipwiseError(_too_short(stores[: len(weights)], min_length, short_documents))
    total = sum(shares[g] for g in keep)
    return Corpus(
        stores=stores,
        store_ids=[store_ids[g] for g in keep],
        starts=[starts[g] for g in keep],
        lengths=[lengths[g] for g in keep],
        shares=[shares[g] / total for g in keep],
        num_short=num_short,
        short_documents=short_documents,
        held_out=held_out,
    )


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
        example = self.sampler.sample(np.random.default_rng([self.seed, k]), len(tokens))
        input_ids, labels = example.take(tokens)
        return {
            "input_ids": input_ids,
            "labels": labels,
            "position_ids": example.position_ids(),
            "example": example,
        }

    def document(self, k: int) -> np.ndarray:
        """(L_x,) tokens of the document that example k is cut from; a view, not a copy."""
        cycle, offset = divmod(k, _CYCLE)
        group, before = 0, k
        if len(self._slots) > 1:
            groups, ranks = self._cycle(cycle)
            group = int(groups[offset])
            before = cycle * int(self._counts[group]) + int(ranks[offset])
        epoch, i = divmod(before, len(self._slots[group]))
        row = int(self._slots[group][self._order(group, epoch)[i]])
        corpus = self.corpus
        start = int(corpus.starts[group][row])
        store = corpus.stores[int(corpus.store_ids[group][row])]
        return store.tokens[start : start + int(corpus.lengths[group][row])]

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
        return rng.permutation(len(self._slots[group]))

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
    for each kind of layer. `skipwise train` adds these on the device instead.
    """

    def __init__(self, weights: str = "none", config: Any = None) -> None:
        self.weights, self.config = weights, config

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        keys = ("input_ids", "labels", "position_ids")
        batch = {k: torch.from_numpy(np.stack([item[k] for item in items])) for k in keys}
        if self.weights == "importance":
            examples: list[Example] = [item["example"] for item in items]
            mask = additive_mask(examples, torch.finfo(torch.bfloat16).min)  # float32 holds it too
            batch["attention_mask"] = torch.from_numpy(mask)
        else:
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        return batch if self.config is None else with_layer_masks(self.config, batch)


def _pack(
    store: TokenStore, short: np.ndarray, min_length: int, target_length: int, separator: int | None
) -> TokenStore:
    """Join short documents, in their order, to documents of T tokens or more."""
    between = [] if separator is None else [np.array([separator], store.tokens.dtype)]
    pieces: list[np.ndarray] = []
    lengths: list[int] = []
    size = 0
    for i in short:
        pieces += [store.document(int(i)), *between]
        size += len(pieces[-1 - len(between)]) + len(between)
        if size >= target_length:
            lengths.append(size)
            size = 0
    if size >= min_length:
        lengths.append(size)
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    tokens = np.concatenate(pieces)[: offsets[-1]]
    return TokenStore(tokens=tokens, offsets=offsets)


def _hold_out(
    stores: list[TokenStore],
    store_ids: list[np.ndarray],
    starts: list[np.ndarray],
    lengths: list[np.ndarray],
    target_length: int,
    num_held_out: int,
) -> list[np.ndarray]:
    """Take documents for evaluation out of the tables (which are changed in place)."""
    rows = [(g, int(i)) for g, n in enumerate(lengths) for i in np.flatnonzero(n >= target_length)]

    def tokens(g: int, i: int) -> np.ndarray:
        start = int(starts[g][i])
        return stores[int(store_ids[g][i])].tokens[start : start + int(lengths[g][i])]

    total = sum(map(len, lengths))
    if total < 2 or not rows:
        if not rows:
            return []
        g, i = rows[0]  # a single document: its last part
        tail = max(target_length, int(lengths[g][i]) // 20)
        if lengths[g][i] - tail < target_length:
            return []
        held = tokens(g, i)[-tail:].copy()
        lengths[g] = lengths[g].copy()
        lengths[g][i] -= tail
        return [held]
    digests = sorted(
        (hashlib.sha256(tokens(g, i)[:target_length].tobytes()).hexdigest(), g, i) for g, i in rows
    )
    chosen: dict[str, np.ndarray] = {}
    for digest, g, i in digests:
        if digest not in chosen and len(chosen) < min(num_held_out, max(1, total // 20)):
            chosen[digest] = tokens(g, i).copy()
    out = {(g, int(i)) for digest, g, i in digests if digest in chosen}
    for g in range(len(lengths)):
        keep = np.array([(g, i) not in out for i in range(len(lengths[g]))], bool)
        store_ids[g], starts[g], lengths[g] = store_ids[g][keep], starts[g][keep], lengths[g][keep]
    return list(chosen.values())


def _too_short(stores: list[TokenStore], min_length: int, short_documents: str) -> str:
    lengths = np.concatenate([np.diff(store.offsets) for store in stores])
    if not len(lengths):
        return "the data holds no document at all: see the records that could not be read"
    found = f"{len(lengths):,} documents, the longest of {lengths.max():,} tokens"
    quartiles = f"(median {int(np.median(lengths)):,}, {lengths.sum():,} in all)"
    mend = "give longer texts"
    if short_documents == "drop" and lengths.sum() >= min_length:
        mend += ", or join the short ones with data.short_documents=pack"
    need = f"no document has the {min_length:,} tokens that an example needs"
    return f"{need}: {found} {quartiles}\n{mend}"
