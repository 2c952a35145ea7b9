"""The documents of a run, as spans of the tokens in the token stores.

Tokens stay on disk. Short documents are joined when they are read. Documents are compared by a hash
of their first P tokens.

Memory: 20 bytes per document, 16 bytes per packed short document, and temporarily 16 more per
document while documents are held out or searched for.

Shapes:  n = documents of a group, T = target_length, P = tokens that are hashed
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from skipwise.data.token_cache import TokenStore
from skipwise.errors import SkipwiseError

_PREFIX = 512  # P
_ROWS = 512  # documents hashed at once; each maps 64 KiB or more


@dataclass(frozen=True, kw_only=True)
class PackedStore:
    """The short documents of a store in sequence, with a separator after each."""

    store: TokenStore
    starts: np.ndarray  # (m,) first token of each short document in the store
    begins: np.ndarray  # (m + 1,) first token of each short document here
    separator: int | None
    offsets: np.ndarray  # (num_documents + 1,) first token of each joined document here

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        return self.read(int(self.offsets[i]), int(self.offsets[i + 1]))

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) tokens; a copy. `ChatTokens` if the store has conversations."""
        indices = np.arange(start, stop)
        tokens = self._take(indices, self.store.tokens)
        if not self.store.chat:
            return tokens
        rows = np.searchsorted(self.begins, indices, "right") - 1
        return self.store.chat.attach(tokens, self.starts[rows] + indices - self.begins[rows])

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Tokens at indices of any shape; a copy, through a separate memory map."""
        return self._take(indices, self.store.fresh_memmap())

    def _take(self, indices: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        if not indices.size or not len(tokens):  # empty documents have only separators
            return np.full(indices.shape, self.separator or 0, tokens.dtype)
        # Search only among the few documents that are read.
        low = int(np.searchsorted(self.begins, indices.min(), "right")) - 1
        high = int(np.searchsorted(self.begins, indices.max(), "right")) + 1
        rows = low + np.searchsorted(self.begins[low:high], indices, "right") - 1
        source = self.starts[rows] + indices - self.begins[rows]
        if self.separator is None:
            return np.asarray(tokens[source])
        out = np.asarray(tokens[np.minimum(source, len(tokens) - 1)])
        out[indices == self.begins[rows + 1] - 1] = self.separator
        return out


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The documents of a run, as spans of the stores, in groups with a share of the examples."""

    stores: list[TokenStore | PackedStore]
    store_ids: list[np.ndarray]  # per group: (n,) which store
    starts: list[np.ndarray]  # per group: (n,) first token in the store
    lengths: list[np.ndarray]  # per group: (n,) L_x
    shares: list[float]  # of the examples; they sum to 1
    num_short: int  # documents that were too short, and so dropped or packed
    short_documents: str
    held_out: list[np.ndarray]  # token ids of the documents reserved for evaluation

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.lengths))

    @property
    def num_tokens(self) -> int:
        return int(sum(lengths.sum() for lengths in self.lengths))

    @property
    def longest(self) -> int:
        return max(int(lengths.max()) for lengths in self.lengths)

    def longer(self, min_length: int) -> Corpus | None:
        """The documents of at least that many tokens, or None. Sources keep their proportions."""
        rows = [np.flatnonzero(lengths >= min_length) for lengths in self.lengths]
        keep = [g for g, found in enumerate(rows) if len(found)]
        if not keep:
            return None
        total = sum(self.shares[g] for g in keep)
        return dataclasses.replace(
            self,
            store_ids=[self.store_ids[g][rows[g]] for g in keep],
            starts=[self.starts[g][rows[g]] for g in keep],
            lengths=[self.lengths[g][rows[g]] for g in keep],
            shares=[self.shares[g] / total for g in keep],
        )

    def document(self, group: int, row: int) -> np.ndarray:
        """(L_x,) tokens."""
        start = int(self.starts[group][row])
        store = self.stores[int(self.store_ids[group][row])]
        return store.read(start, start + int(self.lengths[group][row]))

    def count_copies(self, documents: list[np.ndarray]) -> int:
        """How many documents start with the first P tokens of one of these."""
        if not documents:
            return 0
        wanted = np.array([_hash_rows(_padded(tokens))[0] for tokens in documents])
        tables = zip(self.store_ids, self.starts, self.lengths, strict=True)
        return sum(int(np.isin(_prefix_hashes(self.stores, *t), wanted).sum()) for t in tables)


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

    Documents below `min_length` tokens are dropped, or packed: joined in order up to T tokens, with
    the `separator` token between them. `auto` packs conversations, with nothing between them: the
    chat template writes what begins and ends each. `num_held_out` documents of at least T tokens,
    those with the smallest hash of their first tokens, are held out for evaluation, and all
    documents with the same beginning are dropped. If there is only one document, its end is held
    out.

    Raises:
        SkipwiseError: no document is long enough; says how long they are.
    """
    if short_documents == "auto" and len({bool(store.chat) for store in stores}) == 1:
        short_documents = "pack" if stores[0].chat else "drop"
    groups = [[i] for i in range(len(stores))]
    if all(weight is None for weight in weights):
        groups, shares = [list(range(len(stores)))], [1.0]
    else:
        shares = [1.0 if weight is None else float(weight) for weight in weights]
    all_stores: list[TokenStore | PackedStore] = list(stores)
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
            packs = bool(store.chat) if short_documents == "auto" else short_documents == "pack"
            if packs and not long.all():
                between = None if store.chat.num_conversations == store.num_documents else separator
                packed = _pack(store, np.flatnonzero(~long), min_length, target_length, between)
                all_stores.append(packed)
                rows.append((len(all_stores) - 1, packed.offsets[:-1], np.diff(packed.offsets)))
        table.append(rows)
    ids = [[np.full(len(s), i, np.int32) for i, s, _ in rows] for rows in table]
    store_ids = [np.concatenate(of_group) for of_group in ids]
    starts = [np.concatenate([s for _, s, _ in rows]) for rows in table]
    lengths = [np.concatenate([n for _, _, n in rows]) for rows in table]
    held_out = []
    if num_held_out:
        held_out = _hold_out(all_stores, store_ids, starts, lengths, target_length, num_held_out)
    keep = [g for g in range(len(groups)) if len(lengths[g]) and shares[g] > 0]
    if not keep:
        raise SkipwiseError(_too_short(stores, min_length, short_documents))
    total = sum(shares[g] for g in keep)
    return Corpus(
        stores=all_stores,
        store_ids=[store_ids[g] for g in keep],
        starts=[starts[g] for g in keep],
        lengths=[lengths[g] for g in keep],
        shares=[shares[g] / total for g in keep],
        num_short=num_short,
        short_documents=short_documents,
        held_out=held_out,
    )


def _pack(
    store: TokenStore, short: np.ndarray, min_length: int, target_length: int, separator: int | None
) -> PackedStore:
    """Join short documents in order, up to T tokens; keep the rest if it is long enough."""
    sizes = np.diff(store.offsets)[short] + (separator is not None)
    begins = np.concatenate([[0], np.cumsum(sizes)])
    offsets = [0]
    while offsets[-1] < begins[-1]:  # one iteration per joined document
        end = int(np.searchsorted(begins, offsets[-1] + target_length))
        if end == len(begins) and begins[-1] - offsets[-1] < min_length:
            break
        offsets.append(int(begins[min(end, len(begins) - 1)]))
    return PackedStore(
        store=store,
        starts=np.asarray(store.offsets)[short],
        begins=begins,
        separator=separator,
        offsets=np.array(offsets, np.int64),
    )


def _hold_out(
    stores: list[TokenStore | PackedStore],
    store_ids: list[np.ndarray],
    starts: list[np.ndarray],
    lengths: list[np.ndarray],
    target_length: int,
    num_held_out: int,
) -> list[np.ndarray]:
    """Remove documents for evaluation from the tables, in place."""
    total = sum(map(len, lengths))
    long = [np.flatnonzero(n >= target_length) for n in lengths]
    if not sum(map(len, long)):
        return []

    def tokens(g: int, i: int) -> np.ndarray:
        start = int(starts[g][i])
        return stores[int(store_ids[g][i])].read(start, start + int(lengths[g][i]))

    if total < 2:  # a single document: hold out its end
        g = next(g for g in range(len(long)) if len(long[g]))
        tail = max(target_length, int(lengths[g][0]) // 20)
        if lengths[g][0] - tail < target_length:
            return []
        held = tokens(g, 0)[-tail:].copy()
        lengths[g] = lengths[g] - tail
        return [held]
    hashes = [_prefix_hashes(stores, *t) for t in zip(store_ids, starts, lengths, strict=True)]
    values, counts = np.unique(np.concatenate(hashes), return_counts=True)
    # Holding out a common beginning, such as a licence, would remove all its documents.
    rare = values[counts <= max(1, total // 20)]
    of_long = np.concatenate([h[rows] for h, rows in zip(hashes, long, strict=True)])
    chosen = np.intersect1d(of_long, rare)[: min(num_held_out, max(1, total // 20))]
    held_out: dict[int, np.ndarray] = {}
    for g, rows in enumerate(long):
        for i in rows[np.isin(hashes[g][rows], chosen)]:
            held_out.setdefault(int(hashes[g][i]), tokens(g, int(i)).copy())
    for g in range(len(lengths)):
        keep = ~np.isin(hashes[g], chosen)
        store_ids[g], starts[g], lengths[g] = store_ids[g][keep], starts[g][keep], lengths[g][keep]
    return [held_out[int(value)] for value in chosen]


def _prefix_hashes(
    stores: list[TokenStore | PackedStore],
    store_ids: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
    """(n,) uint64 hashes of the documents' first P tokens, or of all tokens if fewer."""
    out = np.empty(len(starts), np.uint64)
    steps = np.arange(_PREFIX)
    for i in np.unique(store_ids):
        of_store = np.flatnonzero(store_ids == i)
        for begin in range(0, len(of_store), _ROWS):
            rows = of_store[begin : begin + _ROWS]
            sizes = lengths[rows, None]
            indices = starts[rows, None] + np.minimum(steps, np.maximum(sizes - 1, 0))  # (rows, P)
            tokens = stores[int(i)].take(indices).astype(np.uint64)
            out[rows] = _hash_rows((tokens + np.uint64(1)) * (steps < sizes))
    return out


