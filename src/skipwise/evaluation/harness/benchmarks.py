"""Standard benchmarks of lm-evaluation-harness: what a longer window costs at short context.

Any task or group of the harness can be named, or the suite `short-benchmarks`. Prompts, targets and
metrics are the harness's own; the model keeps its own window. Tasks may also come from a folder of
YAML files (see `task_folder`), so that nothing has to be downloaded. `lm_eval/NAME` is always the
harness's task, where NAME alone is one of Skipwise's own. Its RULER and BABILong are measured at
every context length (see `long_tasks`).

Source: the suite is table 6 of PoSE, Zhu et al. 2024, arXiv 2309.10400; metrics as on the Open LLM
        Leaderboard of its day, which takes acc_norm for ARC and HellaSwag and acc elsewhere
"""

from __future__ import annotations

import difflib
import functools
import math
import random
import tempfile
import warnings
from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from skipwise.config.recipe import EvalSettings
from skipwise.errors import SkipwiseError, first_line
from skipwise.evaluation.fingerprint import harness_identity
from skipwise.evaluation.harness import long_tasks
from skipwise.evaluation.harness.adapter import guarded, script_refusal, with_metadata, wrap
from skipwise.evaluation.harness.task_folder import read_task_folder
from skipwise.evaluation.tasks import task_names
from skipwise.evaluation.tasks.prompts import ChatPrompts
from skipwise.evaluation.tasks.task import Task, TaskInputs
from skipwise.models.hf_config import unreachable_hub
from skipwise.report.rows import Rows

SHORT_BENCHMARKS = {  # task: (num_fewshot, metric)
    "boolq": (0, "acc"),
    "piqa": (0, "acc"),
    "winogrande": (0, "acc"),
    "truthfulqa_mc2": (0, "acc"),
    "arc_challenge": (25, "acc_norm"),
    "hellaswag": (10, "acc_norm"),
}
PREFIX = "lm_eval/"
_SHARES = ("acc", "acc_norm", "exact_match")  # their intervals are within 0 .. 1
_BOOTSTRAPS = 1000  # for metrics that are not means: the standard error to 2 %


def expand(names: Sequence[str]) -> list[str]:
    """Task names, each once, with `short-benchmarks` replaced by its six."""
    each = (SHORT_BENCHMARKS if name == "short-benchmarks" else (name,) for name in names)
    return list(dict.fromkeys(name for some in each for name in some))


