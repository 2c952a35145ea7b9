"""LongPPL and gain by context: perplexity of the targets that need context, and what it gains.

A fixed evaluator e reads the targets i of perplexity with a short and with a long context. Its
choice is the same for every model m that is measured:

    key tokens    K = {i : e_short(i) - e_long(i) > 2 nats  and  e_long(i) < 2 nats}
    LongPPL       exp(mean of m_T(i) over K), at the longest context length T
    gain at c     (mean e_short - mean m_c) / (mean e_short - mean e_long), over all targets

A gain of 0 is the evaluator's loss with the short context, 1 its loss with the long one; below 0
the model is worse than the former, above 1 better than the latter. The evaluator is the base, whose
contexts are L / 8 and L, or a model that the user names, whose contexts are L and T.

Source:  LongPPL, Fang et al. 2025, arXiv 2410.23771, section 3: both thresholds, and 8 times from
         the short (4k) to the long context (32k). The gain is ours.
Shapes:  W = windows, S = targets of a window
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from skipwise.report.intervals import clustered_mean
from skipwise.report.rows import Row

GAIN, LOSS = 2.0, 2.0  # nats; the thresholds of key tokens
RATIO = 8  # of the base's window to its short context
FEWEST_KEY_TOKENS = 30


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the evaluator found on the targets of a perplexity."""

    evaluator: str
    contexts: tuple[int, int]  # short, long
    key: np.ndarray  # (W, S) bool
    short: np.ndarray  # (W,) sum of its loss over each window's labels, in nats
    long: np.ndarray

    def row(self) -> Row:
        """The keys of a row that tell what was chosen, and by whom."""
        digest = hashlib.sha1(self.key.tobytes(), usedforsecurity=False).hexdigest()
        return {
            "evaluator": self.evaluator,
            "evaluator_contexts": list(self.contexts),
            "key_tokens": digest[:12],
        }

    def to_json(self) -> dict[str, Any]:
        def known(losses: np.ndarray) -> list[float | None]:  # JSON holds no NaN
            return [float(x) if math.isfinite(x) else None for x in losses]

        return {
            "evaluator": self.evaluator,
            "contexts": list(self.contexts),
            "shape": list(self.key.shape),
            "key": np.flatnonzero(self.key).tolist(),
            "short": known(self.short),
            "long": known(self.long),
        }

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.short).all() and np.isfinite(self.long).all())

    @staticmethod
    def from_json(found: dict[str, Any]) -> Reference:
        key = np.zeros(math.prod(found["shape"]), bool)
        key[found["key"]] = True
        return Reference(
            evaluator=found["evaluator"],
            contexts=tuple(found["contexts"]),
            key=key.reshape(found["shape"]),
            short=np.array(found["short"], float),
            long=np.array(found["long"], float),
        )


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """The model that chooses the key tokens, and what it chose before."""

    name: str  # shown: `the base`, or the name that the user gave
    load: Callable[[], Any]
    weights: Any  # JSON that changes when they do
    vocabulary: str  # its `vocabulary`: it reads the model's own token ids
    original_length: int | None  # L; None where no run says it
    is_base: bool = False
    chosen: dict[str, Any] = field(default_factory=dict)  # key -> JSON of a Reference
    save: Callable[[dict[str, Any]], None] | None = None

    def contexts(self, longest: int, shortest: int) -> tuple[int, int] | None:
        """Its short and its long context; None where there is no room for both.

        Args:
            longest, shortest: of the context lengths measured.
        """
        if self.is_base:
            long = min(longest, self.original_length or longest)
            short = long // RATIO
        else:
            short, long = self.original_length or shortest, longest
        return (short, long) if 1 < short < long else None

    def key(self, lengths: tuple[int, ...]) -> list[Any]:
        """Everything about the evaluator that decides what it chooses."""
        contexts = self.contexts(lengths[-1], lengths[0])
        return [self.weights, contexts, GAIN, LOSS, FEWEST_KEY_TOKENS] if contexts else []

    def find(self, key: list[Any], choose: Callable[[], Reference]) -> Reference:
        """The choice made before under this key, or a new one, which is saved."""
        encoded = json.dumps(key, default=str).encode()
        digest = hashlib.sha1(encoded, usedforsecurity=False).hexdigest()[:12]
        if digest not in self.chosen:
            self.chosen[digest] = choose().to_json()
            if self.save is not None:
                self.save(self.chosen)
        return Reference.from_json(self.chosen[digest])


