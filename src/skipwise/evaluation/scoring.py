"""Scoring of questions with known answers: shared prefixes, greedy decoding, batches.

Prompts of one haystack are mostly the same: the prefix that they share with the last one is
computed once, and each continues from that cache. Batches hold as many rows as the length allows,
and logits are computed only for the positions of the answer.

Shapes:  B = batch, S = tokens, V = vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from skipwise.evaluation import prefill, processes

_MIN_PREFIX = 64  # tokens; a shorter prefix is not worth a cache
_PREFIX_SLACK = 32  # prefix tokens that a row may give up to join a batch

Tick = Callable[[int], object]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A prompt and what should follow it."""

    input_ids: list[int]  # prompt and, for an exact answer, the answer
    num_answer: int = 0  # tokens of the exact answer, at the end of input_ids
    answers: tuple[str, ...] = ()  # else: strings to find in the generated text
    max_new_tokens: int = 0
    depth: float | None = None  # where the needle is, 0 .. 1
    haystack: int = 0  # trials of one haystack share its tokens

    @classmethod
    def of_answer(
        cls, prompt: list[int], full: list[int], depth: float | None = None, haystack: int = 0
    ) -> Trial:
        """Of an exact answer: the tokens without it and with it."""
        depth = None if depth is None else round(depth, 3)
        num = len(full) - len(prompt)
        return cls(input_ids=full, num_answer=num, depth=depth, haystack=haystack)

    @property
    def prompt(self) -> list[int]:
        return self.input_ids[: len(self.input_ids) - self.num_answer]

    @property
    def reach(self) -> int:
        """Tokens of context that the trial needs."""
        return len(self.input_ids) + self.max_new_tokens


def exact_match(
    model: Any,
    trials: Sequence[Trial],
    batch_tokens: int,
    tick: Tick | None = None,
    among: Sequence[int] | None = None,
) -> list[bool]:
    """Whether greedy decoding would give exactly each trial's answer.

    This takes one forward pass over prompt and answer: each answer token must be the likeliest one
    after the tokens before it.

    Args:
        among: only these tokens can be an answer, and the likeliest must be likelier than the
            others. Defaults to all.
    """
    tokens = answer_tokens(model, trials, batch_tokens, tick, among)
    return [all(hit for hit, _ in answer) for answer in tokens]


def answer_tokens(
    model: Any,
    trials: Sequence[Trial],
    batch_tokens: int,
    tick: Tick | None = None,
    among: Sequence[int] | None = None,
) -> list[list[tuple[bool, float]]]:
    """Of each token of each trial's answer, after the tokens before it, in one forward pass.

    Args:
        among: see `exact_match`.

    Returns:
        whether it is the likeliest token, and its log-probability in nats.
    """

    def measure(own: Sequence[Trial]) -> list[list[tuple[bool, float]]]:
        return _answer_tokens(model, own, batch_tokens, tick, among)

    return processes.shared(trials, measure, [trial.haystack for trial in trials])


@torch.inference_mode()
def _answer_tokens(
    model: Any,
    trials: Sequence[Trial],
    batch_tokens: int,
    tick: Tick | None,
    among: Sequence[int] | None,
) -> list[list[tuple[bool, float]]]:
    out: dict[int, list[tuple[bool, float]]] = {}
    batches = _batches(model, trials, batch_tokens, lambda trial: trial.input_ids[:-1])
    for indices, suffixes, cache in batches:
        batch = [trials[i] for i in indices]
        width = max(map(len, suffixes))
        # padding comes last, so a causal model does not see it
        rows = [
            [*r, t.input_ids[-1], *[0] * (width - len(r))]
            for r, t in zip(suffixes, batch, strict=True)
        ]
        ids = torch.tensor(rows, device=model.device)
        first = min(len(r) - t.num_answer for r, t in zip(suffixes, batch, strict=True))
        targets, positions = ids[:, first + 1 :], torch.arange(first, width)
        hits, logs, done = [], [], 0
        for part in prefill.logits_in_slices(model, ids[:, :-1], positions, past=cache):
            wanted = targets[:, done : done + part.shape[1]]
            done += part.shape[1]
            hits.append(_likeliest(part, among) == wanted)
            chosen = part.gather(-1, wanted[..., None])[..., 0].float()
            logs.append(chosen - part.float().logsumexp(-1))
        pairs = zip(torch.cat(hits, 1).tolist(), torch.cat(logs, 1).tolist(), strict=True)
        for i, (hit, log), suffix, trial in zip(indices, pairs, suffixes, batch, strict=True):
            span = slice(len(suffix) - trial.num_answer - first, len(suffix) - first)
            out[i] = list(zip(hit[span], log[span], strict=True))
        if tick is not None:
            tick(sum(trial.reach for trial in batch))
    return [out[i] for i in range(len(trials))]


