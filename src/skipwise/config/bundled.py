"""The recipes and examples that come with Skipwise: in a clone, or installed beside the package."""

from __future__ import annotations

import re
import sys
from importlib import metadata
from pathlib import Path

from skipwise.errors import SkipwiseError


def bundled(folder: str) -> dict[str, Path]:
    """The files of `recipes` or `examples`, by their names without suffix."""
    clone = Path(__file__).resolve().parents[3]
    files = sorted((clone / folder).iterdir()) if (clone / "pyproject.toml").exists() else []
    if not files:
        installed = metadata.files("skipwise") or []
        wanted = [f for f in installed if f.parent.as_posix().endswith(f"share/skipwise/{folder}")]
        files = sorted(Path(str(file.locate())).resolve() for file in wanted)
    return {file.stem: file for file in files if file.suffix in (".py", ".yaml")}


def find_recipe(name: str) -> Path | None:
    """The .yaml file that a name means: an own file first, then one that comes with Skipwise.

    The beginning of a name is enough; among several, the recipe for one GPU is meant.

    Returns:
        None if the name is no recipe's: a folder, or a model on the hub.

    Raises:
        SkipwiseError: no such file, or the beginning of several names for one GPU, or for more.
    """
    path, known = Path(name).expanduser(), bundled("recipes")
    is_file = path.suffix in (".yaml", ".yml")
    own = path if is_file else path.with_name(f"{path.name}.yaml")
    if path.exists() or own.exists():
        return own if own.exists() and not path.is_dir() else None
    stem = own.stem if str(path.parent) in (".", "recipes") else ""
    found = [key for key in known if key == stem] or [k for k in known if k.startswith(f"{stem}-")]
    if len(found) > 1 and stem:
        several = f"{name} is the beginning of several recipes: {', '.join(found)}"
        found = [key for key in found if not re.search(r"-\d+x", key)]  # for one GPU
        if len(found) != 1:
            raise SkipwiseError(several)
        print(f"{several}\ntaken: {found[0]}", file=sys.stderr)
    if found and stem:
        return known[found[0]]
    if is_file:
        fix = "skipwise recipes lists those that come with it"
        raise SkipwiseError(f"{name}: No such file or directory\n{fix}")
    return None


def describe_bundled() -> str:
    """The first line of each file, after its name."""
    lines = []
    for folder in ("recipes", "examples"):
        files = bundled(folder)
        lines += [f"{folder}, in {next(iter(files.values())).parent}"] if files else []
        for name, file in files.items():
            text = file.read_text(encoding="utf-8").splitlines()[0]
            lines.append("  {:<30}{}".format(name, text.strip('#" ')))
    return "\n".join(lines)
