"""Copying: continue a passage of the user's text that occurs once, half a context or more back.

The last line repeats the first words of a passage; the model must continue it. What is scored is
each token of the continuation after the right tokens before it (teacher forcing). A model can also
guess words of a text that it has never seen, so each trial has a control: the same line after the
same context, in which other words of the text replace the passage.

The score is the gain: the share of tokens that are the likeliest, minus the control's share. It is
0 for a model that cannot copy, whatever the text. Beside it is the share of tokens that the passage
makes likelier, which is 50 % for such a model. It shows even a weak effect, but says less about how
well the model copies.

Why not exact match: one wrong token of 24 or more would void a trial, and the bundled model, which
copies, would get 0. Why a difference: the control's share depends on text and model.

A haystack has up to five passages in its first half, and goes through the model once with them and
once without.

Source: the induction of Olsson et al. 2022, arXiv 2209.11895, at a distance; the control is ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from skipwise.evaluation.scoring import Trial, answer_tokens
from skipwise.evaluation.tasks import prompts
from skipwise.evaluation.tasks.passkey import fill_prompts
from skipwise.evaluation.tasks.task import Task, TaskInputs
from skipwise.report.intervals import clustered_mean
from skipwise.report.rows import Row, Rows

CUE_TOKENS, SCORED_TOKENS = 8, 24  # at least; both are whole words
QUESTION = "How does the passage go on that begins with these words?"
_PER_HAYSTACK = 5
_TRIES = 20  # places in a haystack for each passage

_Span = tuple[int, int, int]  # words: start, end of the cue, end


def make_trials(
    tokenizer: Any, length: int, *, num_samples: int, words: Sequence[str], seed: int = 0
) -> tuple[list[Trial], list[Trial]]:
    """Prompts that fill `length` tokens with their answers, and their controls.

    Both are empty if none fits, or if the text repeats itself so that no passage occurs once.

    Args:
        words: of the text, about two contexts of them; each haystack starts at its own place.
    """
    trials: list[Trial] = []
    controls: list[Trial] = []
    guess, haystack, misses = 16, 0, 0
    while len(trials) < num_samples and misses < 8:
        rng = np.random.default_rng([seed, length, haystack, *b"copy"])
        text = prompts.words_from(words, int(rng.integers(len(words))), len(words))
        count = min(num_samples - len(trials), _PER_HAYSTACK)
        found = _haystack(rng, tokenizer, text, length, count, guess)
        haystack += 1
        if found is None:
            misses += 1
            continue
        guess, pair = found
        for made, part in zip((trials, controls), pair, strict=True):
            number = 2 * haystack + (made is controls)
            made += [Trial.of_answer(ids, full, haystack=number) for ids, full in part]
    return (trials, controls) if len(trials) == num_samples else ([], [])


def _haystack(
    rng: np.random.Generator,
    tokenizer: Any,
    text: Sequence[str],
    length: int,
    num_passages: int,
    guess: int,
) -> tuple[int, list[list[tuple[list[int], list[int]]]]] | None:
    """Tokens without and with the answers of passages in one haystack, and of their controls."""

    def size(units: int) -> int:
        return len(tokenizer("".join(text[:units]), verbose=False)["input_ids"])

    units = prompts.fit_to_length(size, length, guess)
    if units is None:
        return None
    spans = _passages(rng, tokenizer, text, units, num_passages)
    if not spans:
        return None
    control, spare = list(text), iter([*text[units:], *text])
    for start, _, end in spans:
        control[start:end] = [next(spare) for _ in range(start, end)]
    whole = "".join(control)
    if any(_joined(text, start, end) in whole for start, _, end in spans):
        return None
    cues = [_joined(text, start, cue) for start, cue, _ in spans]
    keys = [_joined(text, cue, end) for _, cue, end in spans]
    out = []
    for shown in (text, control):
        found = fill_prompts(tokenizer, _prompts(shown, cues), keys, length, units)
        if found is None or found[0] < max(end for _, _, end in spans):
            return None
        out.append(found[1])
    return units, out


def _passages(
    rng: np.random.Generator, tokenizer: Any, text: Sequence[str], units: int, count: int
) -> list[_Span]:
    """Passages in the first half of a haystack that occur once in it, spread over that half."""
    half, whole = units // 2, "".join(text[:units])
    spans: list[_Span] = []
    for i in range(count):
        for _ in range(_TRIES):
            start = int(half * (i + rng.random()) / count)
            cue = _end(tokenizer, text, start, CUE_TOKENS)
            end = _end(tokenizer, text, cue, SCORED_TOKENS)
            begins = _joined(text, start, cue)
            one_line = all(word == word.rstrip() + " " for word in text[start:cue])
            fits = end <= half and one_line and "?" not in begins  # as a chat template needs it
            if fits and whole.count(begins) == 1:
                spans.append((start, cue, end))
                break
    return spans


def _end(tokenizer: Any, text: Sequence[str], start: int, least: int) -> int:
    """The first word after so many tokens from a start."""
    end, have = start, 0
    while have < least and end < len(text):
        have += len(tokenizer(text[end].rstrip(), add_special_tokens=False)["input_ids"])
        end += 1
    return end


def _joined(text: Sequence[str], start: int, end: int) -> str:
    return "".join(text[start:end]).rstrip()


def _prompts(text: Sequence[str], cues: Sequence[str]) -> Callable[[int], list[str]]:
    def made(units: int) -> list[str]:
        shown = _joined(text, 0, units)
        return [f"{shown}\n{QUESTION} {cue}" for cue in cues]

    return made


def _measure(inputs: TaskInputs) -> Rows:
    settings, length, words = inputs.settings, inputs.length, inputs.words
    if not words:
        return []
    num, seed = settings.samples, settings.seed
    pair = make_trials(inputs.tokenizer, length, num_samples=num, words=words, seed=seed)
    if not pair[0]:
        return []
    made = [*pair[0], *pair[1]]
    tokens = answer_tokens(inputs.model, made, settings.batch_tokens, inputs.tick)
    return _rows(length, tokens[:num], tokens[num:], [trial.haystack for trial in pair[0]])


_Tokens = Sequence[Sequence[tuple[bool, float]]]


def _rows(length: int, copied: _Tokens, control: _Tokens, haystacks: Sequence[int]) -> Rows:
    """The gain, the share of likelier tokens and the control's share."""
    pairs = list(zip(copied, control, strict=True))
    shares = [[float(np.mean([hit for hit, _ in one])) for one in pair] for pair in pairs]
    likelier = [
        float(np.mean([a > b for (_, a), (_, b) in zip(*pair, strict=True)])) for pair in pairs
    ]

    def row(metric: str, scores: list[float]) -> Row:
        mean, *bounds = clustered_mean(np.array(scores), np.array(haystacks))
        mean, low, high = (  # a share: a gain of less than nothing is none
            min(1.0, max(0.0, x)) if math.isfinite(x) else None for x in (mean, *bounds)
        )
        samples = [round(score, 4) for score in scores]
        values = {"value": mean, "low": low, "high": high, "samples": samples}
        values["documents"] = list(haystacks)
        common = {"task": "copy_far", "metric": metric, "context_length": length}
        return {**common, **values, "num_samples": len(scores)}

    return [
        row("gain", [one - other for one, other in shares]),
        row("likelier tokens", likelier),
        row("without the passage", [other for _, other in shares]),
    ]


TASKS = {
    "copy_far": Task(
        name="copy_far",
        measure=_measure,
        version=1,
        text="required",
        title="Copying from afar",
        about="A passage that occurs once, in the first half of the context, is continued at its "
        "end. Gain: the share of its tokens predicted right, minus the share without the passage; "
        "0 % for a model that cannot copy. Likelier tokens: the share that the passage makes "
        "likelier; 50 % for such a model. Bands are 95 % intervals over haystacks.",
    )
}
