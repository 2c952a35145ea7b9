"""Recipes to and from YAML, with `key=value` overrides and errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml

from skipwise.config.lengths import parse_length, parse_lengths
from skipwise.config.recipe import (
    FILE_NAME,
    NOT_EMPTY,
    Range,
    Recipe,
    SourceSettings,
    TrainingSettings,
)
from skipwise.config.trust import checked, has_consent, shown
from skipwise.errors import SkipwiseError, did_you_mean
from skipwise.pose.rope import SCALINGS
from skipwise.pose.samplers import SAMPLERS

# Arguments of TrainingArguments that upload, write elsewhere or read settings that do, by prefix.
REFUSED_TRAINER = {
    "push_to_hub": "uploads every checkpoint: type skipwise publish, which shows what it uploads",
    "hub_": "is for uploads from training: type skipwise publish, which uses your login",
    "trackio_": "uploads to a Space on the Hub: leave it out",
    "logging_dir": "writes outside of the run folder: leave it out",
    "resume_from_checkpoint": "is decided by the run folder, which resumes at its last checkpoint",
}
# Keys and values that were renamed before the first release.
RENAMED_KEYS = {
    "temperature": "attention_temperature",
    "positions.cut": "positions.chunk_lengths",
    "positions.gaps": "positions.skips",
    "positions.plain_fraction": "positions.unskipped_fraction",
    "positions.weights": "positions.key_weights",
    "training.batch_size": "training.micro_batch_size",
    "training.distillation": "distillation.weight",
    "finish.share": "full_length.fraction",
    "finish.learning_rate": "full_length.learning_rate",
    "eval.select": "export.checkpoint",
    "eval.passkey_trials": "eval.passkey_samples",
    "eval.needle_trials": "eval.needle_samples",
}
RENAMED_VALUES = {
    "training.loss": {"whole": "full"},
    "export.checkpoint": {"needles": "needle"},
    "eval.tasks": {"pose-table": "short-benchmarks"},
}
_MAX_BYTES, _MAX_DEPTH, _MAX_NODES = 1 << 20, 20, 10_000  # of a recipe
_DEEP = re.compile(rf"[\[{{]{{{_MAX_DEPTH + 1}}}")
_KERNEL = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?")  # owner/name, revision, function
_NO_FILE_NAME = re.compile(r"[/\\\x00-\x1f\x7f-\x9f\u2028\u2029]|^\s|\s$")


class _Loader(yaml.SafeLoader):
    """YAML without duplicate keys, and with limits on depth and on what aliases expand to."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > _MAX_DEPTH:
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} levels deep")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.YAMLError(f"the key {shown(key.value)} is given twice (line {line})")
            seen.add(key.value)
        return node

    def integer(self, node: yaml.ScalarNode) -> Any:
        """Of YAML 1.1, 010 would be 8 and 1:30 would be 90: they stay texts."""
        odd = re.match(r"[-+]?0[0-7_]|.*:", node.value)
        return node.value if odd else self.construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.integer)


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        ValueError: it is not YAML, has a key twice, is nested too deep or expands too far.
    """
    try:
        loader = _Loader(text)
        if _DEEP.search(text):  # PyYAML needs seconds to come to that conclusion
            raise yaml.YAMLError(f"it is nested more than {_MAX_DEPTH} levels deep")
        node = loader.get_single_node()
        _count_nodes(node, {})
        return None if node is None else loader.construct_document(node)
    except Exception as error:  # PyYAML raises many types for a tag that does not fit its value
        problem = getattr(error, "problem", None) or str(error) or type(error).__name__
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise ValueError(f"{problem.splitlines()[0][:200]}{line}") from error


def _count_nodes(node: Any, known: dict[int, int]) -> int:
    """The number of values in a node, with its aliases expanded."""
    if isinstance(node, yaml.CollectionNode):
        if id(node) not in known:
            known[id(node)] = _MAX_NODES + 1  # while it is counted: it must not contain itself
            parts = [
                part for item in node.value for part in (item if type(item) is tuple else [item])
            ]
            known[id(node)] = 1 + sum(_count_nodes(part, known) for part in parts)
        if known[id(node)] > _MAX_NODES:
            raise yaml.YAMLError(f"it has more than {_MAX_NODES:,} values, or contains itself")
        return known[id(node)]
    return 1


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from YAML and apply `key=value` overrides.

    Raises:
        SkipwiseError: unreadable YAML, an unknown key, a value of the wrong type or out of its
            range, `trust_remote_code` in the file.
    """
    return _parse_file(_read_yaml(path), overrides or [], path, consent=None)


