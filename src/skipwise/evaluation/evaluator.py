"""All measurements of one model, each saved as soon as it is done and never repeated.

A unit is a task at a context length, or at all of them together. Its rows carry a key of everything
that decides them: settings, texts, the model's files. A unit whose key is in the old rows is not
measured again, and the model is loaded only if a unit is missing.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.config.machine import is_main_process, world_size
from skipwise.config.progress import Progress
from skipwise.config.recipe import EvalSettings
from skipwise.data.chat import ChatTokens, check_template
from skipwise.errors import SkipwiseError
from skipwise.evaluation.harness import benchmarks
from skipwise.evaluation.tasks import TASKS, Task, TaskInputs, task_names
from skipwise.evaluation.tasks.key_tokens import Evaluator, Reference, vocabulary
from skipwise.evaluation.tasks.perplexity import find_reference, fitting_lengths
from skipwise.evaluation.tasks.prompts import ChatPrompts, haystack_words
from skipwise.models.load import free_memory
from skipwise.models.separator import Separator
from skipwise.report.rows import Row, Rows

_VERSION = 1  # raise it when what the tasks ask or how they count changes


@dataclass(frozen=True, kw_only=True)
class EvalModel:
    """A model to measure."""

    label: str  # `model` in the rows: before, after, or a name
    load: Callable[[], Any]  # returns the causal language model on its device
    tokenizer: Any
    identity: Any = None  # JSON that changes when the weights do
    weights: Any = None  # the same without the tokenizer, to see that it is the evaluator
    separator: Separator | None = None  # the tokens around its documents


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Documents for perplexity and haystacks, as token ids."""

    documents: Sequence[np.ndarray] = ()

    def digest(self, tokenizer: Any) -> str:
        """A hash of how the documents begin, the same for every tokenizer."""
        digest = hashlib.sha1(usedforsecurity=False)
        for tokens in self.documents[:64]:
            start = tokenizer.decode(np.asarray(tokens[:400]).tolist(), skip_special_tokens=True)
            digest.update("".join(start.split())[:200].encode() + b"|")
        return digest.hexdigest()[:12]

    def identity(self) -> str:
        digest = hashlib.sha1(usedforsecurity=False)
        for tokens in self.documents:
            digest.update(np.asarray(tokens, np.int64).tobytes() + b"|")
            if isinstance(tokens, ChatTokens):
                digest.update(tokens.masked.tobytes())
        return digest.hexdigest()[:12]


@dataclass(frozen=True, kw_only=True)
class _Unit:
    """A task at the context lengths whose rows are saved together."""

    task: Task
    lengths: tuple[int, ...]
    key: str
    asked: str  # digest of the settings that decide the questions, whatever the model
    tokens: int  # about how many go through the model, for the progress bar

    @property
    def name(self) -> str:
        each = self.task.lengths == "each"
        return f"{self.task.name} {self.lengths[0]:,}" if each else self.task.name


