"""Passkey retrieval and the needle grid: find five digits that are hidden at some depth.

The passkey's haystack repeats five sentences around one needle, as published. The needle grid uses
real text with a needle at every depth, each with its own name, and asks for one after the other.
The haystack goes through the model once for all of them, and the other needles distract. With
`per_haystack=1` it is the passkey's single needle in real text.

Source: Mohtashami & Jaggi 2023, arXiv 2305.16300, section 4; the template is PoSE's. The grid over
depth and length follows Kamradt 2023, "Needle in a haystack".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from skipwise.evaluation.scoring import Trial, exact_match
from skipwise.evaluation.tasks.prompts import (
    answered,
    count_tokens,
    fit_to_length,
    insert_needles,
    random_words,
    token_ids,
    words_from,
)
from skipwise.evaluation.tasks.task import Task, TaskInputs
from skipwise.report.intervals import wilson
from skipwise.report.rows import Rows

INTRO = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
QUERY = "What is the pass key? The pass key is"


def prompt(passkey: str, num_fillers: int, depth: float, filler: Sequence[str] = FILLER) -> str:
    """The question, ready for the answer to follow.

    Args:
        passkey: the digits to hide.
        num_fillers: filler sentences in all; the `filler` sentences repeat in turn.
        depth: share of them before the needle, 0 .. 1.
    """
    before = round(depth * num_fillers)
    sentences = [filler[i % len(filler)] for i in range(num_fillers)]
    start, end = " ".join(sentences[:before]), " ".join(sentences[before:])
    return "\n".join([INTRO, start, _needle(passkey), end, QUERY])


def prompt_in_text(
    needles: Sequence[tuple[float, str, str]], asked: str, words: Sequence[str]
) -> str:
    """The question about one of the needles in a text.

    Args:
        needles: (depth, name, passkey) of each; the name is empty if there is only one.
        asked: the name asked for.
    """
    lines = [(depth, _needle(passkey, name)) for depth, name, passkey in needles]
    of = f" of {asked}" if asked else ""
    query = f"What is the pass key{of}? The pass key{of} is"
    return "\n".join([INTRO, insert_needles(words, lines).rstrip(), query])


def passkey_trials(
    tokenizer: Any, length: int, *, num_trials: int, num_depths: int, seed: int = 0
) -> list[Trial]:
    """Prompts with answers that fill `length` tokens, by depth; empty if none fits.

    Args:
        num_trials: spread evenly over the depths.
    """
    trials: list[Trial] = []
    guess = 16
    for i, (depth, count) in enumerate(_depths(num_trials, num_depths)):
        rng = np.random.default_rng([seed, length, i])
        keys = [str(key) for key in rng.integers(10_000, 100_000, count)]

        def text(units: int, depth: float = depth, keys: list[str] = keys) -> list[str]:
            return [prompt(key, units, depth) for key in keys]

        found = fill_prompts(tokenizer, text, keys, length, guess)
        if found is None:
            return []
        guess = found[0]
        trials += [Trial.of_answer(asked, full, depth) for asked, full in found[1]]
    return trials


def needle_trials(
    tokenizer: Any,
    length: int,
    *,
    num_trials: int,
    num_depths: int,
    words: Sequence[str],
    per_haystack: int = 10,
    seed: int = 0,
) -> list[Trial]:
    """The same for the needle grid, haystack by haystack.

    Args:
        words: of the text, with their whitespace; each haystack starts at its own place.
        per_haystack: needles in one haystack, spread over it, or fewer if they do not fit. With 1,
            all haystacks are the same text.
    """
    trials: list[Trial] = []
    guess = 16
    depths = _depths(num_trials, num_depths)
    num_groups = -(-len(depths) // max(1, per_haystack))
    haystack, start = 0, int(np.random.default_rng([seed, length, 2]).integers(len(words)))
    for turn in range(depths[0][1]):
        for group in range(num_groups):
            here = [depth for depth, count in depths[group::num_groups] if turn < count]
            if not here:
                continue
            rng = np.random.default_rng([seed, length, len(trials), 1])
            if per_haystack > 1:
                haystack += 1
                start = int(rng.integers(len(words)))
            names = random_words(rng, len(here), 2) if per_haystack > 1 else [""] * len(here)
            keys = [str(key) for key in rng.choice(90_000, len(here), replace=False) + 10_000]
            needles = list(zip(here, names, keys, strict=True))

            def text(units: int, needles: list[Any] = needles, start: int = start) -> list[str]:
                shown = words_from(words, start, units)
                return [prompt_in_text(needles, name, shown) for _, name, _ in needles]

            found = fill_prompts(tokenizer, text, keys, length, guess)
            if found is None and per_haystack == 1:
                return []
            if found is None:  # as many as a short context has room for
                return needle_trials(
                    tokenizer,
                    length,
                    num_trials=num_trials,
                    num_depths=num_depths,
                    words=words,
                    per_haystack=per_haystack // 2,
                    seed=seed,
                )
            guess = found[0]
            trials += [
                Trial.of_answer(asked, full, depth, haystack)
                for (asked, full), depth in zip(found[1], here, strict=True)
            ]
    return sorted(trials, key=lambda trial: (trial.haystack, trial.depth))


def rows_by_depth(
    task: str, length: int, trials: Sequence[Trial], right: Sequence[bool]
) -> list[dict[str, Any]]:
    """One row of results per depth."""
    rows = []
    for depth in sorted({trial.depth or 0.0 for trial in trials}):
        pairs = zip(trials, right, strict=True)
        here = [(hit, trial.haystack) for trial, hit in pairs if trial.depth == depth]
        hits = [hit for hit, _ in here]
        low, high = wilson(sum(hits), len(hits))
        shared = {"documents": [haystack for _, haystack in here]} if trials[-1].haystack else {}
        rows.append(
            {
                "task": task,
                "metric": "exact_match",
                "context_length": length,
                "depth": depth,
                "value": sum(hits) / len(hits),
                "low": low,
                "high": high,
                "num_samples": len(hits),
                "samples": [int(hit) for hit in hits],
                **shared,
            }
        )
    return rows


def _depths(num_trials: int, num_depths: int) -> list[tuple[float, int]]:
    """(depth, number of trials), with the trials spread evenly."""
    num = max(1, min(num_depths, num_trials))
    return [
        (float(depth), num_trials // num + (i < num_trials % num))
        for i, depth in enumerate(np.linspace(0.0, 1.0, num))
    ]


def fill_prompts(
    tokenizer: Any, text: Callable[[int], list[str]], keys: Sequence[str], length: int, guess: int
) -> tuple[int, list[tuple[list[int], list[int]]]] | None:
    """Prompts of one haystack with as many units as fit, or None if not even one unit does.

    Args:
        text: the prompts as a function of the number of units.
        keys: their answers.
        length: tokens that no prompt exceeds with its answer.
        guess: first number of units to try.

    Returns:
        the number of units; for each prompt its tokens without and with the answer.
    """

    def size(units: int) -> int:
        return count_tokens(tokenizer, f"{text(units)[0]} {keys[0]}")

    units = fit_to_length(size, length, guess)
    while units:
        texts = text(units)
        asked = [token_ids(tokenizer, prompt) for prompt in texts]
        full = [
            answered(tokenizer, prompt, ids, key)
            for prompt, ids, key in zip(texts, asked, keys, strict=True)
        ]
        if max(map(len, full)) <= length:
            return units, list(zip(asked, full, strict=True))
        units -= 1
    return None


def _needle(passkey: str, name: str = "") -> str:
    of = f" of {name}" if name else ""
    return f"The pass key{of} is {passkey}. Remember it. {passkey} is the pass key{of}."


def _measure_passkey(inputs: TaskInputs) -> Rows:
    settings = inputs.settings
    num, depths, seed = settings.passkey_samples, settings.num_depths, settings.seed
    trials = passkey_trials(
        inputs.tokenizer, inputs.length, num_trials=num, num_depths=depths, seed=seed
    )
    return _score("passkey", inputs, trials)


def _measure_needle(inputs: TaskInputs) -> Rows:
    settings = inputs.settings
    if not inputs.words:
        return []
    trials = needle_trials(
        inputs.tokenizer,
        inputs.length,
        num_trials=settings.needle_samples,
        num_depths=settings.num_depths,
        words=inputs.words,
        per_haystack=settings.needles_per_haystack,
        seed=settings.seed,
    )
    return _score("needle", inputs, trials)


def _score(task: str, inputs: TaskInputs, trials: list[Trial]) -> Rows:
    if not trials:
        return []
    correct = exact_match(inputs.model, trials, inputs.settings.batch_tokens, inputs.tick)
    return rows_by_depth(task, inputs.length, trials, correct)


PASSKEY = Task(
    name="passkey",
    measure=_measure_passkey,
    num_samples=lambda settings: settings.passkey_samples,
    cache_key=lambda settings: (settings.passkey_samples, settings.num_depths),
)
NEEDLE = Task(
    name="needle",
    measure=_measure_needle,
    num_samples=lambda settings: settings.needle_samples,
    cache_key=lambda settings: (
        settings.needle_samples,
        settings.num_depths,
        settings.needles_per_haystack,
    ),
    text="required",
)
