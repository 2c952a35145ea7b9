"""Fingerprints of weights, configs and tasks: if they are equal, so would the results be."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path
from typing import Any

_SAMPLES = 64  # blocks read of each weight file


def harness_identity(folder: str | None) -> list[Any]:
    """Version of lm-evaluation-harness, and names, sizes and times of a task folder's files."""
    try:
        version = metadata.version("lm_eval")
    except metadata.PackageNotFoundError:  # loading a task raises
        version = None
    if folder is None:
        return [version]
    files = sorted(f for f in Path(folder).expanduser().glob("*") if f.is_file())
    return [version, *([f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files)]


def files_identity(folder: str | Path) -> list[Any]:
    """Sizes, times and samples of a folder's weights, and its configs; for a hub model its name."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        return [str(folder)]
    weights = sorted([*path.glob("*.safetensors"), *path.glob("*.bin")])
    configs = [path / name for name in ("config.json", "generation_config.json")]
    return [
        *([f.name, f.stat().st_size, f.stat().st_mtime_ns, _sampled(f)] for f in weights),
        *([f.name, f.read_text(encoding="utf-8")] for f in configs if f.exists()),
    ]


def _sampled(file: Path) -> str:
    """Digest of a file's first bytes and of blocks spread over it."""
    digest, size = hashlib.sha1(usedforsecurity=False), file.stat().st_size
    with file.open("rb") as opened:
        for i in range(_SAMPLES):
            opened.seek(i * size // _SAMPLES)
            digest.update(opened.read(4096))
    return digest.hexdigest()[:12]
