"""What the tasks' prompts are made of: haystacks, names, and filling a length to the token."""

from __future__ import annotations

import re
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

_SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]


def fit_to_length(size: Callable[[int], int], length: int, guess: int = 16) -> int | None:
    """The largest number of units whose prompt has at most `length` tokens; None: not even one.

    Args:
        size: tokens of the prompt with a number of units in it; grows with the number.
        guess: where to start, as the number that filled another prompt.
    """
    best, best_size = 0, size(0)
    if size(1) > length:
        return None
    worst: int | None = None  # the least number known not to fit
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


def count_tokens(tokenizer: Any, text: str) -> int:
    return len(token_ids(tokenizer, text))


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """A text that goes on: without the token that some tokenizers put at the end of texts."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    return ids[: len(ids) - _num_ending(tokenizer)]


def answered(tokenizer: Any, prompt: str, asked: list[int], answer: str) -> list[int]:
    """The prompt's tokens and those of the answer after it.

    As both are in one text, where that begins with the prompt's own tokens; a tokenizer that
    merges over the space between them gets the answer's tokens apart.
    """
    whole = token_ids(tokenizer, f"{prompt} {answer}")
    if whole[: len(asked)] == asked and len(whole) > len(asked):
        return whole
    return asked + tokenizer(f" {answer}", add_special_tokens=False)["input_ids"]


def _num_ending(tokenizer: Any) -> int:
    """Special tokens at the end of every text."""
    whole, bare = (
        tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False)
    )
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return len(whole) - len(bare) - start
    return 0


def haystack_words(tokenizer: Any, documents: Sequence[np.ndarray], num_tokens: int) -> list[str]:
    """Words of the documents' text with the whitespace after them, about so many tokens' worth.

    Text that is too short comes again from its start.
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


def insert_needles(units: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The units in a row, with needles on lines of their own at depths of 0 .. 1."""
    parts, start = [], 0
    for depth, needle in sorted(needles):
        at = max(start, round(depth * len(units)))
        before = "".join(units[start:at])
        parts += [before, "" if not before or before.endswith("\n") else "\n", needle, "\n"]
        start = at
    return "".join([*parts, *units[start:]])


def random_words(rng: np.random.Generator, count: int, syllables: int = 3) -> list[str]:
    """Distinct words of no language, that no model can guess: `dorevi`, `kuvana`."""
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