def with_typed_kernel(recipe: Recipe, overrides: list[str] | None) -> Recipe:
    """The recipe; SkipwiseError if it names a kernel of the Hub, and the overrides do not."""
    typed = f"load.attn_implementation={recipe.load.attn_implementation}"
    if recipe.load.is_hub_kernel and typed not in (overrides or []):
        raise SkipwiseError(
            f"the recipe names the kernel {recipe.load.attn_implementation}, which is code from "
            f"the Hub, and a file cannot agree to run it\ntype {typed} if you trust it"
        )
    return recipe


def _read_yaml(path: str | Path) -> dict[str, Any]:
    file = Path(path)
    try:
        if file.exists() and not file.is_file():
            raise SkipwiseError(f"{path} is not a regular file: give a recipe in YAML")
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise SkipwiseError(f"{path} is larger than 1 MiB: it is not a recipe")
        tree = parse_yaml(content.decode("utf-8-sig"))
    except OSError as error:
        raise SkipwiseError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SkipwiseError(
            f"{path} is not UTF-8 text (byte {error.start})\nsave it as UTF-8"
        ) from error
    except ValueError as error:
        raise SkipwiseError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SkipwiseError(f"{path} is not a recipe: it must map keys to values")
    return tree


def load_run_recipe(
    path: str | Path, overrides: list[str] | None = None, consent: Any = None
) -> Recipe:
    """Read a run folder's recipe, in which an older version may have used the old names.

    Args:
        overrides: a list, even if empty, where a command runs the recipe.
        consent: the run's record that its user typed load.trust_remote_code=true.
    """
    return _parse_file(_renamed(_read_yaml(path)), overrides, path, consent)


def _parse_file(
    tree: dict[str, Any], overrides: list[str] | None, path: str | Path, consent: Any
) -> Recipe:
    """`parse_recipe`, but a file cannot consent to run a model's code: only the user can."""
    recipe = parse_recipe(tree, overrides)
    if overrides is not None:
        recipe = with_typed_kernel(recipe, overrides)
    keys = [override.partition("=")[0] for override in overrides or []]
    if not recipe.load.trust_remote_code or "load" in keys or "load.trust_remote_code" in keys:
        return recipe
    if not has_consent(consent, recipe.model, recipe.load.revision):
        raise SkipwiseError(
            f"{path} asks to run code that {recipe.model} brings, and a file cannot consent for you"
            "\nread that code, and type load.trust_remote_code=true if you trust it, else =false"
        )
    return recipe