def vocabulary(tokenizer: Any) -> str:
    """A hash of which token each id is, special tokens apart: those differ among siblings."""
    added = set(tokenizer.get_added_vocab())
    tokens = sorted(item for item in tokenizer.get_vocab().items() if item[0] not in added)
    return hashlib.sha1(json.dumps(tokens).encode(), usedforsecurity=False).hexdigest()


def choose_key_tokens(short: np.ndarray, long: np.ndarray, counted: np.ndarray) -> np.ndarray:
    """(W, S) bool, from the evaluator's losses with both contexts.

    Args:
        short, long: (W, S) nats.
        counted: (W, S) whether it is a target; those of a user's turn are not.
    """
    return counted & (short - long > GAIN) & (long < LOSS)


def long_ppl_row(losses: np.ndarray, reference: Reference, owners: np.ndarray) -> Row:
    """The row of LongPPL; without a value where there are too few key tokens.

    Args:
        losses: (W, S) nats of the model with the longest context.
        owners: (W,) the document of each window.
    """
    counts = reference.key.sum(1)
    total = int(counts.sum())
    row: Row = {"metric": "long_ppl", "num_samples": total, **reference.row()}
    if total < FEWEST_KEY_TOKENS:
        return {**_empty(row), "reason": f"too few: {total} key tokens"}
    sums = np.where(reference.key, losses, 0.0).sum(1)
    mean = sums.sum() / total
    values = mean + (sums - mean * counts) / counts.mean()  # windows have unequal counts
    bounds = [exp_loss(x) for x in clustered_mean(values, owners)]
    return {**row, **known_bounds(bounds), **samples_of(values, owners), "is_share": False}


def gain_row(sums: np.ndarray, num_samples: int, reference: Reference, owners: np.ndarray) -> Row:
    """The row of the gain at a context length, with its interval over documents.

    It has no value where the evaluator's own gain is not above 0 beyond its interval.

    Args:
        sums: (W,) the model's loss over each window's labels, in nats.
    """
    row: Row = {"metric": "context_gain", "num_samples": num_samples, **reference.row()}
    possible = reference.short - reference.long
    low = clustered_mean(possible, owners)[1]
    if not low > 0:
        return {**_empty(row), "reason": "the evaluator gains nothing beyond error"}
    share = (reference.short - sums).sum() / possible.sum()
    residuals = (reference.short - sums - share * possible) / possible.mean()  # of a ratio
    values = share + residuals
    bounds = list(clustered_mean(values, owners))
    shown = {"higher_is_better": True, "is_share": False}
    return {**row, **known_bounds(bounds), **samples_of(values, owners), **shown}


def _empty(row: Row) -> Row:
    shown = {"is_share": False, "higher_is_better": row["metric"] == "context_gain"}
    return {**row, "value": None, "low": None, "high": None, **shown}


def known_bounds(bounds: list[float]) -> Row:
    """Value, low and high as JSON holds them; no interval unless it is known on both sides."""
    value, low, high = (x if math.isfinite(x) else None for x in bounds)
    return {"value": value, "low": low if high is not None else None, "high": high}


def samples_of(values: np.ndarray, owners: np.ndarray) -> Row:
    finite = bool(np.isfinite(values).all())
    return {"samples": values.round(5).tolist(), "documents": owners.tolist()} if finite else {}


def exp_loss(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
