"""The documents of a run, as spans of the tokens in the token stores.

Tokens stay on disk. Short documents are joined when they are read. Documents are compared by hashes
of windows: of one document at every position, of the others every S tokens. So a shared passage of
W + S = 576 tokens is always found.

Memory: 20 bytes per document, 16 bytes per packed short document, and temporarily 50 more per
document and 40 per token of evaluation text while documents are held out or searched for.

Shapes:  n = documents, T = target_length, W = tokens of a window, S = stride of windows, K =
documents that the others are compared with
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from skipwise.data.token_cache import TokenStore
from skipwise.errors import SkipwiseError

_WINDOW = 64  # W
_STRIDE = 512  # S; down to W in documents under 8 S tokens, so that they have about 8 windows
_ROWS = 4096  # windows hashed at once
_TOKENS = 1 << 23  # most tokens that the others are compared with at once
_BEGIN = 512  # tokens
_NUM_HELD_OUT = 16  # documents for evaluation, if they are at most a fifth of all
_ROUNDS = 4  # passes over the text in search of documents to hold out


@dataclass(frozen=True, kw_only=True)
class PackedStore:
    """The short documents of a store in sequence, with the tokens `between` after each."""

    store: TokenStore
    starts: np.ndarray  # (m,) first token of each short document in the store
    begins: np.ndarray  # (m + 1,) first token of each short document here
    between: tuple[int, ...]  # (k,)
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
        if not indices.size:
            return np.zeros(indices.shape, tokens.dtype)
        # Search only among the few documents that are read.
        low = int(np.searchsorted(self.begins, indices.min(), "right")) - 1
        high = int(np.searchsorted(self.begins, indices.max(), "right")) + 1
        rows = low + np.searchsorted(self.begins[low:high], indices, "right") - 1
        source = self.starts[rows] + indices - self.begins[rows]
        if not self.between:
            return np.asarray(tokens[source])
        out = np.zeros(indices.shape, tokens.dtype)
        if len(tokens):  # else the documents are empty
            out = np.asarray(tokens[np.minimum(source, len(tokens) - 1)])
        left = self.begins[rows + 1] - indices  # 1 at the last token after a document
        after = left <= len(self.between)
        out[after] = np.asarray(self.between, tokens.dtype)[-left[after]]
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
    none_held_out: str = ""  # why there are none

    @property
    def num_documents(self) -> int:
        return sum(map(len, self.lengths))

    @property
    def num_tokens(self) -> int:
        return int(sum(lengths.sum() for lengths in self.lengths))

    @property
    def longest(self) -> int:
        return max(int(lengths.max()) for lengths in self.lengths)

    def largest_token(self) -> int:
        """The largest token id of the stores, which are read as a whole."""
        stores = [store.store if isinstance(store, PackedStore) else store for store in self.stores]
        return max((int(s.tokens.max()) for s in stores if len(s.tokens)), default=0)

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

    def count_leaks(self, documents: list[np.ndarray]) -> tuple[int, int, int]:
        """How many documents are one of these, share most of their text, or share a passage.

        The first share most of their text, and begin with the same 512 tokens.
        """
        columns = map(np.concatenate, (self.store_ids, self.starts, self.lengths))
        table = _Table(self.stores, *columns)
        found = table.overlaps(documents)
        copies = {int(row) for rows, _ in found for row in rows}
        others = {int(row) for _, rows in found for row in rows} - copies
        begins = {_begin(tokens) for tokens in documents}
        same = sum(_begin(table.read(row)) in begins for row in copies)
        return same, len(copies) - same, len(others)


def build_corpus(
    stores: list[TokenStore],
    weights: list[float | None],
    *,
    min_length: int,
    target_length: int,
    short_documents: str = "drop",
    between: tuple[int, ...] = (),
    num_held_out: float | Literal["auto"] = 0,
) -> Corpus:
    """Choose the documents that examples are cut from.

    Documents below `min_length` tokens are dropped, or packed: joined in order up to T tokens, with
    the tokens `between` after each. `auto` packs conversations, with nothing between them: the chat
    template writes what begins and ends each. `num_held_out` documents of at least T tokens (below
    1: this share; auto: 16, at most a fifth) are held out for evaluation, in an order by hashes.
    Documents that share a passage with them are dropped, unless many others have it, too, such as a
    licence. If there is only one document, its end is held out.

    Raises:
        SkipwiseError: no document is long enough; says how long they are. Fewer documents can be
            held out than asked for.
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
                joint = () if store.chat.num_conversations == store.num_documents else between
                packed = _pack(store, np.flatnonzero(~long), min_length, target_length, joint)
                all_stores.append(packed)
                rows.append((len(all_stores) - 1, packed.offsets[:-1], np.diff(packed.offsets)))
        table.append(rows)
    ids = [[np.full(len(s), i, np.int32) for i, s, _ in rows] for rows in table]
    parts = {
        "store_ids": [np.concatenate(of_group) for of_group in ids],
        "starts": [np.concatenate([s for _, s, _ in rows]) for rows in table],
        "lengths": [np.concatenate([n for _, _, n in rows]) for rows in table],
    }
    held_out, why = [], "data.held_out=0"
    if num_held_out and any(map(len, parts["lengths"])):
        whole = _Table(all_stores, **{f: np.concatenate(values) for f, values in parts.items()})
        held_out, keep, why = _hold_out(whole, target_length, num_held_out)
        ends = np.cumsum([len(n) for n in parts["lengths"]])[:-1]
        kept = np.split(keep, ends)
        for field in ("store_ids", "starts", "lengths"):
            values = np.split(getattr(whole, field), ends)
            parts[field] = [v[k] for v, k in zip(values, kept, strict=True)]
    lengths = parts["lengths"]
    keep = [g for g in range(len(groups)) if len(lengths[g]) and shares[g] > 0]
    if not keep:
        raise SkipwiseError(_too_short(stores, min_length, short_documents))
    total = sum(shares[g] for g in keep)
    return Corpus(
        stores=all_stores,
        **{field: [values[g] for g in keep] for field, values in parts.items()},
        shares=[shares[g] / total for g in keep],
        num_short=num_short,
        short_documents=short_documents,
        held_out=held_out,
        none_held_out="" if held_out else why,
    )