def parse_recipe(tree: dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """Make a recipe from nested mappings and `key=value` overrides."""
    tree = _copied(tree)
    for i, override in enumerate(overrides or []):
        below = override.partition("=")[0] + "."
        if lost := [one for one in (overrides or [])[:i] if one.startswith(below)]:
            raise SkipwiseError(f"{shown(override)} replaces {shown(lost[0])}: type the keys alone")
        _override(tree, override)
    for key in ("model", "target_length"):
        if tree.get(key) is None:
            raise SkipwiseError(f"the recipe has no {key}: type {key}=...")
    recipe: Recipe = _build(Recipe, tree, "")
    for key in recipe.trainer:
        if why := [why for prefix, why in REFUSED_TRAINER.items() if key.startswith(prefix)]:
            raise SkipwiseError(f"trainer.{key} {why[0]}")
    deepspeed = recipe.trainer.get("deepspeed")
    monitors = {"tensorboard", "wandb", "comet", "csv_monitor", "flops_profiler", "autotuning"}
    if isinstance(deepspeed, str) or (isinstance(deepspeed, dict) and monitors & set(deepspeed)):
        raise SkipwiseError(
            "trainer.deepspeed: give a mapping of DeepSpeed's keys, no file name, without "
            f"{', '.join(sorted(monitors))}, which write elsewhere"
        )
    training = recipe.training
    if training.warmup_steps > max(training.num_steps, TrainingSettings.warmup_steps):
        raise SkipwiseError(
            f"training.warmup_steps is {training.warmup_steps:,}, and training.num_steps is "
            f"{training.num_steps:,}: the learning rate would never be reached\ntype a smaller one"
        )
    return recipe


def dump_recipe(recipe: Recipe) -> str:
    """The recipe as YAML, with all defaults, in the order of the fields."""
    return yaml.safe_dump(_tuples_to_lists(dataclasses.asdict(recipe)), sort_keys=False, width=100)


def _renamed(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with current names for keys and values."""
    tree = _copied(tree)
    for old, new in RENAMED_KEYS.items():
        *parents, key = old.split(".")
        section = tree.get(parents[0]) if parents else tree
        if isinstance(section, dict) and key in section:
            value = section.pop(key)
            *parents, key = new.split(".")
            target = tree.setdefault(parents[0], {}) if parents else tree
            if isinstance(target, dict):  # else it is refused below
                target[key] = value
    tree.pop("finish", None)
    for where, values in RENAMED_VALUES.items():
        name, key = where.split(".")
        section = tree.get(name)
        if isinstance(section, dict) and key in section:
            given = section[key]
            found = [values.get(str(v), v) for v in (given if isinstance(given, list) else [given])]
            section[key] = found if isinstance(given, list) else found[0]
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SkipwiseError(
            f"{shown(override)} is not an override: type key=value, for example "
            "training.num_steps=200"
        )
    *parents, last = key.split(".")
    at = tree
    for parent in parents:
        if at.get(parent) is None:
            at[parent] = {}
        at = at[parent]
        if not isinstance(at, dict):
            raise SkipwiseError(f"{key}: {parent} has no keys below it")
    try:
        at[last] = parse_yaml(value)
    except ValueError as error:
        raise SkipwiseError(f"{shown(override)}: the value is not YAML: {error}") from error


def _build(cls: type, tree: Any, where: str) -> Any:
    """Make a dataclass from a mapping; unknown keys and wrong types are errors."""
    if not isinstance(tree, dict):
        raise SkipwiseError(f"{where or 'the recipe'} is {shown(tree)}: it must map keys to values")
    hints = _hints(cls)
    unknown = [key for key in tree if key not in hints]
    if unknown:
        key = unknown[0] if isinstance(unknown[0], str) else shown(unknown[0])
        old = _join(where, key if key.isprintable() and len(key) < 80 else shown(key))
        new = {a: b for a, b in RENAMED_KEYS.items() if a == old or a.startswith(f"{old}.")}
        if new:
            pairs = ", ".join(f"{a} is now {b}" for a, b in new.items())
            raise SkipwiseError(f"{old} was renamed: {pairs}")
        inner = keys_like(str(unknown[0]), where)
        meant = f"\ndid you mean {' or '.join(inner)}?" if inner else ""
        raise SkipwiseError(f"{old} is not a recipe key: choose from {', '.join(hints)}{meant}")
    required = (f.name for f in dataclasses.fields(cls) if f.default is f.default_factory)
    if missing := [key for key in required if key not in tree]:
        raise SkipwiseError(f"{where or 'the recipe'} has no {missing[0]}")
    return cls(**{key: _value(hints[key], value, _join(where, key)) for key, value in tree.items()})


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        found = _value(args[0], value, where)
        _check(args[1], found, where)
        return found
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        if typing.get_origin(args[0]) is Literal and bool in args:
            if isinstance(value, bool) or value in typing.get_args(args[0]):
                return value
            words = ", ".join(typing.get_args(args[0]))
            raise SkipwiseError(f"{where} is {shown(value)}: give {words}, true or false")
        if typing.get_origin(args[0]) is Literal and str in args:  # a kernel of the Hub
            is_kernel = isinstance(value, str) and _KERNEL.fullmatch(value)
            return value if is_kernel else _value(args[0], value, where)
        if typing.get_origin(args[0]) is Literal and args[1] in (int, float):
            return _word_or_number(args[0], args[1], value, where)
        return _value(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if hint is Any:
        return checked(value, where)
    if choices := registered(where) or (args if origin is Literal else ()):
        value = "none" if value is None and "none" in choices else value
        if value not in choices:
            renamed = RENAMED_VALUES.get(where, {})
            if isinstance(value, str) and value in renamed:
                raise SkipwiseError(f"{where}: {value} was renamed: type {where}={renamed[value]}")
            names = ", ".join(choices) + did_you_mean(value, choices)
            raise SkipwiseError(f"{where} is {shown(value)}: choose one of {names}")
        return value
    if origin is tuple:
        return tuple(_value(args[0], item, where) for item in _items(value, args[0]))
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise SkipwiseError(f"{where} is {shown(value)}: it must map keys to values")
        return checked(value, where)
    found = scalar(hint, value, where)
    return checked(found, where) if isinstance(found, str) else found  # numbers have ranges


def _check(rule: Any, value: Any, where: str) -> None:
    """The rule that the recipe's dataclasses state beside a key's type."""
    if isinstance(rule, Range):
        for number in value if isinstance(value, tuple) else [value]:
            if isinstance(number, int | float) and number not in rule:
                hint = f"; {rule.hint}" if rule.hint else ""
                raise SkipwiseError(f"{where} is {shown(number)}: give {rule}{hint}")
    elif rule == NOT_EMPTY and not value:
        raise SkipwiseError(f"{where} is empty: give one or more")
    elif rule == FILE_NAME and value is not None:
        if value in ("", ".", "..") or _NO_FILE_NAME.search(value) or len(value.encode()) > 200:
            raise SkipwiseError(
                f"{where} is {shown(value)}: give {FILE_NAME}, without / and line breaks"
            )
    elif rule is SourceSettings:
        for source in value or ():
            if isinstance(source, dict):
                _build(SourceSettings, source, where)
            else:
                scalar(str, source, where)


def _items(value: Any, hint: Any) -> list[Any]:
    """The items of a list, which may also be written `a,b`, or `4k..32k` for lengths.

    Text that is the path of an existing file is one item, even with a comma in it.
    """
    if not isinstance(value, str):
        return list(value) if isinstance(value, list | tuple) else [value]
    if hint is int:
        return list(parse_lengths(value))
    whole = os.path.exists(os.path.expanduser(value))
    return [value] if whole else [item.strip() for item in value.split(",")]


def registered(where: str) -> tuple[str, ...]:
    """The choices of a key that names a sampler or a RoPE scaling. Empty for other keys."""
    if where == "rope.type":
        return ("auto", *(name for name in SCALINGS if name != "default"))
    return (*SAMPLERS, "none") if where == "method" else ()


def _word_or_number(words: Any, kind: type, value: Any, where: str) -> Any:
    """One of the words, or a number."""
    choices = typing.get_args(words)
    if value in choices:
        return value
    try:
        return scalar(kind, value, where)
    except SkipwiseError as error:
        number = "a whole number" if kind is int else "a number"
        number = "a length such as 16k" if where.endswith("_length") else number
        raise SkipwiseError(
            f"{where} is {shown(value)}: give {', '.join(choices)} or {number}"
        ) from error


def scalar(hint: type, value: Any, where: str) -> Any:
    """A value as int, float, bool or str; SkipwiseError for another type."""
    if hint is int and where.rstrip("s").endswith("_length"):
        try:
            return parse_length(value)
        except SkipwiseError as error:
            raise SkipwiseError(f"{where}: {error}") from error
    if hint is float and isinstance(value, str):  # YAML reads 2e-5 as a string
        try:
            value = float(value)
        except ValueError:
            value = str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value) if abs(value) < 2**1000 else ""
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)) or value == "":
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise SkipwiseError(f"{where} is {shown(value)}: give {names.get(hint, hint.__name__)}")
    return value


def keys_like(key: str, section: str = "") -> list[str]:
    """The recipe keys of this name, or those spelled nearly so, of one section if it has any."""
    paths: dict[str, list[str]] = {}
    for path in _paths_of(Recipe):
        paths.setdefault(path.rpartition(".")[2], []).append(path)
    if key in paths:
        return paths[key]
    near = difflib.get_close_matches(key, paths, 2)
    found = [path for name in near for path in paths[name]]
    return [p for p in found if section and p.startswith(f"{section}.")] or found


def _paths_of(cls: Any, where: str = "") -> list[str]:
    """Every dotted path in the recipe."""
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        found.append(_join(where, name))
        for inner in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(inner):
                found += _paths_of(inner, _join(where, name))
    return found


def describe_changes(old: Recipe, new: Recipe) -> str:
    """What differs between two recipes: `training.num_steps: 1000 -> 20; data.sources: a -> b`."""
    before, after = (_tuples_to_lists(dataclasses.asdict(recipe)) for recipe in (old, new))
    found = list(_differences(before, after, ""))
    more = [f"and {len(found) - 5} more"] if len(found) > 5 else []
    return "; ".join([*found[:5], *more])


def _differences(old: Any, new: Any, where: str) -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in {**old, **new}:
            yield from _differences(old.get(key), new.get(key), _join(where, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) > 1:
        for i, items in enumerate(zip(old, new, strict=True)):
            yield from _differences(*items, f"{where}[{i}]")
    elif old != new:
        yield f"{where}: {_one_line(old)} -> {_one_line(new)}"


def _one_line(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return ", ".join(map(_one_line, value)) or "none"
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else str(key)


def _copied(tree: Any) -> Any:
    return {k: _copied(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _tuples_to_lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, tuple | list) else value
