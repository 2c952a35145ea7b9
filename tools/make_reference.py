"""Write docs/recipe.md and docs/cli.md from the code.

python tools/make_reference.py

recipe.md: the dataclasses of `skipwise.config.recipe`, with the docstring under each field.
cli.md: the parser of `skipwise.cli`. The pages do not depend on the Python version.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from skipwise.cli import build_parser
from skipwise.config import parse, recipe
from skipwise.config.lengths import MAX_LENGTH
from skipwise.config.recipe import Range, Recipe

ROOT = Path(__file__).parents[1]
GENERATED = "<!-- Written by `make reference` from {}. Do not edit. -->"
_LINKS = {  # words of a docstring: what they link to from docs/
    "research/study": "../research/study/README.md",
    "docs/data.md": "data.md",
    "docs/method.md": "method.md",
    "docs/scaling.md": "scaling.md",
    "PoSE, section": "https://arxiv.org/abs/2309.10400",
}
_RECIPE = """\
# Recipe keys

{generated}

A recipe is a YAML file that decides everything about a run:

```yaml
model: ./my-model
target_length: 32k
data:
  sources: [./books]
training:
  num_steps: 500
```

```
skipwise extend mine.yaml --out runs/mine
skipwise extend mine.yaml --out runs/shorter training.num_steps=200 rope.type=linear
```

Any key can also be set on the command line as `key=value`, with or without a recipe file. Only
`model`, `target_length` and, for training, `data.sources` have no default. A length is in tokens:
`32768` or `32k`, where k = 1,024. `recipe.yaml` in a run folder lists all keys with the values of
that run. An unknown key is an error, and so is a value of the wrong type or out of its range, a key
given twice, and anything that looks like a token or password. A length is 1 to 2,147,483,647.

A list is written `[a, b]` or `a,b`, and lengths also `4k..32k`: `eval.tasks=passkey,ruler`. Text
that is the path of an existing file or folder is one item, even with commas in it. For any other
path with a comma, write a list with quotes: `"data.sources=['a,b.txt']"`.

Letters: L = `original_length`, T = `target_length`.
"""
_CLI = """\
# Command line

{generated}

{description}

```text
{epilog}
```

Results go to stdout, progress to stderr. Exit codes: 0 is success, 2 is an error, and 75 means that
the run was stopped and saved, and that the same command continues it. The keys of `key=value` are
listed in [recipe.md](recipe.md).
"""


def recipe_page() -> str:
    """docs/recipe.md: a table for the top level and one for each section."""
    documented = field_docstrings()
    hints = typing.get_type_hints(Recipe)
    sections = {name: section for name, hint in hints.items() if (section := _section(hint))}
    page = _RECIPE.format(generated=GENERATED.format("src/skipwise/config/recipe.py"))
    page += "\n## Top level\n\n" + _key_table(Recipe, "", documented, skip=set(sections))
    for name, section in sections.items():
        page += f"\n## {name}\n\n{_linked(inspect.getdoc(section) or '')}\n\n"
        page += _key_table(section, f"{name}.", documented)
    return page


def field_docstrings() -> dict[tuple[str, str], str]:
    """(class, field) to the string literal under the field, as one line."""
    found = {}
    for node in ast.parse(inspect.getsource(recipe)).body:
        if not isinstance(node, ast.ClassDef):
            continue
        for field, below in zip(node.body, node.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
                and isinstance(below.value.value, str)
            ):
                found[node.name, field.target.id] = " ".join(below.value.value.split())
    return found


def _section(hint: Any) -> type | None:
    """The dataclass of a section's annotation; None for a plain key."""
    parts = [hint, *typing.get_args(hint)]
    return next((part for part in parts if dataclasses.is_dataclass(part)), None)  # type: ignore[return-value]


def _key_table(
    cls: Any,
    prefix: str,
    documented: dict[tuple[str, str], str],
    skip: set[str] | frozenset[str] = frozenset(),
) -> str:
    hints = typing.get_type_hints(cls)
    rules = typing.get_type_hints(cls, include_extras=True)
    rows = [
        (
            f"`{field.name}`",
            _type_in_words(hints[field.name], prefix + field.name) + _rule(rules[field.name]),
            _default(field),
            _linked(documented[cls.__name__, field.name]),
        )
        for field in dataclasses.fields(cls)
        if field.name not in skip
    ]
    return markdown_table(("key", "type", "default", "what it does"), rows)


def key_choices(key: str, hint: Any) -> tuple[str, ...]:
    """The words that a key takes: a Literal's, or the names of the classes that it chooses from."""
    registered = getattr(parse, "registered", lambda key: ())
    words = [h for h in (hint, *typing.get_args(hint)) if typing.get_origin(h) is Literal]
    return registered(key) or (typing.get_args(words[0]) if words else ())


