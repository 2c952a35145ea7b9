"""Questions with known answers, put to a model: prompts, sharing, greedy decoding, scoring.

Prompts of one haystack are mostly the same: what they share with the last of them goes through the
model once, and each goes on from there. Batches hold as many rows as the length
allows, and only the positions of the answer get logits.

Shapes:  B = batch, S = tokens, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skipwise.evaluation.prefill import (
    batch_repeat,
    crop,
    logits_at,
    logits_in_slices,
    new_cache,
    next_logits,
    prefill,
    reading,
)

_WORTH = 64  # tokens; a shorter prefix is not worth a cache
_TOGETHER = 32  # tokens of prefix that a row may give up to stand in a batch with others

Tick = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A prompt and what should follow it."""

    input_ids: list[int]  # prompt and, for an exact answer, the answer
    num_answer: int = 0  # tokens of the exact answer, at the end of input_ids
    answers: tuple[str, ...] = ()  # else: words to be found in what the model says
    max_new_tokens: int = 0
    depth: float | None = None  # where the needle is, 0 .. 1
    haystack: int = 0  # trials of one haystack share its tokens

    @property
    def prompt(self) -> list[int]:
        return self.input_ids[: len(self.input_ids) - self.num_answer]

    @property
    def reach(self) -> int:
        """Tokens of the window that the trial needs."""
        return len(self.input_ids) + self.max_new_tokens


@torch.inference_mode()
def exact_match(
    model: Any, trials: Sequence[Trial], batch_tokens: int, tick: Tick | None = None
) -> list[bool]:
    """Whether greedy decoding would give exactly each trial's answer.

    In one forward pass over prompt and answer, every answer token is the likeliest after those
    before it.
    """
    right: dict[int, bool] = {}
    for indices, rests, cache in _batches(model, trials, batch_tokens, lambda t: t.input_ids[:-1]):
        batch = [trials[i] for i in indices]
        width = max(map(len, rests))
        # padding comes after everything that is read, so a causal model does not see it
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rests], device=model.device)
        first = min(len(r) - t.num_answer for r, t in zip(rests, batch, strict=True))
        positions = torch.arange(first, width)
        parts = logits_in_slices(model, ids, positions, past=cache)
        likeliest = torch.cat([part.argmax(-1) for part in parts], 1).cpu()
        for i, row, rest, trial in zip(indices, likeliest.tolist(), rests, batch, strict=True):
            at = len(rest) - trial.num_answer - first
            said = row[at : at + trial.num_answer]
            right[i] = said == trial.input_ids[len(trial.input_ids) - trial.num_answer :]
        if tick is not None:
            tick(sum(trial.reach for trial in batch))
    return [right[i] for i in range(len(trials))]


@torch.inference_mode()
def recall(
    model: Any, tokenizer: Any, trials: Sequence[Trial], batch_tokens: int, tick: Tick | None = None
) -> list[float]:
    """The share of each trial's answers that the model says, by greedy decoding.

    Case does not count; a row stops when all its answers were said.
    """
    shares: dict[int, float] = {}
    for indices, rests, cache in _batches(model, trials, batch_tokens, lambda t: t.input_ids):
        batch = [trials[i] for i in indices]

        def done(row: int, tokens: list[int], batch: list[Trial] = batch) -> bool:
            return _share(tokenizer, tokens, batch[row].answers) == 1

        most = [trial.max_new_tokens for trial in batch]
        said = _greedy(model, rests, most, end_tokens(model, tokenizer), cache, done)
        for i, tokens, trial in zip(indices, said, batch, strict=True):
            shares[i] = _share(tokenizer, tokens, trial.answers)
        if tick is not None:
            tick(sum(trial.reach for trial in batch))
    return [shares[i] for i in range(len(trials))]


@torch.inference_mode()
def greedy(
    model: Any, tokenizer: Any, trials: Sequence[Trial], batch_tokens: int
) -> list[list[int]]:
    """What the model says after each prompt, token by token as `generate(do_sample=False)`.

    As that is without the penalties and minimal lengths that a generation_config may hold.
    """
    out: dict[int, list[int]] = {}
    for indices, rests, cache in _batches(model, trials, batch_tokens, lambda t: t.input_ids):
        most = [trials[i].max_new_tokens for i in indices]
        said = _greedy(model, rests, most, end_tokens(model, tokenizer), cache)
        out.update(zip(indices, said, strict=True))
    return [out[i] for i in range(len(trials))]


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer, as `generate` takes them."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def _batches(
    model: Any, trials: Sequence[Trial], batch_tokens: int, fed: Callable[[Trial], list[int]]
) -> Iterator[tuple[list[int], list[list[int]], Any]]:
    """(indices of trials, their tokens after the shared prefix, the prefix's cache)."""
    haystacks: dict[int, list[int]] = {}
    for i, trial in enumerate(trials):
        haystacks.setdefault(trial.haystack, []).append(i)
    for members in haystacks.values():
        for indices, rests, cache in _batches_of_one(
            model, [trials[i] for i in members], batch_tokens, fed
        ):
            yield [members[i] for i in indices], rests, cache