def _pack(
    store: TokenStore,
    short: np.ndarray,
    min_length: int,
    target_length: int,
    between: tuple[int, ...],
) -> PackedStore:
    """Join short documents in order, up to T tokens; keep the rest if it is long enough."""
    sizes = np.diff(store.offsets)[short] + len(between)
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
        between=between,
        offsets=np.array(offsets, np.int64),
    )


@dataclass
class _Table:
    """Documents as spans of the stores."""

    stores: list[TokenStore | PackedStore]
    store_ids: np.ndarray  # (n,)
    starts: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,) L_x

    def read(self, row: int) -> np.ndarray:
        start = int(self.starts[row])
        return self.stores[int(self.store_ids[row])].read(start, start + int(self.lengths[row]))

    def windows(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(rows, hashes) of windows every S tokens, and of the last W tokens of each document."""
        for i in np.unique(self.store_ids):
            of_store = np.flatnonzero(self.store_ids == i)
            sizes = self.lengths[of_store]
            strides, lasts = _strides(sizes), np.maximum(sizes - _WINDOW, 0)
            ends = np.cumsum(_num_windows(sizes))
            for begin in range(0, int(ends[-1]), _ROWS):
                numbers = np.arange(begin, min(begin + _ROWS, int(ends[-1])))
                which = np.searchsorted(ends, numbers, "right")
                counts = numbers - (ends[which] - _num_windows(sizes[which]))
                places = np.minimum(counts * strides[which], lasts[which])
                rows = of_store[which]
                yield rows, self._hash(int(i), self.starts[rows] + places, sizes[which])

    def middle_hashes(self, rows: np.ndarray) -> np.ndarray:
        """(len(rows),) hashes of a window in the middle of each document."""
        out = np.zeros(len(rows), np.uint64)
        for i in np.unique(self.store_ids[rows]):
            of_store = np.flatnonzero(self.store_ids[rows] == i)
            for begin in range(0, len(of_store), _ROWS):
                some = of_store[begin : begin + _ROWS]
                places = self.starts[rows[some]] + self.lengths[rows[some]] // 2
                rest = self.lengths[rows[some]] - self.lengths[rows[some]] // 2
                out[some] = self._hash(int(i), places, rest)
        return out

    def overlaps(self, documents: list[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Per document, the rows that share most of their or its text, and a passage with it.

        A passage that more than a hundredth of all documents have does not count: a licence.
        """
        none = np.zeros(0, np.int64)
        if not documents or not len(self.lengths):
            return [(none, none) for _ in documents]
        half = len(documents) // 2
        if half and sum(map(len, documents)) > _TOKENS:
            return self.overlaps(documents[:half]) + self.overlaps(documents[half:])
        hashes, owners, bins = _index(documents)
        found = [(none, none)]  # (rows, entries of the index)
        for rows, of_rows in self.windows():
            low = np.searchsorted(hashes, of_rows, "left")
            counts = np.searchsorted(hashes, of_rows, "right") - low
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            found.append((np.repeat(rows, counts), np.repeat(low, counts) + within))
        rows, entries = (np.concatenate(parts) for parts in zip(*found, strict=True))
        owner, n = owners[entries], len(self.lengths)
        pairs, of_pair, shared = np.unique(
            owner * n + rows, return_inverse=True, return_counts=True
        )
        sizes = self.lengths[pairs % n]
        whole = np.array([len(tokens) for tokens in documents])[pairs // n]
        is_copy = (2 * shared > _num_windows(sizes)) | (2 * shared * _strides(sizes) >= whole)
        # A passage is common if its bin of S positions, or one beside it, occurs in many documents.
        seen = np.unique(np.stack([bins[entries], rows])[:, ~is_copy[of_pair]], axis=1)
        common = np.bincount(seen[0], minlength=bins.max() + 2) > max(1, n // 100)
        common[1:-1] |= common[2:] | common[:-2]
        is_rare = np.zeros(len(pairs), bool)
        is_rare[of_pair[~common[bins[entries]]]] = True
        kinds = (is_copy, is_rare & ~is_copy)
        return [
            tuple(pairs[kind & (pairs // n == i)] % n for kind in kinds)  # type: ignore[misc]
            for i in range(len(documents))
        ]

    def _hash(self, store: int, begins: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        steps = np.arange(_WINDOW)
        left = np.minimum(sizes, _WINDOW)[:, None]
        indices = begins[:, None] + np.minimum(steps, np.maximum(left - 1, 0))  # (rows, W)
        tokens = self.stores[store].take(indices).astype(np.uint64)
        return ((tokens + np.uint64(1)) * (steps < left)) @ _factors()


def _hold_out(
    table: _Table, target_length: int, wanted: float | Literal["auto"]
) -> tuple[list[np.ndarray], np.ndarray, str]:
    """(documents for evaluation, (n,) which rows are still trained on, why there are none).

    The end of a single document is taken off its length.
    """
    n, T = len(table.lengths), target_length
    keep = np.ones(n, bool)
    long = np.flatnonzero(table.lengths >= T)
    if n == 1:
        share = wanted if wanted != "auto" and wanted < 1 else 0.05
        size = int(table.lengths[0])
        tail = max(T, int(size * share))
        if size - tail < T:
            return [], keep, f"the only document has fewer than {2 * T:,} tokens"
        end = table.read(0)[-tail:].copy()
        table.lengths[0] -= tail
        return [end], keep, ""
    if not len(long):
        return [], keep, f"no document has {T:,} tokens"
    count = max(1, math.ceil(wanted * n) if wanted < 1 else int(wanted)) if wanted != "auto" else 0
    count = count or min(_NUM_HELD_OUT, max(1, n // 5))
    held_out: list[np.ndarray] = []
    candidates = long[np.argsort(table.middle_hashes(long), kind="stable")]
    for _ in range(_ROUNDS):
        missing = count - len(held_out)
        sizes = np.cumsum(table.lengths[candidates[: 2 * missing + 8]])
        size = max(1, int(np.searchsorted(sizes, _TOKENS)))
        tried, candidates = candidates[:size], candidates[size:]
        if not missing or not len(tried):
            break
        overlaps = table.overlaps([table.read(int(row)) for row in tried])
        found = zip(tried, overlaps, strict=True)
        for row, (copies, others) in sorted(found, key=lambda one: len(one[1][0]) + len(one[1][1])):
            if not keep[row] or len(held_out) == count:
                continue
            dropped = np.union1d(copies, others)
            # Evaluation text and what overlaps it must leave most documents to train on.
            most = n - 1 if wanted != "auto" else n // 5 if held_out else n // 2
            if int((~keep).sum()) + int(keep[dropped].sum()) > most:
                candidates = candidates[~np.isin(candidates, copies)]
                continue
            held_out.append(table.read(int(row)).copy())
            keep[dropped] = False
    alike = (
        f"{len(long):,} documents of at least {T:,} tokens begin alike or share most of their text"
    )
    if wanted != "auto" and len(held_out) < count:
        raise SkipwiseError(
            f"data.held_out={wanted:g} means {count:,} documents, and only {len(held_out):,} can "
            f"be held out:\nthey need {T:,} tokens each, and others must be "
            "left to train on\ntype a smaller data.held_out, or give data.eval_sources"
        )
    return held_out, keep, "" if held_out else alike


def _index(documents: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows at every position: their sorted hashes, documents, and bins of S positions.

    A window that a document repeats is listed once. A gap of 2 separates the bins of documents.
    """
    hashes, owners, bins, first_bin = [], [], [], 1
    for i, tokens in enumerate(documents):
        padded = np.zeros(max(len(tokens), _WINDOW), np.uint64)
        padded[: len(tokens)] = np.asarray(tokens).astype(np.uint64) + np.uint64(1)
        views = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)
        hashes.append(views @ _factors())
        owners.append(np.full(len(views), i))
        bins.append(first_bin + np.arange(len(views)) // _STRIDE)
        first_bin = int(bins[-1][-1]) + 3
    values, whose, where = map(np.concatenate, (hashes, owners, bins))
    order = np.lexsort((whose, values))
    values, whose, where = values[order], whose[order], where[order]
    is_new = np.ones(len(values), bool)
    is_new[1:] = (values[1:] != values[:-1]) | (whose[1:] != whose[:-1])
    return values[is_new], whose[is_new], where[is_new]


def _begin(tokens: np.ndarray) -> bytes:
    return np.asarray(tokens[:_BEGIN], np.uint32).tobytes()


def _strides(lengths: np.ndarray) -> np.ndarray:
    return np.clip(lengths // 8, _WINDOW, _STRIDE)


def _num_windows(lengths: np.ndarray) -> np.ndarray:
    return 1 - np.minimum(_WINDOW - lengths, 0) // _strides(lengths)


def _factors() -> np.ndarray:
    """(W,) uint64: fixed odd numbers; a hash is the sum of tokens times these, mod 2^64."""
    factors = np.arange(1, _WINDOW + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        factors = (factors ^ (factors >> np.uint64(shift))) * np.uint64(factor)
    return (factors ^ (factors >> np.uint64(31))) | np.uint64(1)


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
