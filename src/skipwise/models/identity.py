"""What files are, by their contents: a base model, a checkpoint, a token store.

A file is known by its size and SHA-256; of large files, blocks spread over them are read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from skipwise.config.machine import num_cores
from skipwise.errors import SkipwiseError
from skipwise.models.hf_config import is_local

_BLOCK, _BLOCKS = 1 << 16, 1024  # larger files than 64 MiB are sampled
_OF_BASE = ("*.safetensors", "*.bin", "*.gguf", "config.json", "tokenizer*.json", "tokenizer.model")
_NAME = re.compile(r"(\w[\w-]*/)?[\w.-]{1,100}")  # of a file that an export writes
_Stats = tuple[tuple[str, int, int, int], ...]
_known: dict[_Stats, dict[str, list[Any]]] = {}


def digests(files: dict[str, Path], whole: Iterable[str] = ()) -> dict[str, list[Any]]:
    """[size, digest] of each file.

    Args:
        whole: names of the files that are read completely.
    """
    whole = set(whole)

    def describe(name: str) -> list[Any]:
        return [files[name].stat().st_size, _digest(files[name], name not in whole)]

    with ThreadPoolExecutor(min(8, num_cores())) as pool:
        return dict(zip(files, pool.map(describe, files), strict=True))


def known_digests(files: dict[str, Path]) -> dict[str, list[Any]]:
    """`digests`, which this process reads again only after a file's size or times have changed."""
    stats = {name: (str(path), path.stat()) for name, path in files.items()}
    key = tuple((p, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for p, s in stats.values())
    if key not in _known:
        _known[key] = digests(files)
    return _known[key]


def base_identity(model: str, revision: str | None) -> dict[str, Any]:
    """What a base model is: its files; for one of the Hub the commit that its name led to."""
    path = Path(model).expanduser()
    if not is_local(model):
        return {"revision": revision}
    if path.is_file():
        return {"files": known_digests({path.name: path})}
    found = sorted({file for pattern in _OF_BASE for file in path.glob(pattern)})
    return {"files": known_digests({file.name: file for file in found if file.is_file()})}


def folder_digests(folder: Path) -> dict[str, list[Any]]:
    """`digests` of all files of an exported model."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return digests({file.relative_to(folder).as_posix(): file for file in files})


def changed_note(folder: Path, run: dict[str, Any]) -> str:
    """Which files of an exported model are not those that run.json knows; empty if all are."""
    known, ours = run.get("exported_files") or {}, run.get("card_files") or []
    known = {name: one for name, one in known.items() if name not in ours and _NAME.fullmatch(name)}
    now = digests({name: folder / name for name in known if (folder / name).is_file()})
    names = [name for name, one in known.items() if now.get(name) != one]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    again = f"\nto have them as they were, type skipwise export {folder.parent}"
    return f"changed since the export: {', '.join(names[:5])}{more}{again}" if names else ""


def difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What of two identities differs, for a message; empty if nothing does."""
    if before.get("revision") != now.get("revision"):
        return f"its commit was {before.get('revision')} and is {now.get('revision')}"
    old, new = before.get("files", {}), now.get("files", {})
    names = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    if not names:
        return ""
    what = "was added" if names[0] not in old else "is gone" if names[0] not in new else "differs"
    more = f", and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]} {what}{more}"


def check_same_base(
    model: str, known: dict[str, Any], now: dict[str, Any], path: Path, fix: str
) -> None:
    """SkipwiseError if a base model is not the one that the run at `path` began with."""
    if what := difference(known, now):
        raise SkipwiseError(
            f"the base model {model} has changed since {path} began: {what}\n"
            f"restore the old one, or {fix}"
        )


def _digest(path: Path, sampled: bool) -> str:
    """SHA-256 of a file, or of blocks spread over it if it is sampled and larger than 64 MiB."""
    digest, size = hashlib.sha256(), path.stat().st_size
    step = size // _BLOCKS if sampled and size > _BLOCK * _BLOCKS else _BLOCK
    with path.open("rb") as opened:
        for start in range(0, size, step):
            opened.seek(start)
            digest.update(opened.read(_BLOCK))
        opened.seek(max(0, size - _BLOCK))
        digest.update(opened.read(_BLOCK))
    return digest.hexdigest()
