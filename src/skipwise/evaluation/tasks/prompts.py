"""Parts of prompts: haystacks, random names and values, and fitting a prompt to a length."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from skipwise.models.separator import added_tokens

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def fit_to_length(size: Callable[[int], int], length: int, guess: int = 16) -> int | None:
    """The largest number of units whose prompt has at most `length` tokens, or None.

    Args:
        size: tokens of the prompt as a function of the number of units; it must not fall.
        guess: first try, such as the result for another prompt.
    """
    best, best_size = 0, size(0)
    if size(1) > length:
        return None
    worst: int | None = None  # the smallest number known not to fit
    while worst is None or worst - best > 1:
        if worst is not None:
            guess = min(max(guess, best + 1), worst - 1)
        have = size(guess)
        if have > length:
            worst = guess
            guess = best + max(1, round((guess - best) * (length - best_size) / (have - best_size)))
            continue
        if have <= best_size and guess > best + 64:  # the units have run out
            return guess
        per_unit = max((have - best_size) / max(1, guess - best), 0.05)
        best, best_size = guess, have
        guess = best + max(1, int((length - have) / per_unit))
    return best


class ChatPrompts:
    """A tokenizer whose prompts go through its chat template, in `token_ids`."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def prompt_ids(self, text: str) -> list[int]:
        """The ids of a prompt that ends with the start of the answer.

        What follows the question in the last line becomes the start of the assistant's turn.
        """
        before, line_break, last = text.rpartition("\n")
        question, mark, answer = last.rpartition("? ")
        asked = f"{before}{line_break}{question}?" if mark else before
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": asked}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # the answer has a few tokens
        )
        options = {"add_special_tokens": False, "verbose": False}
        return self.tokenizer(rendered + answer, **options)["input_ids"]


def count_tokens(tokenizer: Any, text: str) -> int:
    return len(token_ids(tokenizer, text))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids without the special token that some tokenizers put at the end of a text."""
    if isinstance(tokenizer, ChatPrompts):
        return tokenizer.prompt_ids(text)
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[: len(ids) - len(added_tokens(tokenizer)[1])]


def answered(tokenizer: Any, prompt: str, asked: list[int], answer: str) -> list[int]:
    """The tokens of the prompt followed by its answer.

    They are tokenized as one text, unless the tokenizer merges across the space between them; then
    the answer is tokenized separately.
    """
    full = token_ids(tokenizer, f"{prompt} {answer}")
    if full[: len(asked)] == asked and len(full) > len(asked):
        return full
    return asked + tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]


def haystack_words(tokenizer: Any, documents: Sequence[np.ndarray], num_tokens: int) -> list[str]:
    """Words of the documents with the whitespace after them, for about this many tokens.

    Text that is too short is repeated.
    """
    words: list[str] = []
    have = 0
    while documents and have < num_tokens:
        for tokens in documents:
            text = tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True)
            words += re.findall(r"\S+\s*", text.rstrip() + "\n")
            have += max(1, len(tokens))
            if have >= num_tokens:
                break
        if not words:
            break
    return words


def words_from(words: Sequence[str], start: int, count: int) -> list[str]:
    """So many words from a start; after the last word the first one follows."""
    return [*words[start : start + count], *words[: max(0, start + count - len(words))]]


def questions_in_text(
    intro: str,
    words: Sequence[str],
    start: int,
    needles: Sequence[tuple[float, str]],
    questions: Sequence[str],
) -> Callable[[int], list[str]]:
    """The function from a number of words to a prompt for each question.

    Args:
        words: of the text; it begins at `start`.
        needles: (depth, line) in it.
    """

    def text(units: int) -> list[str]:
        shown = insert_needles(words_from(words, start, units), needles).rstrip()
        return [f"{intro}\n{shown}\n{question}" for question in questions]

    return text


def insert_needles(units: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The units joined, with each needle on its own line at its depth of 0 .. 1."""
    parts, start = [], 0
    for depth, needle in sorted(needles):
        at = max(start, round(depth * len(units)))
        before = "".join(units[start:at])
        parts += [before, "" if not before or before.endswith("\n") else "\n", needle, "\n"]
        start = at
    return "".join([*parts, *units[start:]])


def random_words(rng: np.random.Generator, count: int, syllables: int = 3) -> list[str]:
    """Distinct made-up words that no model can guess: `dorevi`, `kuvana`."""
    words: dict[str, None] = {}
    while len(words) < count:
        drawn = rng.integers(0, len(_SYLLABLES), (count, syllables))
        words.update(dict.fromkeys("".join(_SYLLABLES[i] for i in row) for row in drawn.tolist()))
    return list(words)[:count]


def random_numbers(rng: np.random.Generator, count: int, digits: int = 7) -> list[str]:
    numbers = rng.choice(9 * 10 ** (digits - 1), count, replace=False) + 10 ** (digits - 1)
    return [str(n) for n in numbers]


def random_uuids(rng: np.random.Generator, count: int) -> list[str]:
    return [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)]
