"""A folder of benchmark tasks in the YAML format of lm-evaluation-harness, without executable code.

    task: boolq                       # the name; it replaces a built-in task of the same name
    include: boolq                    # prompt, target and metrics of that built-in task
    dataset_path: json                # or csv, parquet, text, or owner/name on the hub
    dataset_kwargs: {data_files: {train: train.jsonl, validation: questions.jsonl}}

Data paths are relative to the YAML file. `include` names one built-in task or one file of the
folder. A task without it defines everything itself, as in the harness's guide to new tasks. In the
harness, `!function` imports Python and some keys run scripts: a file that has one is refused.
Functions of the harness's own tasks come with `include`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from skipwise.config.parse import parse_yaml
from skipwise.errors import SkipwiseError

_RUNS_CODE = ("class", "custom_dataset", "trust_remote_code", "unsafe_code", "use_prompt")
_FORMATS = ("json", "csv", "parquet", "text")  # other loaders of datasets unpickle or run scripts


def read_task_folder(folder: str, built_in: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Checked configs of a folder's tasks and groups, with absolute paths.

    Args:
        built_in: the harness's own tasks by name, entries with `yaml_path`.

    Raises:
        SkipwiseError: no folder, no task, a duplicate name, or a file that is not YAML or has code.
    """
    root = Path(folder).expanduser().resolve()
    if not root.is_dir():
        raise SkipwiseError(f"eval.task_folder={folder} is not a folder")
    configs: dict[str, dict[str, Any]] = {}
    for path in sorted(path for path in root.rglob("*.yaml") if path.is_file()):
        config = _read(path, root, built_in, ())
        name = config.get("group") or config.get("task")
        if name is None and "include" not in config:
            continue  # a template that other files include
        if not isinstance(name, str):
            raise SkipwiseError(f"{path} names no task: add a line task: NAME")
        if name in configs:
            raise SkipwiseError(f"{path} defines {name}, as another file of {folder} does")
        configs[name] = config
    if not configs:
        raise SkipwiseError(f"eval.task_folder={folder} has no task: it needs *.yaml files")
    return list(configs.values())


def _read(
    path: Path, root: Path, built_in: Mapping[str, Any], seen: tuple[Path, ...]
) -> dict[str, Any]:
    """A file with its includes from the folder resolved. A built-in task stays an include."""
    try:
        config = parse_yaml(path.read_text(encoding="utf-8"))
    except ValueError as error:
        if "!function" in str(error):
            raise SkipwiseError(
                f"{path} has !function, and Python from a task folder is not run; functions of a "
                "built-in task come with include: NAME"
            ) from error
        raise SkipwiseError(f"{path} is not plain YAML: {error}") from error
    if not isinstance(config, dict):
        raise SkipwiseError(f"{path} is not a task: it needs KEY: VALUE lines")
    _check(config, path)
    if "include" not in config:
        return config
    include = config.pop("include")
    if not isinstance(include, str):
        raise SkipwiseError(f"{path}: include: {include} is not a single name")
    target = (path.parent / include).resolve()
    if not target.is_file() and getattr(built_in.get(include), "yaml_path", None):
        target = Path(built_in[include].yaml_path).resolve()
    if target in seen or not target.is_file():
        raise SkipwiseError(f"{path}: include: {include} is neither a built-in task nor a file")
    if target.is_relative_to(root):
        return {**_read(target, root, built_in, (*seen, path)), **config}
    if not target.is_relative_to(_harness_tasks()):
        raise SkipwiseError(f"{path}: include: {include} is outside the task folder")
    return {"include": str(target), **config}


def _harness_tasks() -> Path:
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).resolve().parent


def _check(config: dict[str, Any], path: Path) -> None:
    """Refuse keys that run code, and make data paths absolute, in place."""
    of_hub = "/" in str(config.get("dataset_path", ""))
    for some in _dicts(config):
        for key in _RUNS_CODE:
            if key in some:  # `unsafe_code: false` would hide that an included task runs code
                raise SkipwiseError(
                    f"{path} has {key}, which decides whether code is run: leave it out, as code "
                    "from a task folder is not run"
                )
        data = some.get("dataset_path", "json")
        hub_name = isinstance(data, str) and re.fullmatch(r"[\w.-]+/[\w.-]+(?<!\.py)", data)
        if data not in _FORMATS and (not hub_name or Path(data).exists()):
            raise SkipwiseError(
                f"{path}: dataset_path: {data} is neither {', '.join(_FORMATS)} nor owner/name on "
                "the hub, and data set scripts are not run"
            )
        if "data_files" in some and not of_hub:
            some["data_files"] = _absolute(some["data_files"], path.parent)


def _absolute(files: Any, base: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(some, base) for split, some in files.items()}
    if isinstance(files, list):
        return [_absolute(some, base) for some in files]
    return files if "://" in str(files) else str(base / str(files))


def _dicts(node: Any) -> Iterator[dict[Any, Any]]:
    values = node if isinstance(node, list) else ()
    if isinstance(node, dict):
        yield node
        values = node.values()
    for value in values:
        yield from _dicts(value)
