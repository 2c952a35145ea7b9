"""The run folder, through which the commands share their work.

recipe.yaml     the recipe, with all defaults
run.json        model, data, checks, stages and versions
metrics.jsonl   one line per training step
checkpoints/    the Trainer's checkpoints
finish/         recipe.yaml and checkpoints of the full-length stage
candidates/     weights of earlier checkpoints, if export.checkpoint chooses among them
converted/      the base model, if its family had to be converted
results.json    one row per measurement of the evaluation
key_tokens.json the targets that LongPPL is measured on, as its evaluator chose them
report/         the HTML page
model/          the exported model; adapter/ LoRA alone with its config; gguf/ for llama.cpp
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

from skipwise.config.parse import describe_changes, dump_recipe, load_run_recipe
from skipwise.config.recipe import Recipe
from skipwise.config.trust import consent_to_code
from skipwise.errors import SkipwiseError


class RunFolder:
    """Paths and JSON of one run. Files are replaced atomically, and only rank 0 writes."""

    def __init__(self, path: str | Path, parent: RunFolder | None = None) -> None:
        self.path, self.parent = Path(path), parent
        main = self.path if parent is None else parent.path
        self.metrics_file = main / "metrics.jsonl"  # a stage writes both to the main folder
        self.candidates = main / "candidates"
        self.recipe_file = self.path / "recipe.yaml"
        self.checkpoints = self.path / "checkpoints"
        self.converted = self.path / "converted"
        self.eval_documents = self.path / "eval_documents.jsonl"
        self.key_tokens = self.path / "key_tokens.json"
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.gguf = self.path / "gguf"
        self.report = self.path / "report"

    @property
    def finish(self) -> RunFolder:
        """The folder of the full-length stage."""
        return RunFolder(self.path / "finish", parent=self)

    def recipe(self) -> Recipe:
        if not self.recipe_file.exists():
            raise SkipwiseError(f"{self.path} is not a run folder: it has no recipe.yaml")
        main = self if self.parent is None else self.parent  # where the user's consent is kept
        return load_run_recipe(self.recipe_file, consent=main.metadata().get("consent"))

    def write_recipe(self, recipe: Recipe) -> None:
        """Write recipe.yaml, and that the user consented to the model's code, if it runs any.

        A recipe from a file runs none unless its user typed it, so that of `recipe` was typed.
        """
        write_text(self.recipe_file, dump_recipe(recipe))
        self.keep_consent(recipe)

    def keep_consent(self, recipe: Recipe) -> None:
        if recipe.load.trust_remote_code:
            self.update(consent=consent_to_code(recipe.model, recipe.load.revision))

    def metadata(self) -> dict[str, Any]:
        return read_json(self.path / "run.json", {})

    def update(self, **metadata: Any) -> None:
        """Add or replace top-level keys of run.json."""
        if is_main_process():
            write_json(self.path / "run.json", {**self.metadata(), **metadata})

    def results(self) -> list[dict[str, Any]]:
        file = self.path / "results.json"
        rows = read_json(file, [])
        valid = isinstance(rows, list) and all(
            isinstance(row, dict) and {"model", "task", "metric"} <= set(row) for row in rows
        )
        if not valid:
            raise SkipwiseError(
                f"{file} has no result rows\nremove it, and its contents will be measured again"
            )
        return rows

    def lock(self) -> AbstractContextManager[None]:
        """Lock the results: two writers would overwrite each other's rows."""
        return self._locked(".lock", "measuring")

    def training_lock(self) -> AbstractContextManager[None]:
        """Lock the checkpoints on rank 0; the other ranks do nothing."""
        return self._locked(".train.lock", "training") if is_main_process() else nullcontext()

    @contextmanager
    def _locked(self, name: str, what: str) -> Iterator[None]:
        """Hold a lock file; SkipwiseError if another process holds it."""
        if fcntl is None:  # Windows
            yield
            return
        with (self.path / name).open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise SkipwiseError(
                    f"another process is {what} into {self.path}\n"
                    "wait until it ends, or choose another --out"
                ) from error
            yield

    def write_results(self, rows: list[dict[str, Any]]) -> None:
        write_json(self.path / "results.json", rows)


def open_run(path: str | Path, recipe: Recipe, command: str) -> RunFolder:
    """Create the run folder, or open the one that the same recipe created.

    Raises:
        SkipwiseError: the folder holds a run of another recipe, or is no run folder.
    """
    run = RunFolder(path)
    text = dump_recipe(recipe)
    if run.recipe_file.exists():
        run.keep_consent(recipe)
        before = run.recipe()
        changes = describe_changes(dataclasses.replace(before, engine=recipe.engine), recipe)
        if not changes and before != recipe:
            if is_main_process():  # only the engine differs
                write_text(run.recipe_file, text)
        elif changes:
            raise SkipwiseError(
                f"{run.path} holds a run of another recipe: {changes}\n"
                "choose another --out, or remove the folder"
            )
        return run
    if run.path.exists() and (not run.path.is_dir() or any(run.path.iterdir())):
        raise SkipwiseError(f"{run.path} exists and is not a run folder: choose another --out")
    if not is_main_process():
        raise SkipwiseError(
            f"rank {os.environ['RANK']} does not find {run.path}\n"
            "choose an --out on a disk that all machines share"
        )
    try:
        run.path.mkdir(parents=True, exist_ok=True)
        run.write_recipe(recipe)
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
    """Write a file atomically."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False, default=_jsonable) + "\n")


def read_json(path: Path, default: Any) -> Any:
    """The content of a JSON file, or the default where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return default
    except ValueError as error:
        raise SkipwiseError(
            f"{path} is not JSON: {error}\nremove it, and its contents will be measured again"
        ) from error


def _jsonable(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | set):
        return list(value)
    return str(value)
