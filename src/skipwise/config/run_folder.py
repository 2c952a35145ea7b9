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
import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
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
from skipwise.errors import READ_ONLY, SkipwiseError, row_fault, run_fault

_OLD_PART = 60.0  # seconds after which the part of a process that is gone is removed
_LEFTOVERS = re.compile(r"\.(run|train)?\.?lock|(recipe\.yaml|run\.json)(\.\d+)?\.part")


class RunFolder:
    """Paths and JSON of one run. Files are replaced atomically, and only rank 0 writes.

    Several processes may write run.json at once: each update reads and writes it under a lock.
    """

    def __init__(self, path: str | Path, parent: RunFolder | None = None) -> None:
        self.path, self.parent = Path(os.path.expanduser(path)), parent
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
        file = self.path / "run.json"
        fix = "remove it: what decided the run is in its checkpoints; the page loses its checks"
        found = read_json(file, {}, fix)
        if not isinstance(found, dict):
            raise SkipwiseError(f"{file} is not a JSON object\n{fix}")
        if key := run_fault(found):
            raise SkipwiseError(f"{file} has {key}: {str(found[key])[:60]!r}\n{fix}")
        return found

    def update(self, *, any_rank: bool = False, **metadata: Any) -> None:
        """Add or replace top-level keys of run.json; a function gets the old value, or None."""
        if not (any_rank or is_main_process()):
            return
        with _exclusive(self.path / ".run.lock"):
            before = self.metadata()
            new = {k: v(before.get(k)) if callable(v) else v for k, v in metadata.items()}
            if {**before, **new} != before:
                write_json(self.path / "run.json", {**before, **new})

    def update_entry(self, key: str, **values: Any) -> None:
        """Add or replace keys of a dictionary in run.json."""
        self.update(any_rank=False, **{key: lambda old: {**(old or {}), **values}})

    def results(self) -> list[dict[str, Any]]:
        file = self.path / "results.json"
        rows = read_json(file, [], "remove it, and its contents will be measured again")
        if not isinstance(rows, list) or any(map(row_fault, rows)):
            raise SkipwiseError(
                f"{file} has no result rows\nremove it, and its contents will be measured again"
            )
        return rows

    def lock(self) -> AbstractContextManager[None]:
        """Lock the results on rank 0: two writers would overwrite each other's rows."""
        return self._locked(".lock", "measuring") if is_main_process() else nullcontext()

    def training_lock(self) -> AbstractContextManager[None]:
        """Lock the checkpoints on rank 0; the other ranks do nothing."""
        return self._locked(".train.lock", "training") if is_main_process() else nullcontext()

    @contextmanager
    def _locked(self, name: str, what: str) -> Iterator[None]:
        """Hold a lock file; SkipwiseError if another process holds it."""
        with _lock_file(self.path / name) as file:
            try:
                if fcntl is not None and file is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise SkipwiseError(
                    f"another process is {what} into {self.path}\n"
                    "wait until it ends, or choose another --out"
                ) from error
            except OSError:  # a file system without locks
                pass
            yield

    def write_results(self, rows: list[dict[str, Any]]) -> None:
        if is_main_process():
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
        if is_main_process():
            remove_parts(run.path)
            remove_parts(run.model)
        _describe_start(run, recipe, command)
        return run
    if run.path.exists() and (not run.path.is_dir() or _holds_something(run.path)):
        raise SkipwiseError(f"{run.path} exists and is not a run folder: choose another --out")
    if not is_main_process():
        raise SkipwiseError(
            f"rank {os.environ['RANK']} does not find {run.path}\n"
            "choose an --out on a disk that all machines share"
        )
    run.path.mkdir(parents=True, exist_ok=True)
    run.write_recipe(recipe)
    _describe_start(run, recipe, command)
    return run


def _describe_start(run: RunFolder, recipe: Recipe, command: str) -> None:
    """What run.json says from the start; also where a kill came before it, or it was removed."""
    if is_main_process() and "created" not in run.metadata():
        run.update(
            name=recipe.run_name,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            command=command,
            status="started",
            versions=versions(),
            machine=machine(),
        )


def _holds_something(folder: Path) -> bool:
    """Whether a folder holds more than what a kill leaves of a run that was just begun."""
    return any(not _LEFTOVERS.fullmatch(path.name) for path in folder.iterdir())


def remove_parts(folder: Path) -> None:
    """Remove what `write_text` left where its process was killed."""
    for part in folder.glob("*.*.part"):
        owner = part.name.split(".")[-2]
        with suppress(OSError):
            if owner.isdigit() and time.time() - part.stat().st_mtime > _OLD_PART:
                try:
                    os.kill(int(owner), 0)
                except ProcessLookupError:
                    part.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a file atomically. Each process has a part of its own; it is on the disk first."""
    part = path.with_name(f"{path.name}.{threading.get_native_id()}.part")
    part.unlink(missing_ok=True)
    try:
        with part.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False, default=_jsonable) + "\n")


@contextmanager
def _lock_file(path: Path) -> Iterator[Any]:
    """An open file to lock; None where there are no locks, or in a folder that is only read."""
    try:
        special = path.exists() and not path.is_file()  # a pipe would be waited for
        file = None if fcntl is None or special else path.open("a")
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
        file = None
    try:
        yield file
    finally:
        if file is not None:
            file.close()


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Wait for a lock file, and hold it."""
    with _lock_file(path) as file:
        with suppress(OSError):  # a file system without locks
            if fcntl is not None and file is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def read_json(path: Path, default: Any, fix: str = "remove it: it is made again") -> Any:
    """The content of a JSON file, or the default where there is none."""
    if path.exists() and not path.is_file():
        raise SkipwiseError(f"{path} is not a regular file\n{fix}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return default
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else error
        raise SkipwiseError(f"{path} is not JSON: {why}\n{fix}") from error


def _jsonable(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, tuple | set):
        return list(value)
    return str(value)