def _likeliest(logits: torch.Tensor, among: Sequence[int] | None) -> torch.Tensor:
    """The token of the highest logit; of some tokens alone, -1 where several have it."""
    if among is None:
        return logits.argmax(-1)
    allowed = torch.tensor(among, device=logits.device)
    values, indices = logits[..., allowed].topk(2)
    return torch.where(values[..., 0] > values[..., 1], allowed[indices[..., 0]], -1)


def recall(
    model: Any, tokenizer: Any, trials: Sequence[Trial], batch_tokens: int, tick: Tick | None = None
) -> list[float]:
    """The share of each trial's answers that greedy decoding generates.

    Case is ignored; a row stops as soon as it has all its answers.
    """

    def share(trial: Trial, tokens: list[int]) -> float:
        text = tokenizer.decode(tokens, skip_special_tokens=True).lower()
        return sum(answer.lower() in text for answer in trial.answers) / len(trial.answers)

    def done(trial: Trial, tokens: list[int]) -> bool:
        return share(trial, tokens) == 1

    generated = greedy(model, tokenizer, trials, batch_tokens, tick, done)
    return [share(trial, tokens) for trial, tokens in zip(trials, generated, strict=True)]


def answer_texts(
    model: Any, tokenizer: Any, trials: Sequence[Trial], batch_tokens: int, tick: Tick | None = None
) -> list[str]:
    """The text that greedy decoding generates after each prompt, up to a blank line."""

    def text(tokens: list[int]) -> str:
        return tokenizer.decode(tokens, skip_special_tokens=True).lstrip()

    def done(trial: Trial, tokens: list[int]) -> bool:
        return "\n\n" in text(tokens)

    generated = greedy(model, tokenizer, trials, batch_tokens, tick, done)
    return [text(tokens).partition("\n\n")[0].rstrip() for tokens in generated]


@torch.inference_mode()
def greedy(
    model: Any,
    tokenizer: Any,
    trials: Sequence[Trial],
    batch_tokens: int,
    tick: Tick | None = None,
    done: Callable[[Trial, list[int]], bool] = lambda trial, tokens: False,
) -> list[list[int]]:
    """The tokens that `generate(do_sample=False)` generates after each prompt.

    Penalties and minimal lengths of a generation_config are ignored. `done` ends a row early.
    """
    stop_ids = end_tokens(model, tokenizer)

    def measure(own: Sequence[Trial]) -> list[list[int]]:
        out: dict[int, list[int]] = {}
        for indices, suffixes, cache in _batches(model, own, batch_tokens, lambda t: t.input_ids):
            batch = [own[i] for i in indices]
            generated = _greedy(model, suffixes, batch, stop_ids, cache, done)
            out.update(zip(indices, generated, strict=True))
            if tick is not None:
                tick(sum(trial.reach for trial in batch))
        return [out[i] for i in range(len(own))]

    return processes.shared(trials, measure, [trial.haystack for trial in trials])


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """End-of-sequence tokens, found as `generate` finds them."""
    settings = getattr(model, "generation_config", None)
    stop_ids = getattr(settings, "eos_token_id", None)
    stop_ids = tokenizer.eos_token_id if stop_ids is None else stop_ids
    return set(stop_ids if isinstance(stop_ids, list) else [stop_ids]) - {None}


def _batches(
    model: Any, trials: Sequence[Trial], batch_tokens: int, input_of: Callable[[Trial], list[int]]
) -> Iterator[tuple[list[int], list[list[int]], Any]]:
    """(indices of trials, their tokens after the shared prefix, the cache of the prefix)."""
    haystacks: dict[int, list[int]] = {}
    for i, trial in enumerate(trials):
        haystacks.setdefault(trial.haystack, []).append(i)
    for members in haystacks.values():
        for indices, suffixes, cache in _batches_of_one(
            model, [trials[i] for i in members], batch_tokens, input_of
        ):
            yield [members[i] for i in indices], suffixes, cache


