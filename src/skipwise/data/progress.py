"""Tokenization progress: a bar on a terminal, otherwise a line from time to time."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

from tqdm import tqdm

from skipwise.data.readers import Source
from skipwise.data.token_cache import StoreProgress

_SECONDS = 10.0  # minimum time between two lines


class TokenBar:
    """Counts bytes of the source's files, or tokens if their number decides the end."""

    def __init__(self, source: Source, size: int | None, start: StoreProgress, shown: bool) -> None:
        self._in_bytes = size is not None and source.max_tokens is None
        self._total = size if self._in_bytes else source.max_tokens
        self._name = f"tokenize {Path(source.path).name}"
        self._first = self._last = self._count(start)
        self._began = self._printed = time.monotonic()
        self._lines = shown and not sys.stderr.isatty()
        self._bar = tqdm(
            desc=self._name,
            unit="B" if self._in_bytes else " tokens",
            unit_scale=True,
            total=self._total,
            initial=self._first,
            disable=not shown or self._lines,
            delay=1,
        )

    def update(self, now: StoreProgress) -> None:
        count = self._count(now)
        self._bar.update(count - self._bar.n if not self._bar.disable else 0)
        step = (self._total or 0) / 10
        seconds = time.monotonic() - self._printed
        if self._lines and seconds >= _SECONDS and count - self._last >= step:
            self._printed, self._last = time.monotonic(), count
            print(self._line(count, now.num_tokens), file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _count(self, now: StoreProgress) -> int:
        return now.num_bytes if self._in_bytes else now.num_tokens

    def _line(self, count: int, num_tokens: int) -> str:
        if not self._total:
            return f"{self._name}: {num_tokens / 1e6:,.0f} million tokens"
        rate = (count - self._first) / (time.monotonic() - self._began)
        left = max(0, self._total - count) / max(rate, 1e-9)
        return (
            f"{self._name}: {100 * count / self._total:.0f} %, {num_tokens / 1e6:,.0f} million "
            f"tokens, {left / 60:,.0f} min left"
        )


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