def evaluate_model(
    eval_model: EvalModel,
    texts: Texts,
    context_lengths: Sequence[int],
    settings: EvalSettings,
    *,
    done: Rows | None = None,
    save: Callable[[Rows], None] | None = None,
    progress: bool = True,
    evaluator: Evaluator | None = None,
) -> Rows:
    """Rows of every task at each length, measured now or before.

    Args:
        done: rows measured before, of any model.
        save: called after every unit with all rows, those of other models included.
        evaluator: chooses LongPPL's key tokens. A model with another vocabulary has no LongPPL.

    Raises:
        SkipwiseError: unknown task, benchmark that cannot be loaded.
    """
    check_settings(settings)
    progress = progress and is_main_process()
    rows, label = list(done or []), eval_model.label
    tasks, lengths = find_tasks(settings.tasks), sorted(set(context_lengths))
    if evaluator is not None and evaluator.vocabulary != vocabulary(eval_model.tokenizer):
        evaluator = None
    own = [row for row in rows if row["model"] == label]
    units = list(_units(tasks, eval_model, texts, lengths, settings, evaluator, own))
    known = {row.get("key") for row in rows if row["model"] == label}
    missing = [unit for unit in units if unit.key not in known]
    kept = {unit.key: why for unit in missing if (why := _would_lose(own, unit))}
    missing = [unit for unit in missing if unit.key not in kept]
    check_tasks([unit.task for unit in missing], settings)
    tokenizer = eval_model.tokenizer
    asks_chat = settings.chat_template is True
    if asks_chat:
        check_template(tokenizer, f"eval.chat_template, {label}")
    load_model = functools.cache(lambda: eval_model.load().eval())
    haystack = functools.cache(lambda n: haystack_words(tokenizer, texts.documents, n))
    digest = texts.digest(tokenizer)
    left_out = _without_text(tasks, texts, lengths) + list(kept.values())
    reference = None
    for unit in missing if evaluator is not None else ():
        if unit.task.name == "perplexity" and evaluator is not None:
            load = load_model if evaluator.weights == eval_model.weights else evaluator.load
            reference = _reference(evaluator, load, texts, unit.lengths, settings)
    total = sum(unit.tokens for unit in missing)
    with Progress(f"evaluate {label}", total, unit=" tokens", shown=progress) as bar:
        for unit in missing:
            bar.begin(unit.name, unit.tokens)
            inputs = TaskInputs(
                load_model=load_model,
                tokenizer=ChatPrompts(tokenizer) if asks_chat else tokenizer,
                documents=texts.documents,
                haystack=haystack,
                lengths=unit.lengths,
                settings=settings,
                tick=lambda tokens: bar.tick(tokens * world_size()),  # the others do as much
                reference=reference,
            )
            found = unit.task.measure(inputs)
            bar.finish()
            if not found:
                left_out.append(f"{unit.name} (it does not fit)")
                continue
            marks = {"key": unit.key, "asked": unit.asked}
            marks |= {} if unit.task.text == "unused" else {"text": digest}
            rows = [row for row in rows if not _replaced(row, found, label, unit.task)]
            rows += [{"model": label, **row, **unit.task.display(), **marks} for row in found]
            if save is not None:
                save(rows)
    if left_out and progress:
        print(f"left out: {', '.join(left_out)}", file=sys.stderr, flush=True)
    keys = {unit.key for unit in units}
    return [row for row in rows if row["model"] == label and row.get("key") in keys]


def _reference(
    evaluator: Evaluator,
    load: Callable[[], Any],
    texts: Texts,
    lengths: tuple[int, ...],
    settings: EvalSettings,
) -> Reference | None:
    """What the evaluator chooses on these texts, now or before; it is not kept in memory."""
    contexts = evaluator.contexts(lengths[-1], lengths[0])
    if contexts is None:
        return None
    size = {"stride": settings.perplexity_stride, "num_windows": settings.perplexity_windows}

    def choose() -> Reference:
        arguments: dict[str, Any] = {**size, "batch_tokens": settings.batch_tokens}
        model, name = load().eval(), evaluator.name
        return find_reference(model, texts.documents, lengths, contexts, name=name, **arguments)

    key = [*evaluator.key(lengths), lengths, *size.values(), texts.identity()]
    found = evaluator.find(key, choose)
    free_memory()
    if not found.is_finite:
        print("no LongPPL and no gain: the evaluator's loss is no number", file=sys.stderr)
        return None
    return found


def check_settings(settings: EvalSettings) -> None:
    """Refuse counts of 0, which would mean a default, and an empty list of tasks.

    Raises:
        SkipwiseError: names the key.
    """
    for key in ("num_depths", "needles_per_haystack", "batch_tokens", "perplexity_stride", "limit"):
        if getattr(settings, key) == 0:
            raise SkipwiseError(f"eval.{key} is 0: give 1 or more")
    folder = settings.task_folder
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise SkipwiseError(f"eval.task_folder={folder} is not a folder")
    if not settings.tasks or not all(settings.tasks):
        raise SkipwiseError(f"eval.tasks is empty: choose from {', '.join(_known_names())}")