def make_task(typed: str) -> Task:
    """A task or group of the harness as a task of the evaluation; its name is not checked here.

    Args:
        typed: its name, also as `lm_eval/NAME`; so its rows are named if Skipwise has the NAME.
    """
    name = typed.removeprefix(PREFIX)
    by_length = long_tasks.has_lengths(name)

    def measure(inputs: TaskInputs) -> Rows:
        settings, tokenizer = inputs.settings, inputs.tokenizer
        chat = isinstance(tokenizer, ChatPrompts)
        options: dict[str, Any] = {"limit": settings.limit, "task_folder": settings.task_folder}
        if by_length:
            if not long_tasks.fits(name, inputs.length):
                return []
            rows_per_batch = max(1, min(8, settings.batch_tokens // inputs.length))
            options |= {"context_length": inputs.length, "batch_size": rows_per_batch}
        rows = run_benchmark(
            inputs.model,
            tokenizer.tokenizer if chat else tokenizer,
            name,
            seed=settings.seed,
            chat_template=chat,
            **options,
        )
        return [{**row, "task": _shown(row["task"])} for row in rows]

    def check(settings: EvalSettings, load: bool) -> None:
        if by_length:
            long_tasks.check_requirements(name)
        load = load and not by_length  # their data sets are made for a length
        check_benchmarks([name], task_folder=settings.task_folder, load=load)

    return Task(
        name=_shown(name),
        measure=measure,
        num_samples=lambda settings: settings.limit,
        cache_key=lambda settings: (settings.limit, harness_identity(settings.task_folder)),
        lengths="each" if by_length else "none",
        check=check,
    )


def _shown(name: str) -> str:
    return f"{PREFIX}{name}" if name in task_names() else name


def check_benchmarks(
    names: Sequence[str], *, task_folder: str | None = None, load: bool = True
) -> None:
    """Raise what `run_benchmark` would raise, before the model runs.

    Args:
        load: download the data sets. Without them only the names are checked.
    """
    for name in expand(names):
        with guarded() as refused:
            _load(name, task_folder, refused, load)


def run_benchmark(
    model: Any,
    tokenizer: Any,
    name: str,
    *,
    limit: int | None = None,
    task_folder: str | None = None,
    batch_size: int = 8,
    max_length: int | None = None,
    seed: int = 0,
    chat_template: bool = False,
    context_length: int | None = None,
) -> Rows:
    """Rows of one task or group, one per metric.

    A task of `short-benchmarks` has the suite's few-shot count and metric. Any other has its own
    few-shot count and all of its metrics; a group that the harness averages has one row per metric.

    Args:
        model: causal language model of transformers, on its device; it is not changed.
        limit: number of questions per task, from the first. Defaults to all.
        task_folder: YAML files of tasks; their names take precedence over the harness's.
        batch_size: rows of a forward pass; logits take rows x tokens x vocabulary x 4 bytes, twice.
        max_length: tokens the model sees; longer prompts lose their start. Defaults to its window.
        seed: draws the few-shot examples.
        chat_template: write the questions as a user's turns, few-shot examples as earlier turns.
        context_length: of the prompts, for a task of `long_tasks`. The model sees all of them.

    Returns:
        rows with `value`, its 95 % interval `low` and `high` (None without a standard
        error), and `num_truncated`, the prompts that lost their start.

    Raises:
        SkipwiseError: lm-eval missing, unknown task, data set not reachable, task that runs code.
    """
    if limit is not None and limit < 1:
        raise SkipwiseError(f"limit={limit}: at least one question a task, or none for all")
    with guarded(model) as refused, tempfile.TemporaryDirectory() as folder:
        more: dict[str, Any] | None = None
        if context_length is not None:
            tokenizer.save_pretrained(folder)  # the harness takes a name or a folder
            more = long_tasks.metadata(name, context_length, folder)
        _set_seed(seed)  # RULER draws its prompts as it is loaded
        loaded = _load(name, task_folder, refused, metadata=more)
        num_fewshot, metric = SHORT_BENCHMARKS.get(name, (None, None))
        for task in loaded["tasks"].values():
            _set_fewshot(task, num_fewshot, seed)
        from lm_eval.evaluator import evaluate

        _set_seed(seed)
        need = context_length + long_tasks.ROOM if context_length else 0
        lm = wrap(model, tokenizer, batch_size, max_length, at_least=need)
        _check_answers_fit(loaded, lm.max_length)
        results: Any = evaluate(
            lm=lm,
            task_dict=loaded,
            limit=limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
        )
    if lm.num_truncated:
        warnings.warn(
            f"{name}: {lm.num_truncated} prompts lost their start, as they are longer than "
            f"the window of {lm.max_length} tokens",
            stacklevel=2,
        )
    reported = list(loaded["tasks"]) if name == "ruler" else _reported(name, loaded, results)
    found = [row for key in reported for row in _rows(key, results)]
    rows = [row for row in found if metric in (None, row["metric"])]
    if not rows:
        raise SkipwiseError(f"{name} gave no number for {metric or 'any metric'}")
    rows = [{**row, "num_truncated": lm.num_truncated} for row in rows]
    return rows if context_length is None else long_tasks.rows_at(context_length, rows, name)


def _set_seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _check_answers_fit(loaded: dict[str, Any], window: int) -> None:
    for name, task in loaded["tasks"].items():
        kwargs = task.get_config("generation_kwargs") or {}
        if (new := kwargs.get("max_gen_toks", 0)) >= window:
            raise SkipwiseError(
                f"{name} lets a model answer with {new:,} tokens, more than its window of "
                f"{window:,} holds\nleave this benchmark out, or give a longer window"
            )


def _load(
    name: str,
    task_folder: str | None,
    refused: list[str],
    load: bool = True,
    metadata: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """`{"tasks": {name: Task}, "groups": {name: Group}}`, with their data sets."""
    from lm_eval.tasks import TaskManager

    manager = _built_in()
    with tempfile.TemporaryDirectory() as scratch:
        if task_folder is not None:
            # lm-eval reads the checked copy, which has no Python beside it
            for i, config in enumerate(read_task_folder(task_folder, manager.task_index)):
                Path(scratch, f"{i}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
            local = TaskManager(include_defaults=False, include_path=scratch)
            for known, entry in manager.task_index.items():
                # a name of the folder wins, also inside a group; a tag has the tasks of both
                local.task_index.setdefault(known, entry).tags |= entry.tags
            manager = local
        if name not in manager.task_index:
            near = difflib.get_close_matches(name, manager.task_index, n=3, cutoff=0.5)
            advice = f"did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks shows all"
            raise SkipwiseError(f"lm-eval has no task {name!r}: {advice}")
        if load:
            unreachable_hub()
        try:
            manager = with_metadata(manager, metadata)
            loaded: Any = manager.load([name]) if load else {"tasks": {}}
        except SkipwiseError:
            raise
        except OSError as error:  # datasets' and the hub's errors of connection and of absence
            raise SkipwiseError(
                f"the data set of {name} cannot be read: {first_line(error)}\n"
                "run it once where the hub can be reached, or put the rows on disk and type "
                "eval.task_folder=DIR"
            ) from error
        except Exception as error:
            raise SkipwiseError(f"lm-eval cannot make {name}: {first_line(error)}") from error
    if refused:  # lm-eval swallows the refusal
        raise SkipwiseError(script_refusal(refused[0]))
    for task in loaded["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False) or getattr(task, "MULTIMODAL", False):
            raise SkipwiseError(
                f"{name} runs code that the model writes, or is multimodal: not supported"
            )
    return loaded


def _set_fewshot(task: Any, num_fewshot: int | None, seed: int) -> None:
    """Defaults to the task's own. simple_evaluate would not change a task that says 0 itself."""
    if num_fewshot is None:
        num_fewshot = task.get_config("num_fewshot") or 0
    pool = getattr(getattr(task, "sampler", None), "df", None)
    if num_fewshot and pool is not None and len(pool) < num_fewshot:
        raise SkipwiseError(
            f"{task.task_name} has {len(pool)} rows to draw {num_fewshot} examples from: add rows"
        )
    task.set_config("num_fewshot", num_fewshot)
    task.set_fewshot_seed(seed)


@functools.cache
def _built_in() -> Any:
    """The harness's own tasks: reading its 14,000 names takes 6 seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _reported(name: str, loaded: dict[str, Any], results: Any) -> list[str]:
    """The task or group itself; the members of a tag, or of a group without an average."""
    if name in results["results"]:
        if "sample_len" in results["results"][name]:
            return [name]
        members = results["group_subtasks"][name]
        return [key for member in members for key in _reported(member, loaded, results)]
    return list(loaded["tasks"])


def _rows(name: str, results: Any) -> Rows:
    numbers = results["results"][name]
    rows = []
    for key, value in numbers.items():
        metric, comma, filtered = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, Real):
            continue
        value, stderr = _finite(value), _finite(numbers.get(f"{metric}_stderr,{filtered}"))
        low, high = None, None
        if value is not None and stderr is not None:
            low, high = value - 1.96 * stderr, value + 1.96 * stderr
            if metric in _SHARES:
                low, high = max(0.0, low), min(1.0, high)
        row = {
            "task": name,
            "metric": metric if filtered == "none" else key,
            "context_length": None,
            "num_fewshot": results["n-shot"].get(name),  # None: its members differ
            "value": value,
            "low": low,
            "high": high,
            "stderr": stderr,
            "num_samples": numbers["sample_len"],
            "kind": "benchmark",
        }
        better = results["higher_is_better"].get(name, {}).get(metric)
        rows.append(row if better is None else {**row, "higher_is_better": bool(better)})
    return rows


def _finite(number: Any) -> float | None:
    return float(number) if isinstance(number, Real) and math.isfinite(number) else None
