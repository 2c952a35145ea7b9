"""Passkey retrieval: five digits hidden at a depth of a long filler, asked for at the end.

Source: Mohtashami & Jaggi 2023, arXiv 2305.16300, section 4; the template is PoSE's.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from skipwise.evaluate.forward import can_share, logits_at, new_cache, prefill
from skipwise.evaluate.intervals import wilson

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
        depth: share of them that stand before the needle, 0 .. 1.
    """
    before = round(depth * num_fillers)
    sentences = [filler[i % len(filler)] for i in range(num_fillers)]
    needle = f"The pass key is {passkey}. Remember it. {passkey} is the pass key."
    return "\n".join(
        [INTRO, " ".join(sentences[:before]), needle, " ".join(sentences[before:]), QUERY]
    )


@dataclass(frozen=True, kw_only=True)
class _Trial:
    input_ids: list[int]  # prompt and answer
    num_answer: int  # tokens of the answer, at the end


def passkey_retrieval(
    model: Any,
    tokenizer: Any,
    context_lengths: Sequence[int],
    *,
    num_trials: int = 50,
    num_depths: int = 10,
    seed: int = 0,
    batch_tokens: int = 16384,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Rows of results, one a context length and depth.

    A trial counts when greedy decoding would give exactly the answer's tokens: in one forward pass
    over prompt and answer, every answer token is the likeliest after those before it. Trials of a
    length and depth share their prompt up to the needle, which goes through the model once.

    Args:
        num_trials: a context length, spread evenly over the depths.
    """
    if not num_trials:
        return []
    depths = np.linspace(0.0, 1.0, max(1, min(num_depths, num_trials)))
    rows = []
    bar = tqdm(
        desc="passkey", total=num_trials * len(context_lengths), unit=" trials", disable=None
    )
    bar.disable = bar.disable or not progress
    with bar:
        for length in sorted(context_lengths):
            for i, depth in enumerate(depths):
                count = num_trials // len(depths) + (i < num_trials % len(depths))
                rng = np.random.default_rng([seed, length, i])
                trials = make_trials(tokenizer, length, float(depth), count, rng)
                if not trials:
                    bar.update(count)
                    continue
                hits = sum(answers_right(model, trials, batch_tokens, bar))
                low, high = wilson(hits, count)
                rows.append(
                    {
                        "task": "passkey",
                        "metric": "exact_match",
                        "context_length": length,
                        "depth": round(float(depth), 3),
                        "value": hits / count,
                        "low": low,
                        "high": high,
                        "num_samples": count,
                    }
                )
    return rows


def make_trials(
    tokenizer: Any, length: int, depth: float, count: int, rng: np.random.Generator
) -> list[_Trial]:
    """Prompts with answers, as long as fits in `length` tokens; none where no filler fits."""
    keys = [str(key) for key in rng.integers(10_000, 100_000, count)]

    def size(key: str, num_fillers: int) -> int:
        return len(_ids(tokenizer, f"{prompt(key, num_fillers, depth)} {key}"))

    # start near: a cycle of filler has about the same tokens everywhere
    cycle = max(1, size(keys[0], 3 * len(FILLER)) - size(keys[0], 2 * len(FILLER)))
    num_fillers = max(0, (length - size(keys[0], 0)) * len(FILLER) // cycle)
    while num_fillers >= 0 and max(size(key, num_fillers) for key in keys) > length:
        num_fillers -= 1
    while max(size(key, num_fillers + 1) for key in keys) <= length:
        num_fillers += 1
    if num_fillers < 1:
        return []
    trials = []
    for key in keys:
        asked = _ids(tokenizer, prompt(key, num_fillers, depth))
        input_ids = _ids(tokenizer, f"{prompt(key, num_fillers, depth)} {key}")
        trials.append(_Trial(input_ids=input_ids, num_answer=len(input_ids) - len(asked)))
    return trials


@torch.inference_mode()
def answers_right(
    model: Any, trials: list[_Trial], batch_tokens: int, bar: Any = None
) -> list[bool]:
    """Whether greedy decoding gives each trial's answer."""
    shared = _common_prefix([t.input_ids[: len(t.input_ids) - t.num_answer - 1] for t in trials])
    past = new_cache(model)
    if shared < 64 or len(trials) == 1 or not can_share(past):
        shared, past = 0, None
    else:
        prefix = torch.tensor([trials[0].input_ids[:shared]], device=model.device)
        prefill(model, prefix, past)
    longest = max(len(t.input_ids) for t in trials)
    rows = max(1, batch_tokens // longest)
    right: list[bool] = []
    for start in range(0, len(trials), rows):
        batch = trials[start : start + rows]
        rests = [t.input_ids[shared:] for t in batch]
        width = max(map(len, rests))
        # padding comes after everything that is read, so a causal model does not see it
        ids = torch.tensor([r + [0] * (width - len(r)) for r in rests], device=model.device)
        cache = copy.deepcopy(past) if past is not None else None
        if cache is not None and len(batch) > 1:
            cache.batch_repeat_interleave(len(batch))
        first = min(len(r) - t.num_answer for r, t in zip(rests, batch, strict=True)) - 1
        logits = logits_at(model, ids, torch.arange(first, width), past=cache)
        likeliest = logits.argmax(-1).cpu()
        for row, (rest, trial) in enumerate(zip(rests, batch, strict=True)):
            at = len(rest) - trial.num_answer - 1 - first
            answer = likeliest[row, at : at + trial.num_answer].tolist()
            right.append(answer == rest[-trial.num_answer :])
        if bar is not None:
            bar.update(len(batch))
    return right


def _common_prefix(rows: list[list[int]]) -> int:
    shortest = min(map(len, rows))
    table = np.array([row[:shortest] for row in rows])
    different = (table != table[0]).any(0)
    return int(different.argmax()) if different.any() else shortest


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, verbose=False)["input_ids"]