def _batches_of_one(
    model: Any, trials: Sequence[Trial], batch_tokens: int, input_of: Callable[[Trial], list[int]]
) -> Iterator[tuple[list[int], list[list[int]], Any]]:
    """The same for trials of one haystack.

    The prefix is what a trial shares with the last one. Haystacks are the same up to the needle, so
    trials should be in order of its depth: the prefix grows from batch to batch, computed once.
    """
    ways = prefill.reading(model)
    rows = [input_of(trial) for trial in trials]
    shared = _shared(rows, rows[-1], [len(t.prompt) - 1 for t in trials])
    room = max(trial.reach for trial in trials)
    base = prefill.new_cache(model, room)
    if not ways.pieces or sum(n >= _MIN_PREFIX for n in shared) < 2:
        shared = [0] * len(trials)
    order = sorted(range(len(trials)), key=lambda i: (shared[i], len(rows[i])))
    for indices in _grouped(order, shared, rows, trials, batch_tokens, ways.padding):
        prefix = min(shared[i] for i in indices)
        suffixes = [rows[i][prefix:] for i in indices]
        if not prefix:
            yield indices, suffixes, None
            continue
        have = base.num_tokens
        more = torch.tensor([rows[-1][have:prefix]], device=model.device)
        if more.shape[1]:
            prefill.prefill(model, more, base)
        yield indices, suffixes, prefill.batch_repeat(base, len(indices))
        prefill.crop(base, prefix)


def _shared(rows: list[list[int]], last: list[int], limits: list[int]) -> list[int]:
    """The length of the prefix that each row shares with the last one, up to its limit."""
    want = np.array(last)
    out = []
    for row, limit in zip(rows, limits, strict=True):
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
    """Batches of trials with similar prefixes, and of equal length if padding is not possible."""
    group: list[int] = []
    longest = 0
    for i in order:
        reach = max(longest, trials[i].reach)
        if group and (
            (len(group) + 1) * reach > batch_tokens
            or shared[i] - shared[group[0]] > _PREFIX_SLACK
            or (not padded and len(rows[i]) != len(rows[group[0]]))
        ):
            yield group
            group, reach = [], trials[i].reach
        group.append(i)
        longest = reach
    yield group


def _greedy(
    model: Any,
    suffixes: list[list[int]],
    batch: list[Trial],
    stop_ids: set[int],
    past: Any,
    done: Callable[[Trial, list[int]], bool],
) -> list[list[int]]:
    """Greedy continuations of rows that follow the same cache.

    Rows are padded on the right; padding is masked, and positions continue from each row's length.
    """
    if not prefill.reading(model).steps:
        return _greedy_without_cache(model, suffixes, batch, stop_ids, done)
    max_new = [trial.max_new_tokens for trial in batch]
    device = model.device
    lengths = torch.tensor([len(r) for r in suffixes], device=device)
    width = int(lengths.max())
    before = past.num_tokens if past is not None else 0
    past = past if past is not None else prefill.new_cache(model, width + max(max_new))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in suffixes], device=device)
    first = int(lengths.min()) - 1
    logits = prefill.logits_at(model, ids, torch.arange(first, width), past=past)
    tokens = logits[torch.arange(len(suffixes), device=device), lengths - 1 - first].argmax(-1)
    mask = torch.ones(len(suffixes), before + width + max(max_new), dtype=torch.long, device=device)
    slots = torch.arange(before, before + width, device=device)
    mask[:, before : before + width] = (slots < before + lengths[:, None]).long()
    last = torch.tensor([max(0, n - 1) for n in max_new], device=device)
    generated: list[list[int]] = [[] for _ in suffixes]
    open_rows = [n > 0 for n in max_new]
    for step in range(max(max_new)):
        for row, token in enumerate(tokens.tolist()):
            if open_rows[row]:
                generated[row].append(token)
                full = len(generated[row]) >= max_new[row] or token in stop_ids
                open_rows[row] = not full and not done(batch[row], generated[row])
        if not any(open_rows):
            break
        seen = mask[:, : before + width + step + 1]
        # a finished row keeps its position: GPT-2 has no positions past its window
        positions = (before + lengths + torch.clamp(last, max=step))[:, None]
        tokens = prefill.next_logits(model, tokens[:, None], positions, seen, past).argmax(-1)
    return generated


def _greedy_without_cache(
    model: Any,
    rows: list[list[int]],
    batch: list[Trial],
    stop_ids: set[int],
    done: Callable[[Trial, list[int]], bool],
) -> list[list[int]]:
    """The same without a cache, for models that cannot continue from one: a pass per token."""
    generated: list[list[int]] = [[] for _ in rows]
    for prompt, trial, tokens in zip(rows, batch, generated, strict=True):
        while len(tokens) < trial.max_new_tokens:
            ids = torch.tensor([prompt + tokens], device=model.device)
            last = torch.tensor([ids.shape[1] - 1])
            tokens.append(int(prefill.logits_at(model, ids, last)[0, -1].argmax()))
            if tokens[-1] in stop_ids or done(trial, tokens):
                break
    return generated