def _hash_rows(values: np.ndarray) -> np.ndarray:
    """(rows,) uint64 from (rows, P) uint64: sum of values times fixed odd numbers, mod 2^64."""
    factors = np.arange(1, _PREFIX + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        factors = (factors ^ (factors >> np.uint64(shift))) * np.uint64(factor)
    return values @ ((factors ^ (factors >> np.uint64(31))) | np.uint64(1))


def _padded(tokens: np.ndarray) -> np.ndarray:
    """(1, P) first tokens of a document plus 1, padded with zeros."""
    out = np.zeros((1, _PREFIX), np.uint64)
    first = np.asarray(tokens[:_PREFIX]).astype(np.uint64)
    out[0, : len(first)] = first + np.uint64(1)
    return out


def _too_short(stores: list[TokenStore], min_length: int, short_documents: str) -> str:
    lengths = np.concatenate([np.diff(store.offsets) for store in stores])
    if not len(lengths):
        return "the data contains no documents: see the records that could not be read"
    found = f"{len(lengths):,} documents, the longest of {lengths.max():,} tokens"
    found += f" (median {int(np.median(lengths)):,}, {lengths.sum():,} in total)"
    bad = sum(store.num_bad_records for store in stores)
    if bad:
        first = next((record for store in stores for record in store.bad_records), "")
        found += f"; {bad:,} records could not be read ({first})"
    fix = "give longer texts"
    if short_documents != "pack" and lengths.sum() >= min_length:
        fix += ", or join the short ones with data.short_documents=pack"
    return f"no document has the {min_length:,} tokens that an example needs: {found}\n{fix}"
