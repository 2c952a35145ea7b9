"""Many-shot classification: learn a rule from as many examples as fit into the context.

Each line is a made-up word with a sign at its end, and a letter: `robi% G`. The sign decides the
letter, 16 signs for 8 letters, drawn again in each context, so only the examples (shots) tell the
rule. Eight words are asked for after the same shots, one at a time; none of them is a shot. Signs
have unequal frequencies, but each is asked equally often: some of them come for the first time
after many shots, and a model that uses more of the context knows more of them.

Scored by likelihood: of the 8 letters, the right one must be the likeliest. Small base models learn
the rule but not the format, and would score 0 by exact match. All letters take the same number of
tokens, which differ in the last one alone, so one forward pass compares them. A model that draws a
letter at random has the floor 1/8; one that finds several equally likely has no answer.

Source: the many-shot setting of Agarwal et al. 2024, arXiv 2404.11018, and Li et al. 2024, arXiv
        2404.02060; data and rule are ours
"""

from __future__ import annotations

import string
from collections import Counter
from typing import Any

import numpy as np

from skipwise.evaluation.scoring import Trial, exact_match
from skipwise.evaluation.tasks import prompts
from skipwise.evaluation.tasks.task import Task, TaskInputs, mean_row
from skipwise.report.rows import Rows

NUM_LABELS = 8
FLOOR = 1 / NUM_LABELS
_SIGNS = "@#%&+!?~^$*=;:|/"
_EXPONENT = 1.0  # the frequency of a sign falls with this power of its rank
_PER_CONTEXT = 8  # questions after the same shots, which go through the model once
_INTRO = "Each word has a letter."


def make_trials(
    tokenizer: Any, length: int, *, num_samples: int, seed: int = 0
) -> tuple[list[Trial], list[int]]:
    """Prompts that fill `length` tokens with their answers, and the last tokens of all labels.

    Both are empty if no shot fits, or if the tokenizer has no 8 letters that differ in one token.
    """
    labels = label_tokens(tokenizer)
    trials: list[Trial] = []
    num_shots: int | None = 16
    while len(trials) < num_samples and labels:
        rng = np.random.default_rng([seed, length, len(trials), 5])
        count = min(_PER_CONTEXT, num_samples - len(trials))
        letters = rng.permutation(list(labels) * (len(_SIGNS) // NUM_LABELS)).tolist()
        rule = dict(zip(_SIGNS, letters, strict=True))
        words = prompts.random_words(rng, max(64, length // 4) + count, 2 + (length > 4096))
        chances = rng.permutation(1 / np.arange(1, len(_SIGNS) + 1) ** _EXPONENT)
        signs = rng.choice(list(_SIGNS), len(words) - count, p=chances / chances.sum()).tolist()
        shots = [f"{w}{s} {rule[s]}\n" for w, s in zip(words[count:], signs, strict=True)]
        asked = rng.choice(list(_SIGNS), count, replace=False).tolist()
        lasts = [f"{word}{sign}" for word, sign in zip(words, asked, strict=False)]

        def text(units: int, last: str, shots: list[str] = shots) -> str:
            return f"{_INTRO}\n{''.join(shots[:units])}{last}"

        tokens = {last: prompts.count_tokens(tokenizer, text(4, last)) for last in lasts}
        longest, more = max(lasts, key=tokens.__getitem__), len(labels[letters[0]])

        def size(units: int, text: Any = text, last: str = longest, more: int = more) -> int:
            return prompts.count_tokens(tokenizer, text(units, last)) + more

        num_shots = prompts.fit_to_length(size, length, num_shots)
        if num_shots is None:
            return [], []
        haystack = len(trials)
        for last in lasts:
            ids = [*prompts.token_ids(tokenizer, text(num_shots, last)), *labels[rule[last[-1]]]]
            trials.append(Trial(input_ids=ids, num_answer=1, haystack=haystack))
    return trials, [tokens[-1] for tokens in labels.values()]


def label_tokens(tokenizer: Any) -> dict[str, list[int]]:
    """Eight letters and their tokens after a word, which differ in the last one alone, or none."""
    prompt = "\nba%"
    asked = prompts.token_ids(tokenizer, prompt)
    found = {
        letter: prompts.answered(tokenizer, prompt, asked, letter)[len(asked) :]
        for letter in string.ascii_uppercase
    }
    starts = Counter(tuple(tokens[:-1]) for tokens in found.values())
    most = starts.most_common(1)[0][0]
    kept = {letter: tokens for letter, tokens in found.items() if tuple(tokens[:-1]) == most}
    first = list(kept.items())[:NUM_LABELS]
    distinct = len({tokens[-1] for _, tokens in first}) == NUM_LABELS
    return dict(first) if distinct else {}


def _measure(inputs: TaskInputs) -> Rows:
    settings = inputs.settings
    trials, labels = make_trials(
        inputs.tokenizer, inputs.length, num_samples=settings.samples, seed=settings.seed
    )
    if not trials:
        return []
    right = exact_match(inputs.model, trials, settings.batch_tokens, inputs.tick, among=labels)
    more = {"floor": FLOOR, "documents": [trial.haystack for trial in trials]}
    return [mean_row("icl", "accuracy", inputs.length, right, **more)]


TASKS = {
    "icl": Task(
        name="icl",
        measure=_measure,
        title="Many-shot classification",
        about="Share of words whose letter is right, of 8, with as many examples as fit. "
        f"A letter drawn at random would be right in {100 * FLOOR:.1f} %.",
        is_share=True,
    )
}
