"""Recipes to and from YAML, with `key=value` overrides and errors that name the key."""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from skipwise.config.lengths import parse_length, parse_lengths
from skipwise.config.recipe import Recipe
from skipwise.errors import SkipwiseError, did_you_mean
from skipwise.pose.rope import SCALINGS
from skipwise.pose.samplers import SAMPLERS

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


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe from YAML and apply `key=value` overrides.

    Raises:
        SkipwiseError: unreadable YAML, an unknown key, a value of the wrong type.
    """
    return parse_recipe(_read_yaml(path), overrides)


def _read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SkipwiseError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise SkipwiseError(f"{path} is not YAML: {error}") from error
    if not isinstance(tree, dict):
        raise SkipwiseError(f"{path} is not a recipe: it must map keys to values")
    return tree


def load_run_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a run folder's recipe, in which an older version may have used the old names."""
    return parse_recipe(_renamed(_read_yaml(path)), overrides)


def parse_recipe(tree: dict[str, Any], overrides: list[str] | None = None) -> Recipe:
    """Make a recipe from nested mappings and `key=value` overrides."""
    tree = _copied(tree)
    for override in overrides or []:
        _override(tree, override)
    for key in ("model", "target_length"):
        if tree.get(key) is None:
            raise SkipwiseError(f"the recipe has no {key}: type {key}=...")
    return _build(Recipe, tree, "")


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
            (tree.setdefault(parents[0], {}) if parents else tree)[key] = value
    tree.pop("finish", None)
    for where, values in RENAMED_VALUES.items():
        name, key = where.split(".")
        section = tree.get(name)
        if isinstance(section, dict) and key in section:
            given = section[key]
            many = isinstance(given, list)
            section[key] = [values.get(v, v) for v in given] if many else values.get(given, given)
    return tree


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise SkipwiseError(
            f"{override!r} is not an override: type key=value, for example training.num_steps=200"
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
        at[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SkipwiseError(f"{override!r}: the value is not YAML") from error


def _build(cls: type, tree: Any, where: str) -> Any:
    """Make a dataclass from a mapping; unknown keys and wrong types are errors."""
    if not isinstance(tree, dict):
        raise SkipwiseError(f"{where or 'the recipe'} is {tree!r}: it must map keys to values")
    hints = typing.get_type_hints(cls)
    unknown = [key for key in tree if key not in hints]
    if unknown:
        old = _join(where, unknown[0])
        new = {a: b for a, b in RENAMED_KEYS.items() if a == old or a.startswith(f"{old}.")}
        if new:
            pairs = ", ".join(f"{a} is now {b}" for a, b in new.items())
            raise SkipwiseError(f"{old} was renamed: {pairs}")
        inner = keys_like(str(unknown[0]), where)
        meant = f"\ndid you mean {' or '.join(inner)}?" if inner else ""
        raise SkipwiseError(f"{old} is not a recipe key: choose from {', '.join(hints)}{meant}")
    return cls(**{key: _value(hints[key], value, _join(where, key)) for key, value in tree.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        if typing.get_origin(args[0]) is Literal and bool in args:
            if isinstance(value, bool) or value in typing.get_args(args[0]):
                return value
            raise SkipwiseError(f"{where} is {value!r}: give auto, true or false")
        if typing.get_origin(args[0]) is Literal and float in args:
            return _word_or_number(args[0], value, where)
        return _value(next(a for a in args if a is not type(None)), value, where)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if hint is Any:
        return value
    if choices := registered(where) or (args if origin is Literal else ()):
        value = "none" if value is None and "none" in choices else value
        if value not in choices:
            if (new := RENAMED_VALUES.get(where, {}).get(value)) is not None:
                raise SkipwiseError(f"{where}: {value} was renamed: type {where}={new}")
            names = ", ".join(choices) + did_you_mean(value, choices)
            raise SkipwiseError(f"{where} is {value!r}: choose one of {names}")
        return value
    if origin is tuple:
        items = _items(value, args[0])
        return tuple(_value(args[0], item, where.removesuffix("s")) for item in items)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise SkipwiseError(f"{where} is {value!r}: it must map keys to values")
        return value
    return scalar(hint, value, where)


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


def _word_or_number(words: Any, value: Any, where: str) -> Any:
    """One of the words, or a number above 0 (for the distillation weight also 0)."""
    choices = typing.get_args(words)
    if value in choices:
        return value
    try:
        number = scalar(float, value, where)
    except SkipwiseError:
        number = math.nan
    off = number == 0 and where == "distillation.weight"
    if not 0 < number < math.inf and not off:
        raise SkipwiseError(f"{where} is {value!r}: give {', '.join(choices)} or a number above 0")
    return number


def scalar(hint: type, value: Any, where: str) -> Any:
    """A value as int, float, bool or str; SkipwiseError for another type or a number below 0."""
    if hint is int and where.endswith("_length"):
        return parse_length(value)
    if hint is float and isinstance(value, str):  # YAML reads 2e-5 as a string
        try:
            value = float(value)
        except ValueError:
            value = str(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        raise SkipwiseError(f"{where} is {value!r}: give {names.get(hint, hint.__name__)}")
    if hint in (int, float) and value < 0:
        raise SkipwiseError(f"{where} is {value}: give 0 or more")
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
