"""The recipes and examples that come with Skipwise: in a clone, or installed beside the package."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from skipwise.errors import SkipwiseError


def bundled(folder: str) -> dict[str, Path]:
    """The files of `recipes` or `examples`, by their names without suffix."""
    roots = Path(__file__).resolve().parents
    places = [
        place for root in roots for place in (root / "share/skipwise" / folder, root / folder)
    ]
    files = next((sorted(place.iterdir()) for place in places if place.is_dir()), [])
    return {file.stem: file for file in files if file.suffix in (".py", ".yaml")}


def find_recipe(name: str) -> Path | None:
    """The .yaml file that a name means: an own file first, then one that comes with Skipwise.

    The beginning of a name is enough; among several, the recipe for one GPU is meant.

    Returns:
        None if the name is no recipe's: a folder, or a model on the hub.

    Raises:
        SkipwiseError: no such file, or the beginning of several names for one GPU, or for more.
    """
    path = Path(name).expanduser()
    is_file = path.suffix in (".yaml", ".yml")
    own = path if is_file else path.with_name(f"{path.name}.yaml")
    if path.is_dir() or own.exists():
        return None if path.is_dir() else own
    known = bundled("recipes") if str(path.parent) in (".", "recipes") else {}
    found = [k for k in known if k == own.stem] or [
        k for k in known if k.startswith(f"{own.stem}-")
    ]
    if len(found) > 1:
        several = f"{name} is the beginning of several recipes: {', '.join(found)}"
        found = [key for key in found if not re.search(r"-\d+x", key)]  # for one GPU
        if len(found) != 1:
            raise SkipwiseError(several)
        print(f"{several}\ntaken: {found[0]}", file=sys.stderr)
    if is_file and not found:
        fix = "skipwise recipes lists those that come with it"
        raise SkipwiseError(f"{name}: No such file or directory\n{fix}")
    return known[found[0]] if found else None


def describe_bundled() -> str:
    """The first line of each file, after its name."""
    lines = []
    for folder in ("recipes", "examples"):
        files = bundled(folder)
        lines += [f"{folder}, in {next(iter(files.values())).parent}"] if files else []
        for name, file in files.items():
            all_lines = file.read_text(encoding="utf-8").splitlines()
            text = next((line for line in all_lines if line.startswith('"""')), all_lines[0])
            lines.append("  {:<30}{}".format(name, text.strip('#" ')))
    return "\n".join(lines)