def _known_names() -> list[str]:
    return [*task_names(), "short-benchmarks"]


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names and groups, each once; other names are benchmarks of lm-eval."""
    found: dict[str, Task] = {}
    for name in names:
        own = [task for task in TASKS.values() if name in (task.name, task.group)]
        for task in own or map(benchmarks.make_task, benchmarks.expand([name])):
            found.setdefault(task.name, task)
    return list(found.values())


def _units(
    tasks: Sequence[Task],
    eval_model: EvalModel,
    texts: Texts,
    lengths: Sequence[int],
    settings: EvalSettings,
    evaluator: Evaluator | None,
    done: Sequence[Row] = (),
) -> Iterator[_Unit]:
    """What has to be measured; the lengths of a task that fix its targets include those of `done`.

    Other lengths would have other targets, and replace the results that there are.
    """
    text = texts.identity()
    for task in tasks:
        count = task.num_samples(settings)
        if count == 0 or (task.text == "required" and not texts.documents):
            continue
        groups: list[tuple[int, ...]] = [(length,) for length in lengths]
        if task.lengths == "together":
            earlier = {row["context_length"] for row in done if row["task"] == task.name}
            within = {n for n in earlier if n <= lengths[-1]}
            fitting = fitting_lengths(texts.documents, sorted({*lengths, *within}))
            groups = [fitting] if fitting else []
        elif task.lengths == "none":
            groups = [()]
        for group in groups:
            of_task = [*task.cache_key(settings), *([task.version] if task.version else [])]
            decides = [_VERSION, eval_model.identity, settings.seed, task.name]
            decides += [group] if task.lengths == "together" else group
            decides += of_task
            place = () if task.lengths == "together" else group  # there, targets tell
            asked = _digest(
                [task.name, settings.seed, place, of_task, settings.chat_template is True]
            )
            decides += [] if task.text == "unused" else [text]
            if evaluator is not None and task.name == "perplexity":
                decides += evaluator.key(group)
            if settings.chat_template is True:
                decides.append(eval_model.tokenizer.chat_template)
            tokens, key = sum(group) * (count or 0), _digest(decides)
            yield _Unit(task=task, lengths=group, key=key, asked=asked, tokens=tokens)


def _digest(facts: list[Any]) -> str:
    encoded = json.dumps(facts, default=str).encode()
    return hashlib.sha1(encoded, usedforsecurity=False).hexdigest()[:12]


def check_tasks(tasks: Sequence[Task], settings: EvalSettings, *, load: bool = True) -> None:
    """Raise what measuring would raise, before the model is loaded.

    Args:
        load: load the data sets of benchmarks. Without them only the names are checked.
    """
    for task in tasks:
        try:
            if task.check is not None:
                task.check(settings, load)
        except SkipwiseError as error:
            near = difflib.get_close_matches(task.name, _known_names(), 1, 0.75)
            if near and ("no task" in str(error) or "need lm-eval" in str(error)):
                raise SkipwiseError(f"no task {task.name!r}: did you mean {near[0]}?") from error
            raise


def _without_text(tasks: Sequence[Task], texts: Texts, lengths: Sequence[int]) -> list[str]:
    """Tasks, or their lengths, that have no text."""
    out = []
    for task in tasks:
        if task.text != "required":
            continue
        if not texts.documents:
            out.append(f"{task.name} (no text)")
        elif task.lengths == "together":
            fitting = fitting_lengths(texts.documents, lengths)
            if long := [f"{length:,}" for length in lengths if length not in fitting]:
                out.append(f"{task.name} at {', '.join(long)} (no document is that long)")
    return out


def _would_lose(own: Rows, unit: _Unit) -> str:
    """Why perplexity is not measured: it would replace results at longer lengths. Else empty."""
    known = {row["context_length"] for row in own if row["task"] == unit.task.name}
    lost = sorted(known - set(unit.lengths)) if unit.task.lengths == "together" else []
    listed = ", ".join(f"{n:,}" for n in lost)
    return f"{unit.task.name} (its results at {listed} tokens would be lost)" if lost else ""


def _replaced(row: Row, found: Rows, label: str, task: Task) -> bool:
    """Whether an old row of the model measures what a new one does, with other settings."""
    if row["model"] != label:
        return False
    if task.lengths == "together" and row["task"] == task.name:
        return True  # at other lengths it had other targets
    return any(
        (row["task"], row["metric"], row.get("context_length"))
        == (new["task"], new["metric"], new.get("context_length"))
        for new in found
    )
