"""The study's text: the quickstart's, as token ids, and the questions that every model is asked.

Made once into a folder, so that another machine measures the same: `tokens.npz` (documents of the
standard library's source to train on, passkey prompts of the training length, documents held out)
and `questions.npz` (passkey prompts, needles in source text, RULER-like tasks, by context length).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from skipwise.data.token_cache import TokenStore
from skipwise.evaluation.scoring import Trial
from skipwise.evaluation.tasks import passkey, ruler
from skipwise.evaluation.tasks.prompts import haystack_words
from skipwise.pipeline.quickstart import MODEL, corpus

L = 256  # the base model's context
NUM_PASSKEYS = 1000
TRIALS = 100  # passkeys and needles a length
RULER_TASKS = ("niah_single_numbers", "niah_multikey", "vt", "cwe")
RULER_SAMPLES = 20


@dataclass(frozen=True, kw_only=True)
class Text:
    source: TokenStore  # to train on
    passkeys: TokenStore  # of L tokens each
    search: list[np.ndarray]  # documents of `source`, for choices made before the evaluation
    held_out: list[np.ndarray]

    def long_passkeys(self, length: int, count: int, seed: int) -> TokenStore:
        """Passkey prompts of some other length, with the answer at the end; for full length."""
        rng = np.random.default_rng([seed, length, 7])
        tokenizer = tokenizer_of_base()
        rows = [_long_passkey(tokenizer, self, length, rng) for _ in range(count)]
        return _store(rows)


def tokenizer_of_base() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def prepare(folder: Path, lengths: list[int], *, smoke: bool = False) -> None:
    """Write what is not there yet; with `smoke`, of a few modules and with few questions."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizer_of_base()
    if not (folder / "tokens.npz").exists():
        texts = list(islice(corpus.modules(), 60 if smoke else None))
        sources = [text for name, text in texts if not corpus.held_out(name)]
        kept = [text for name, text in texts if corpus.held_out(name)]
        rng = np.random.default_rng(1)
        count = 20 if smoke else NUM_PASSKEYS
        prompts = [corpus.passkey_document(tokenizer, L, rng, sources) for _ in range(count)]
        arrays = {}
        for name, documents in (("source", sources), ("passkeys", prompts), ("held_out", kept)):
            store = _store(tokenizer(documents, verbose=False)["input_ids"])
            arrays |= {f"{name}_tokens": store.tokens, f"{name}_offsets": store.offsets}
        np.savez_compressed(folder / "tokens.npz", **arrays)
    if not (folder / "questions.npz").exists():
        held_out = read_text(folder).held_out
        arrays = {}
        for length in lengths:
            words = haystack_words(tokenizer, held_out, 2 * length)
            count = (2, 2) if smoke else (TRIALS, RULER_SAMPLES)
            for task, trials in _questions(tokenizer, length, words, *count):
                store = _store([trial.input_ids for trial in trials])
                facts = [
                    [t.num_answer, list(t.answers), t.max_new_tokens, t.depth, t.haystack]
                    for t in trials
                ]
                arrays |= {
                    f"{task}@{length}/tokens": store.tokens,
                    f"{task}@{length}/offsets": store.offsets,
                    f"{task}@{length}/facts": np.array(json.dumps(facts)),
                }
        np.savez_compressed(folder / "questions.npz", **arrays)


def read_text(folder: Path) -> Text:
    arrays = np.load(folder / "tokens.npz")
    stores = {
        name: TokenStore(tokens=arrays[f"{name}_tokens"], offsets=arrays[f"{name}_offsets"])
        for name in ("source", "passkeys", "held_out")
    }
    source, kept = stores["source"], stores["held_out"]
    documents = [source.document(i) for i in range(source.num_documents)]
    longest = sorted(documents, key=len)[-24:]
    return Text(
        source=source,
        passkeys=stores["passkeys"],
        search=longest,
        held_out=[kept.document(i) for i in range(kept.num_documents)],
    )


def read_questions(folder: Path, task: str, length: int) -> list[Trial]:
    arrays = np.load(folder / "questions.npz")
    key = f"{task}@{length}"
    if f"{key}/tokens" not in arrays:
        return []  # no prompt of the task fits
    tokens, offsets = arrays[f"{key}/tokens"].tolist(), arrays[f"{key}/offsets"]
    return [
        Trial(
            input_ids=tokens[offsets[i] : offsets[i + 1]],
            num_answer=num_answer,
            answers=tuple(answers),
            max_new_tokens=new,
            depth=depth,
            haystack=haystack,
        )
        for i, (num_answer, answers, new, depth, haystack) in enumerate(
            json.loads(str(arrays[f"{key}/facts"]))
        )
    ]


def _questions(
    tokenizer: Any, length: int, words: list[str], num_trials: int, num_samples: int
) -> Any:
    grid = {"num_trials": num_trials, "num_depths": min(10, num_trials)}
    yield "passkey", passkey.passkey_trials(tokenizer, length, **grid)
    yield (
        "needle",
        passkey.needle_trials(tokenizer, length, **grid, words=words, per_haystack=1),
    )
    for task in RULER_TASKS:
        samples = ruler.make_samples(task, tokenizer, length, num_samples=num_samples, words=words)
        if samples:
            yield task, samples


def _store(rows: list[Any]) -> TokenStore:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    tokens = np.concatenate([np.asarray(row) for row in rows]).astype(np.uint16)
    return TokenStore(tokens=tokens, offsets=offsets)


def _long_passkey(tokenizer: Any, text: Text, length: int, rng: np.random.Generator) -> np.ndarray:
    """As `corpus.passkey_document`, joined from pieces that were tokenized apart."""

    def ids(piece: str) -> np.ndarray:
        return np.array(tokenizer(piece, add_special_tokens=False)["input_ids"])

    key = str(rng.integers(10_000, 100_000))
    begin, middle, end = passkey.prompt(key, 2, 0.5, ("|",)).split("|")
    answer = end + " " + key + ".\n"
    room = length - sum(len(ids(piece)) for piece in (begin, middle, answer))
    if rng.random() < 0.5:
        filler = np.tile(ids(" " + " ".join(passkey.FILLER)), 1 + room // 20)[:room]
    else:
        source = text.source.tokens
        start = int(rng.integers(len(source) - room))
        filler = source[start : start + room].astype(np.int64)
    cut = int(rng.integers(room + 1))
    parts = [ids(begin), filler[:cut], ids(middle), filler[cut:], ids(answer)]
    return np.concatenate(parts)[:length]
