"""Fingerprints of weights, configs and tasks: if they are equal, so would the results be."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

from skipwise.models.identity import known_digests


def harness_identity(folder: str | None) -> list[Any]:
    """Version of lm-evaluation-harness, and names, sizes and times of a task folder's files."""
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:  # loading a task raises
        version = None
    if folder is None:
        return [version]
    root = Path(folder).expanduser()
    files = {str(f.relative_to(root)): f for f in sorted(root.rglob("*")) if f.is_file()}
    times = {name: (f.stat().st_size, f.stat().st_mtime_ns) for name, f in files.items()}
    return [version, *([name, *of] for name, of in times.items())]


def files_identity(folder: str | Path) -> list[Any]:
    """Digests of a folder's weights, and its configs; for a hub model its name."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return [str(folder)]
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    configs = [path / name for name in ("config.json", "generation_config.json")]
    return [
        known_digests({file.name: file for file in weights}),
        *([f.name, f.read_text(encoding="utf-8")] for f in configs if f.exists()),
    ]
