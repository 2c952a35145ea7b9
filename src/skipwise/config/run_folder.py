"""The run folder, the contract between the verbs: each reads and writes there.

recipe.yaml     what was asked, defaults written out
run.json        what is known of the run: model, data, checks, stages, versions
metrics.jsonl   a line a training step
checkpoints/    of the Trainer
finish/         recipe.yaml and checkpoints of the last part, at full length
candidates/     weights of checkpoints to choose from, where the recipe chooses
converted/      the base model, where its family had to be converted
results.json    tidy rows of the evaluation
report/         the page        model/   what is handed over        gguf/   the same for llama.cpp
adapter/        LoRA alone, with the config it needs
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from skipwise.config.machine import is_main_process, machine, versions

try:
    import fcntl
except ImportError:
    fcntl = None

from skipwise.config.parse import dump_recipe, load_run_recipe
from skipwise.config.recipe import Recipe
from skipwise.errors import SkipwiseError


class RunFolder:
    """Paths and JSON of one run; every file is replaced whole, so a kill leaves the old one.

    Of several processes that train together the first one writes.
    """

    def __init__(self, path: str | Path, part_of: RunFolder | None = None) -> None:
        self.path = Path(path)
        self.whole = part_of or self  # whose metrics and candidates a part's go to

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.whole.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def converted(self) -> Path:
        return self.path / "converted"

    @property
    def candidates(self) -> Path:
        return self.whole.path / "candidates"

    @property
    def finish(self) -> RunFolder:
        """The folder of the last part of training, where the recipe has a finish."""
        return RunFolder(self.path / "finish", part_of=self)

    @property
    def eval_documents(self) -> Path:
        return self.path / "eval_documents.jsonl"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def gguf(self) -> Path:
        return self.path / "gguf"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def recipe(self) -> Recipe:
        if not self.recipe_file.exists():
            raise SkipwiseError(f"{self.path} is not a run folder: it has no recipe.yaml")
        return load_run_recipe(self.recipe_file)

    def metadata(self) -> dict[str, Any]:
        return _read_json(self.path / "run.json", {})

    def update(self, **metadata: Any) -> None:
        """Put facts into run.json, beside those already there."""
        if is_main_process():
            write_json(self.path / "run.json", {**self.metadata(), **metadata})

    def results(self) -> list[dict[str, Any]]:
        file = self.path / "results.json"
        rows = _read_json(file, [])
        sound = isinstance(rows, list) and all(
            isinstance(row, dict) and {"model", "task", "metric"} <= set(row) for row in rows
        )
        if not sound:
            raise SkipwiseError(
                f"{file} does not hold rows of results\nremove it: what it held is measured again"
            )
        return rows

    def lock(self) -> AbstractContextManager[None]:
        """Hold the folder's results: two that write them would lose each other's.

        Raises:
            SkipwiseError: another process holds them.
        """
        return self._held(".lock", "measuring")

    def training_lock(self) -> AbstractContextManager[None]:
        """Hold the folder's checkpoints, in the first of the processes that train.

        Raises:
            SkipwiseError: another process trains.
        """
        return self._held(".train.lock", "training") if is_main_process() else nullcontext()

    @contextmanager
    def _held(self, name: str, what: str) -> Iterator[None]:
        if fcntl is None:  # Windows
            yield
            return
        with (self.path / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SkipwiseError(
                    f"another process is {what} into {self.path}\nwait for it, or type "
                    "another --out"
                ) from error
            yield

    def write_results(self, rows: list[dict[str, Any]]) -> None:
        write_json(self.path / "results.json", rows)


def open_run(path: str | Path, recipe: Recipe, command: str) -> RunFolder:
    """Make the run folder, or go on with one that was made by the same recipe.

    Raises:
        SkipwiseError: the folder holds a run of another recipe, or something else.
    """
    run = RunFolder(path)
    text = dump_recipe(recipe)
    if run.recipe_file.exists():
        before = run.recipe()
        old = dump_recipe(dataclasses.replace(before, engine=recipe.engine))
        if old == text and before != recipe:
            if is_main_process():  # another engine trains the same
                write_text(run.recipe_file, text)
        elif old != text:
            changed = [a.strip() for a, b in _changed_lines(old, text)][:3]
            raise SkipwiseError(
                f"{run.path} holds a run of another recipe (it differs in {'; '.join(changed)})\n"
                "type another --out, or remove the folder"
            )
        return run
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise SkipwiseError(f"{run.path} exists and is not a run folder: type another --out")
    if not is_main_process():
        raise SkipwiseError(
            f"{run.path} is not there for process {os.environ['RANK']}\n"
            "--out has to be on a disk that all machines share"
        )
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        write_text(run.recipe_file, text)
    except OSError as error:
        raise SkipwiseError(f"{run.path} cannot be written: {error.strerror}") from error
    run.update(
        name=recipe.run_name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=command,
        status="started",
        versions=versions(),
        machine=machine(),
    )
    return run


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False, default=_jsonable) + "\n")


def _changed_lines(old: str, new: str) -> list[tuple[str, str]]:
    pairs = zip(old.splitlines(), new.splitlines(), strict=False)
    return [(a, b) for a, b in pairs if a != b] or [("more keys", "")]


def _read_json(path: Path, default: Any) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return default
    except ValueError as error:
        raise SkipwiseError(
            f"{path} is not JSON: {error}\nremove it: what it held is measured again"
        ) from error


def _jsonable(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | set):
        return list(value)
    return str(value)
