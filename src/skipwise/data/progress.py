"""Progress of tokenization, and a warning before the disk is full."""

from __future__ import annotations

import warnings
from pathlib import Path

from skipwise.config.progress import Progress
from skipwise.data.readers import Source
from skipwise.data.token_cache import StoreProgress


class TokenBar:
    """Counts bytes of the source's files, or tokens if their number decides the end."""

    def __init__(self, source: Source, size: int | None, start: StoreProgress, shown: bool) -> None:
        self._in_bytes = size is not None and source.max_tokens is None
        self._progress = Progress(
            f"tokenize {Path(source.path).name}",
            size if self._in_bytes else source.max_tokens,
            unit="B" if self._in_bytes else " tokens",
            done=self._count(start),
            shown=shown,
        )

    def update(self, now: StoreProgress) -> None:
        more = self._count(now) - self._progress.done
        self._progress.advance(more, f"{now.num_tokens / 1e6:,.0f} million tokens")

    def close(self) -> None:
        self._progress.close()

    def _count(self, now: StoreProgress) -> int:
        return now.num_bytes if self._in_bytes else now.num_tokens


def warn_of_disk_space(now: StoreProgress, size: int | None, itemsize: int, free: int) -> bool:
    """Estimate from the tokens so far whether the rest fits the disk; warn and return True if not.

    Args:
        size: bytes of the source's files, if known.
        itemsize: bytes per token.
        free: bytes free on the token cache's disk.
    """
    if not size or now.num_bytes < 1 << 24:
        return False
    need = now.num_tokens * itemsize * max(0, size - now.num_bytes) / now.num_bytes
    if need <= free:
        return False
    warnings.warn(
        f"about {need / 1e9:,.0f} GB of tokens are still to be written, and {free / 1e9:,.0f} GB "
        "are free: free some space now, or set SKIPWISE_CACHE to a folder on a larger disk",
        stacklevel=2,
    )
    return True