def _batches_of_one(
    model: Any, trials: Sequence[Trial], batch_tokens: int, fed: Callable[[Trial], list[int]]
) -> Iterator[tuple[list[int], list[list[int]], Any]]:
    """The same for trials of one haystack.

    The prefix is what a trial shares with the last one: haystacks are the same up to the needle,
    so trials should come by its depth. It grows from batch to batch and is computed once.
    """
    ways = reading(model)
    rows = [fed(trial) for trial in trials]
    shared = _shared(rows, rows[-1], [len(t.prompt) - 1 for t in trials])
    room = max(trial.reach for trial in trials)
    base = new_cache(model, room)
    if not ways.pieces or sum(n >= _WORTH for n in shared) < 2:
        shared = [0] * len(trials)
    order = sorted(range(len(trials)), key=lambda i: (shared[i], len(rows[i])))
    for indices in _grouped(order, shared, rows, trials, batch_tokens, ways.padding):
        prefix = min(shared[i] for i in indices)
        rests = [rows[i][prefix:] for i in indices]
        if not prefix:
            yield indices, rests, None
            continue
        have = base.num_tokens
        more = torch.tensor([rows[-1][have:prefix]], device=model.device)
        if more.shape[1]:
            prefill(model, more, base)
        yield indices, rests, batch_repeat(base, len(indices))
        crop(base, prefix)


def _shared(rows: list[list[int]], last: list[int], most: list[int]) -> list[int]:
    """How many first tokens of each row are those of the last one, at most so many."""
    want = np.array(last)
    out = []
    for row, limit in zip(rows, most, strict=True):
        have = np.array(row[: len(want)])
        other = np.flatnonzero(have != want[: len(have)])
        out.append(min(int(other[0]) if len(other) else len(have), limit))
    return out


def _grouped(
    order: list[int],
    shared: list[int],
    rows: list[list[int]],
    trials: Sequence[Trial],
    batch_tokens: int,
    padded: bool,
) -> Iterator[list[int]]:
    """Trials in batches: near in their prefix, and of one length where padding is not possible."""
    group: list[int] = []
    longest = 0
    for i in order:
        reach = max(longest, trials[i].reach)
        if group and (
            (len(group) + 1) * reach > batch_tokens
            or shared[i] - shared[group[0]] > _TOGETHER
            or (not padded and len(rows[i]) != len(rows[group[0]]))
        ):
            yield group
            group, reach = [], trials[i].reach
        group.append(i)
        longest = reach
    yield group


def _greedy(
    model: Any,
    rests: list[list[int]],
    most: list[int],
    ends: set[int],
    past: Any,
    done: Callable[[int, list[int]], bool] | None = None,
) -> list[list[int]]:
    """Greedy continuations of rows that stand behind the same cache.

    Rows are padded on the right; the padding is masked, and positions go on from each row's own
    length.
    """
    if not reading(model).steps:
        return _greedy_anew(model, rests, most, ends, done)
    device = model.device
    lengths = torch.tensor([len(r) for r in rests], device=device)
    width = int(lengths.max())
    before = past.num_tokens if past is not None else 0
    past = past if past is not None else new_cache(model, width + max(most))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rests], device=device)
    first = int(lengths.min()) - 1
    logits = logits_at(model, ids, torch.arange(first, width), past=past)
    tokens = logits[torch.arange(len(rests), device=device), lengths - 1 - first].argmax(-1)
    mask = torch.ones(len(rests), before + width + max(most), dtype=torch.long, device=device)
    slots = torch.arange(before, before + width, device=device)
    mask[:, before : before + width] = (slots < before + lengths[:, None]).long()
    last = torch.tensor([max(0, n - 1) for n in most], device=device)
    said: list[list[int]] = [[] for _ in rests]
    open_rows = [n > 0 for n in most]
    for step in range(max(most)):
        for row, token in enumerate(tokens.tolist()):
            if open_rows[row]:
                said[row].append(token)
                full = len(said[row]) >= most[row] or token in ends
                open_rows[row] = not full and not (done is not None and done(row, said[row]))
        if not any(open_rows):
            break
        seen = mask[:, : before + width + step + 1]
        # a row that has ended waits for the others where it is: positions may end, as GPT-2's do
        positions = (before + lengths + torch.clamp(last, max=step))[:, None]
        tokens = next_logits(model, tokens[:, None], positions, seen, past).argmax(-1)
    return said


def _greedy_anew(
    model: Any,
    rows: list[list[int]],
    most: list[int],
    ends: set[int],
    done: Callable[[int, list[int]], bool] | None,
) -> list[list[int]]:
    """The same without a cache, for models that cannot go on from one: a pass for each token."""
    said: list[list[int]] = [[] for _ in rows]
    for row, prompt in enumerate(rows):
        while len(said[row]) < most[row]:
            ids = torch.tensor([prompt + said[row]], device=model.device)
            last = torch.tensor([ids.shape[1] - 1])
            said[row].append(int(logits_at(model, ids, last)[0, -1].argmax()))
            if said[row][-1] in ends or (done is not None and done(row, said[row])):
                break
    return said


def _share(tokenizer: Any, tokens: list[int], answers: tuple[str, ...]) -> float:
    text = tokenizer.decode(tokens, skip_special_tokens=True).lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)
