"""RULER-like tasks: retrieval, tracing and counting over a context of exact length, no download.

Each prompt is filled until prompt and answer take the context length, and ends with the start of
the answer, so that base models can do it. Names and values are random in each sample, so no model
can know them. The score is RULER's: the share of the expected answers in the generated text.

Differences from RULER: made-up words instead of an English list, different wording, the evaluation
text as haystack (repeated filler without text), smaller counts at short contexts, and one worked
example for tracing and counting at any length.

Source: Hsieh et al. 2024, arXiv 2404.06654, section 3 and appendix B.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from skipwise.evaluation.scoring import Trial, recall
from skipwise.evaluation.tasks import prompts
from skipwise.evaluation.tasks.passkey import FILLER
from skipwise.evaluation.tasks.task import Task, TaskInputs, mean_row
from skipwise.report.rows import RULER_TASKS, Rows

_NUM_KEYS = 4  # of the multi-key, multi-value and multi-query tasks
_NUM_HOPS = 4
_NUM_COMMON = 10
_TOP = 3
_MARGIN = 1.5  # room for the answer, as a factor of its tokens; base models add words


@dataclass(frozen=True, kw_only=True)
class _Question:
    """A prompt as a function of the amount of haystack in it."""

    text: Callable[[int], str]  # of a number of units
    answers: tuple[str, ...]
    spoken: str  # the answer as a model would say it


# a question from a random generator, the words of the haystack and the context length
_Make = Callable[[np.random.Generator, Sequence[str], int], _Question]


def make_samples(
    task: str,
    tokenizer: Any,
    length: int,
    *,
    num_samples: int,
    seed: int = 0,
    words: Sequence[str] = (),
) -> list[Trial]:
    """Samples of a task that fill `length` tokens with their answers; empty if none fits.

    Args:
        task: one of `RULER_TASKS`.
        words: of the haystack, with their whitespace. Defaults to filler sentences.
    """
    make = _QUESTIONS[task]
    samples = []
    num_units: int | None = 16
    for i in range(num_samples):
        rng = np.random.default_rng([seed, length, i, RULER_TASKS.index(task)])
        question = make(rng, words, length)
        room = round(_MARGIN * prompts.count_tokens(tokenizer, question.spoken)) + 4

        def size(units: int, text: Callable[[int], str] = question.text, room: int = room) -> int:
            return prompts.count_tokens(tokenizer, text(units)) + room

        num_units = prompts.fit_to_length(size, length, num_units)
        if num_units is None:
            return []
        ids = prompts.token_ids(tokenizer, question.text(num_units))
        samples.append(Trial(input_ids=ids, answers=question.answers, max_new_tokens=room))
    return samples


def _hide(needles: Sequence[tuple[float, str]], haystack: Sequence[str], count: int) -> str:
    """The needles in so many words of the haystack, or in filler sentences if it is empty."""
    filler = [FILLER[i % len(FILLER)] + " " for i in range(count)]
    return prompts.insert_needles(haystack[:count] if haystack else filler, needles)


def _needles(
    kind: Callable[[np.random.Generator, int], list[str]],
    noun: str,
    *,
    num_needles: int = 1,
    num_values: int = 1,
    num_asked: int = 1,
) -> _Make:
    """Needles that give each name its values; the question asks for some of the names."""

    def make(rng: np.random.Generator, haystack: Sequence[str], length: int) -> _Question:
        names = prompts.random_words(rng, num_needles)
        values = kind(rng, num_needles * num_values)
        depths = rng.random(num_needles * num_values)
        needles = [
            (float(depth), f"The special {noun} for {names[i // num_values]} is {value}.")
            for i, (depth, value) in enumerate(zip(depths, values, strict=True))
        ]
        asked = sorted(rng.choice(num_needles, num_asked, replace=False).tolist())
        answers = [values[n * num_values + j] for n in asked for j in range(num_values)]
        listed = _listed([names[n] for n in asked])
        one = len(answers) == 1
        nouns, are = (noun, "is") if one else (f"{noun}s", "are")
        what = f"What {are} {'the' if one else 'all the'} special {nouns} for {listed}?"

        def text(units: int) -> str:
            return (
                f"Special {noun}s are hidden in this text. Remember them: they are asked for at "
                f"the end.\n{_hide(needles, haystack, units)}\n{what} "
                f"The special {nouns} for {listed} {are}"
            )

        return _Question(text=text, answers=tuple(answers), spoken=" " + ", ".join(answers))

    return make


def _tracing(rng: np.random.Generator, haystack: Sequence[str], length: int) -> _Question:
    """A value assigned from variable to variable, over several hops in the order of the text."""
    names = [name.upper() for name in prompts.random_words(rng, 2 * (_NUM_HOPS + 1), 2)]
    example, names = names[: _NUM_HOPS + 1], names[_NUM_HOPS + 1 :]
    other, value = prompts.random_numbers(rng, 2, 5)

    def chain(names: list[str], value: str) -> list[str]:
        first = f"VAR {names[0]} = {value}"
        return [first, *(f"VAR {b} = VAR {a}" for a, b in pairwise(names))]

    def question(value: str) -> str:
        return (
            f"Which variables have the value {value}, directly or through others? The "
            f"{_NUM_HOPS + 1} variables with the value {value} are"
        )

    depths = sorted(rng.random(_NUM_HOPS + 1).tolist())
    needles = list(zip(depths, chain(names, value), strict=True))

    def text(units: int) -> str:
        shown = "\n".join(chain(example, other))
        return (
            f"Follow the variables through the text.\n{shown}\n{question(other)} "
            f"{' '.join(example)}.\n\nFollow the variables through the text.\n"
            f"{_hide(needles, haystack, units)}\n{question(value)}"
        )

    return _Question(text=text, answers=tuple(names), spoken=" " + " ".join(names))


def _common_words(rng: np.random.Generator, haystack: Sequence[str], length: int) -> _Question:
    """A list in which ten words are ten times as frequent as the others."""
    times = 3 if length >= 4096 else 1
    common = prompts.random_words(rng, _NUM_COMMON, 2)
    rare = [w for w in prompts.random_words(rng, max(64, length // 2), 3) if w not in common]
    places = rng.random(10 * times * _NUM_COMMON + times * len(rare))
    what = f"The {_NUM_COMMON} most common words in the list are"

    def numbered(words: list[str]) -> str:
        # a longer list keeps the order of the shorter one
        mixed = [words[i] for i in places[: len(words)].argsort()]
        return " ".join(f"{i + 1}. {word}" for i, word in enumerate(mixed))

    example = prompts.random_words(rng, _NUM_COMMON // 2, 2)
    short = numbered(example * 3 + rare[-4:])

    def text(units: int) -> str:
        words = common * (10 * times) + [w for w in rare[:units] for _ in range(times)]
        return (
            f"Below is a list of words, some of them far more common than others.\n{short}\nThe "
            f"{len(example)} most common words in the list are {' '.join(example)}.\n\nBelow is a "
            "list of words, some of them far more common than others.\n"
            f"{numbered(words)}\n{what}"
        )

    return _Question(text=text, answers=tuple(common), spoken=" " + " ".join(common))


def _frequent_words(rng: np.random.Generator, haystack: Sequence[str], length: int) -> _Question:
    """Words whose counts fall with the square of their rank; the first three are the answer."""
    words = prompts.random_words(rng, max(32, length // 8), 2)
    shares = 1 / np.arange(1, len(words) + 1) ** 2.0  # zeta of 2, as RULER's alpha
    order = int(rng.integers(1 << 30))

    def text(units: int) -> str:
        counts = np.maximum((shares / shares.sum() * (units + 15)).round().astype(int), 0)
        counts[:_TOP] += np.arange(_TOP, 0, -1)  # no ties among the answers
        mixed = np.random.default_rng(order).permutation(np.repeat(words, counts))
        return (
            f"Find the {_TOP} most frequent words of this coded text.\n{' '.join(mixed)}\nThe "
            f"{_TOP} most frequent words are"
        )

    return _Question(text=text, answers=tuple(words[:_TOP]), spoken=" " + " ".join(words[:_TOP]))


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


_MAKERS: tuple[_Make, ...] = (
    _needles(prompts.random_words, "word"),
    _needles(prompts.random_numbers, "number"),
    _needles(prompts.random_uuids, "uuid"),
    _needles(prompts.random_numbers, "number", num_needles=_NUM_KEYS),
    _needles(prompts.random_numbers, "number", num_values=_NUM_KEYS),
    _needles(prompts.random_numbers, "number", num_needles=_NUM_KEYS, num_asked=_NUM_KEYS),
    _tracing,
    _common_words,
    _frequent_words,
)
# the order of RULER_TASKS is part of each seed
_QUESTIONS: dict[str, _Make] = dict(zip(RULER_TASKS, _MAKERS, strict=True))


def _measure(task: str, inputs: TaskInputs) -> Rows:
    settings = inputs.settings
    num, seed, words = settings.ruler_samples, settings.seed, inputs.words
    samples = make_samples(
        task, inputs.tokenizer, inputs.length, num_samples=num, seed=seed, words=words
    )
    if not samples:
        return []
    scores = recall(inputs.model, inputs.tokenizer, samples, settings.batch_tokens, inputs.tick)
    return [mean_row(task, "recall", inputs.length, scores, group="ruler")]


TASKS = {
    name: Task(
        name=name,
        measure=functools.partial(_measure, name),
        num_samples=lambda settings: settings.ruler_samples,
        cache_key=lambda settings: (settings.ruler_samples,),
        text="optional",
        group="ruler",
    )
    for name in RULER_TASKS
}