def _type_in_words(hint: Any, key: str) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    is_length = key.rstrip("s").endswith("_length")
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_type_in_words(a, key) for a in args if a is not type(None))
    if choices := key_choices(key, hint):
        return ", ".join(f"`{choice}`" for choice in choices)
    if origin is tuple:
        plural = {str: "list of names", int: "list of lengths" if is_length else "list of numbers"}
        return plural.get(args[0], "list")
    if origin is dict:
        return "mapping"
    words = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}
    return "length" if is_length else words[hint]


def _rule(hint: Any) -> str:
    """The rule that the annotation states beside the type, as in `, 1 to 10`."""
    rule = hint.__metadata__[0] if typing.get_origin(hint) is Annotated else ""
    if isinstance(rule, Range) and rule.high == MAX_LENGTH:
        return "" if rule.low == 1 else f", {rule.low} or more"
    return f", {rule}" if isinstance(rule, Range | str) and rule else ""


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default_factory is not dataclasses.MISSING:
        return f"`{field.default_factory()}`"
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`[{', '.join(map(str, value))}]`"
    return f"`{value:g}`".replace("e-0", "e-") if isinstance(value, float) else f"`{value}`"


def _linked(text: str) -> str:
    """The text on one line, with links to the pages and papers that it names."""
    text = " ".join(text.split())
    for words, target in _LINKS.items():
        if target.startswith("http") or (ROOT / "docs" / target).exists():
            text = re.sub(f"{re.escape(words)}( [0-9.]*[0-9])?", rf"[\g<0>]({target})", text)
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def cli_page() -> str:
    """docs/cli.md: the parser's own help, and a section for each verb."""
    parser = build_parser()
    page = _CLI.format(
        generated=GENERATED.format("src/skipwise/cli.py"),
        description=_expanded(parser, parser.description),
        epilog=_expanded(parser, parser.epilog),
    )
    return page + "".join(_verb_section(sub) for sub in _verbs(parser))


def _verbs(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of the verbs, and of verbs below them."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for sub in dict.fromkeys(action.choices.values()):  # an alias is the same parser
                yield sub
                yield from _verbs(sub)


def _verb_section(parser: argparse.ArgumentParser) -> str:
    """A heading, a description, one line of usage, a table of arguments, the examples."""
    section = f"\n## {parser.prog.split(' ', 1)[-1]}\n\n{_expanded(parser, parser.description)}\n"
    shown = [a for a in parser._actions if _is_shown(a)]
    named = [a for a in shown if a.option_strings]
    usage = [parser.prog, *(_metavar(a) for a in shown if not a.option_strings)]
    usage += ["[options]"] if named else []
    usage += ["[key=value ...]"] if parser.get_default("takes_settings") else []
    section += f"\n```text\n{' '.join(usage)}\n```\n"
    if shown:
        rows = [(f"`{_spelled(a)}`", _expanded(parser, a.help, a)) for a in shown]
        section += "\n" + markdown_table(("argument", "meaning"), rows)
    if parser.epilog:
        section += f"\n```text\n{_expanded(parser, parser.epilog)}\n```\n"
    return section


def _is_shown(action: argparse.Action) -> bool:
    hidden = isinstance(action, argparse._HelpAction | argparse._SubParsersAction)
    return not hidden and action.help != argparse.SUPPRESS


def _spelled(action: argparse.Action) -> str:
    """`--data PATH [PATH ...]`, `--json`, `MODEL`."""
    return " ".join(filter(None, [", ".join(action.option_strings), _metavar(action)]))


def _metavar(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    name = action.metavar
    if name is None:
        name = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else None
    if isinstance(name, tuple):
        return " ".join(name)
    name = name or (action.dest.upper() if action.option_strings else action.dest)
    return {"+": f"{name} [{name} ...]", "*": f"[{name} ...]", "?": f"[{name}]"}.get(
        str(action.nargs), name
    )


def _expanded(
    parser: argparse.ArgumentParser, text: str | None, action: argparse.Action | None = None
) -> str:
    """Help text with %(prog)s, %(default)s and the like filled in."""
    if not text:
        return ""
    values = {} if action is None else {k: v for k, v in vars(action).items() if v is not None}
    return (text % {**values, "prog": parser.prog} if "%" in text else text).strip("\n")


def markdown_table(heads: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """A Markdown table; a | inside a cell is written so that GitHub and MkDocs both show it."""
    lines = [heads, tuple("---" for _ in heads), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    text = re.sub(r"`([^`]*\|[^`]*)`", r"<code>\1</code>", text)
    return text.replace("|", "&#124;")


PAGES: dict[str, Callable[[], str]] = {"recipe.md": recipe_page, "cli.md": cli_page}


def main() -> None:
    for name, page in PAGES.items():
        (ROOT / "docs" / name).write_text(page(), encoding="utf-8")
        print(f"docs/{name}")


if __name__ == "__main__":
    main()
