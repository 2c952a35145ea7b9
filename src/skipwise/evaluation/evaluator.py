"""All measurements of one model, a task and length at a time, so that what was done is kept.

A unit is a task at a length (perplexity: at all of them). Its rows carry a key of all that decides
them: the settings, the texts, the model's files. Where rows with that key are there already, the
unit is not measured again, and the model is loaded only if something is missing.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipwise.config.recipe import EvalSettings
from skipwise.errors import SkipwiseError
from skipwise.evaluation.fingerprint import harness_identity
from skipwise.evaluation.harness import benchmarks
from skipwise.evaluation.intervals import mean_interval
from skipwise.evaluation.progress import Progress
from skipwise.evaluation.scoring import Tick, exact_match, recall
from skipwise.evaluation.tasks import passkey, ruler
from skipwise.evaluation.tasks.perplexity import fitting_lengths, perplexity
from skipwise.evaluation.tasks.prompts import haystack_words

Rows = list[dict[str, Any]]
_VERSION = 1  # of the tasks: raise it when what they ask or how they count changes
OWN_TASKS = ("perplexity", "passkey", "needle", "ruler", *ruler.TASKS)


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """A model to be measured."""

    label: str  # what the rows' `model` says: before, after, or a name
    load: Callable[[], Any]  # gives the causal language model on its device
    tokenizer: Any
    identity: Any = None  # JSON that changes when the weights do


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents for perplexity and haystacks, as token ids."""

    documents: Sequence[np.ndarray] = ()

    def digest(self, tokenizer: Any) -> str:
        """Tells texts apart, whatever tokenizer they went through: of how their documents begin."""
        digest = hashlib.sha1(usedforsecurity=False)
        for tokens in self.documents[:64]:
            start = tokenizer.decode(np.asarray(tokens[:400]).tolist(), skip_special_tokens=True)
            digest.update("".join(start.split())[:200].encode() + b"|")
        return digest.hexdigest()[:12]

    def identity(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for tokens in self.documents:
            digest.update(np.asarray(tokens, np.int64).tobytes() + b"|")
        return digest.hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A piece of work whose rows are saved together."""

    name: str
    kind: str  # text, trials or benchmark
    of_text: bool  # whether the texts decide it
    key: str
    tokens: int  # that go through the model, about: the measure of progress
    measure: Callable[[Callable[[], Any], Tick], Rows]


def evaluate_model(
    eval_model: EvalModel,
    texts: Texts,
    context_lengths: Sequence[int],
    settings: EvalSettings,
    *,
    done: Rows | None = None,
    save: Callable[[Rows], None] | None = None,
    progress: bool = True,
) -> Rows:
    """Rows of every task at each length, measured now or before.

    Args:
        done: rows measured before, of any model.
        save: is given all rows, those of other models among them, after every unit.

    Raises:
        SkipwiseError: an unknown task, a benchmark that cannot be had.
    """
    check_settings(settings)
    rows = list(done or [])
    lengths = sorted(set(context_lengths))
    units = list(_units(eval_model, texts, lengths, settings))
    have = {row.get("key") for row in rows if row["model"] == eval_model.label}
    missing = [unit for unit in units if unit.key not in have]
    _check_benchmarks([u.name for u in missing if u.kind == "benchmark"], settings)
    model = _Loaded(eval_model.load)
    digest = texts.digest(eval_model.tokenizer)
    left_out = _without_text(texts, settings.tasks, lengths)
    total = sum(unit.tokens for unit in missing)
    with Progress(f"evaluate {eval_model.label}", total, progress) as bar:
        for unit in missing:
            bar.begin(unit.name, unit.tokens)
            found = unit.measure(model, bar.tick)
            bar.finish()
            rows = [row for row in rows if not _replaced(row, found, eval_model.label)]
            if unit.kind == "text":  # other windows have other targets
                tasks = {row["task"] for row in found}
                mine = eval_model.label
                rows = [r for r in rows if r["model"] != mine or r["task"] not in tasks]
            marks = {"key": unit.key} | ({"text": digest} if unit.of_text else {})
            rows += [{"model": eval_model.label, **row, **marks} for row in found]
            if not found:
                left_out.append(f"{unit.name} (it does not fit)")
            elif save is not None:
                save(rows)
    if left_out and progress:
        print(f"left out: {', '.join(left_out)}", file=sys.stderr, flush=True)
    keys = {unit.key for unit in units}
    return [row for row in rows if row["model"] == eval_model.label and row.get("key") in keys]


def check_settings(settings: EvalSettings) -> None:
    """Refuse counts that would be read as something else.

    Raises:
        SkipwiseError: names the key.
    """
    for key in ("num_depths", "needles_per_haystack", "batch_tokens", "perplexity_stride", "limit"):
        if getattr(settings, key) == 0:
            raise SkipwiseError(f"eval.{key} is 0: give 1 or more")
    if not settings.tasks or not all(settings.tasks):
        raise SkipwiseError(f"which tasks? choose from {', '.join(OWN_TASKS)}, short-benchmarks")


class _Loaded:
    """The model, loaded when it is first asked for."""

    def __init__(self, load: Callable[[], Any]) -> None:
        self.load, self.model = load, None

    def __call__(self) -> Any:
        if self.model is None:
            self.model = self.load().eval()
        return self.model


def _units(
    eval_model: EvalModel, texts: Texts, lengths: list[int], settings: EvalSettings
) -> Iterator[_Unit]:
    tasks = _expanded(settings.tasks)
    tokenizer = eval_model.tokenizer
    text = texts.identity()
    words: dict[int, list[str]] = {}

    def key(*facts: Any) -> str:
        whole = json.dumps([_VERSION, eval_model.identity, settings.seed, *facts], default=str)
        return hashlib.sha1(whole.encode(), usedforsecurity=False).hexdigest()[:12]

    for task in tasks:
        if task == "perplexity":
            fitting = fitting_lengths(texts.documents, lengths)
            if not fitting or not settings.perplexity_windows:
                continue
            yield _Unit(
                name=task,
                kind="text",
                of_text=True,
                key=key(
                    task, fitting, settings.perplexity_windows, settings.perplexity_stride, text
                ),
                tokens=sum(fitting) * settings.perplexity_windows,
                measure=_perplexity(texts, tokenizer, fitting, settings),
            )
        elif task in OWN_TASKS:
            for length in lengths:
                if length not in words:  # of each length its own: the set depends on nothing else
                    words[length] = haystack_words(tokenizer, texts.documents, 2 * length)
                unit = _unit(task, length, tokenizer, words[length], settings, key, text)
                if unit is not None:
                    yield unit
        else:
            yield _Unit(
                name=task,
                kind="benchmark",
                of_text=False,
                key=key(task, settings.limit, harness_identity(settings.task_folder)),
                tokens=0,
                measure=_benchmark(task, tokenizer, settings),
            )


def _unit(
    task: str,
    length: int,
    tokenizer: Any,
    words: list[str],
    settings: EvalSettings,
    key: Callable[..., str],
    text: str,
) -> _Unit | None:
    if task in ("passkey", "needle"):
        count = settings.passkey_samples if task == "passkey" else settings.needle_samples
        facts = (task, length, count, settings.num_depths)
        if task == "needle":
            facts += (settings.needles_per_haystack, text)
        measure = _retrieval(task, length, count, tokenizer, words, settings)
        if task == "needle" and not words:
            return None
    else:
        count = settings.ruler_samples
        facts = (task, length, count, text)
        measure = _ruler(task, length, tokenizer, words, settings)
    if not count:
        return None
    return _Unit(
        name=f"{task} {length:,}",
        kind="trials",
        of_text=task != "passkey",
        key=key(*facts),
        tokens=count * length,
        measure=measure,
    )


def _perplexity(
    texts: Texts, tokenizer: Any, lengths: Sequence[int], settings: EvalSettings
) -> Any:
    def measure(model: Callable[[], Any], tick: Tick) -> Rows:
        return perplexity(
            model(),
            texts.documents,
            lengths,
            tokenizer=tokenizer,
            stride=settings.perplexity_stride,
            num_windows=settings.perplexity_windows,
            batch_tokens=settings.batch_tokens,
            tick=tick,
        )

    return measure


def _retrieval(
    task: str, length: int, count: int, tokenizer: Any, words: list[str], settings: EvalSettings
) -> Any:
    def measure(model: Callable[[], Any], tick: Tick) -> Rows:
        if task == "passkey":
            trials = passkey.passkey_trials(
                tokenizer,
                length,
                num_trials=count,
                num_depths=settings.num_depths,
                seed=settings.seed,
            )
        else:
            trials = passkey.needle_trials(
                tokenizer,
                length,
                num_trials=count,
                num_depths=settings.num_depths,
                words=words,
                per_haystack=settings.needles_per_haystack,
                seed=settings.seed,
            )
        if not trials:
            return []
        right = exact_match(model(), trials, settings.batch_tokens, tick)
        return passkey.rows_by_depth(task, length, trials, right)

    return measure


def _ruler(task: str, length: int, tokenizer: Any, words: list[str], settings: EvalSettings) -> Any:
    def measure(model: Callable[[], Any], tick: Tick) -> Rows:
        samples = ruler.make_samples(
            task,
            tokenizer,
            length,
            num_samples=settings.ruler_samples,
            seed=settings.seed,
            words=words,
        )
        if not samples:
            return []
        shares = recall(model(), tokenizer, samples, settings.batch_tokens, tick)
        value, low, high = mean_interval(shares)
        return [
            {
                "task": task,
                "group": "ruler",
                "metric": "recall",
                "context_length": length,
                "value": value,
                "low": low,
                "high": high,
                "num_samples": len(samples),
            }
        ]

    return measure


def _benchmark(task: str, tokenizer: Any, settings: EvalSettings) -> Any:
    def measure(model: Callable[[], Any], tick: Tick) -> Rows:
        return benchmarks.run_benchmark(
            model(),
            tokenizer,
            task,
            limit=settings.limit,
            task_folder=settings.task_folder,
            seed=settings.seed,
        )

    return measure


def _expanded(tasks: Sequence[str]) -> list[str]:
    """Each task once; `ruler` is all of its tasks, `short-benchmarks` all of its benchmarks."""
    names: dict[str, None] = {}
    for task in tasks:
        if task == "ruler":
            names.update(dict.fromkeys(ruler.TASKS))
        elif task in OWN_TASKS:
            names[task] = None
        else:
            names.update(dict.fromkeys(benchmarks.expand([task])))
    return list(names)


def _check_benchmarks(names: list[str], settings: EvalSettings) -> None:
    """What lm-evaluation-harness would refuse, before a model is loaded."""
    for name in names:
        near = difflib.get_close_matches(name, [*OWN_TASKS, "short-benchmarks"], 1, 0.75)
        try:
            benchmarks.check_benchmarks([name], task_folder=settings.task_folder)
        except SkipwiseError as error:
            if near and "no task" in str(error):
                raise SkipwiseError(f"{name!r} is no task: did you mean {near[0]}?") from error
            raise


def _without_text(texts: Texts, tasks: Sequence[str], lengths: list[int]) -> list[str]:
    """What is not measured for want of text."""
    out = []
    if not texts.documents:
        out += [f"{task} (no text)" for task in ("perplexity", "needle") if task in tasks]
    elif "perplexity" in tasks:
        fitting = fitting_lengths(texts.documents, lengths)
        missed = [f"{length:,}" for length in lengths if length not in fitting]
        if missed:
            out.append(f"perplexity at {', '.join(missed)} (no document is as long)")
    return out


def _replaced(row: dict[str, Any], found: Rows, label: str) -> bool:
    """Whether an old row of the model measures what a new one does, with other settings."""
    if row["model"] != label:
        return False
    return any(
        (row["task"], row["metric"], row.get("context_length"))
        == (new["task"], new["metric"], new.get("context_length"))
        for new in found
    )
