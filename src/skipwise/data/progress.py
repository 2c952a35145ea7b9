"""How far tokenization is: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path

from tqdm import tqdm

from skipwise.data.readers import Source
from skipwise.data.token_cache import Progress

_SECONDS = 10.0  # between two lines, at least


class TokenBar:
    """Counts bytes of the source's files, or tokens where their bytes do not tell the end."""

    def __init__(self, source: Source, size: int | None, start: Progress, shown: bool) -> None:
        self._in_bytes = size is not None and source.max_tokens is None
        self._total = size if self._in_bytes else source.max_tokens
        self._name = f"tokenize {Path(source.path).name}"
        self._first = self._last = self._count(start)
        self._began = self._told = time.monotonic()
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

    def update(self, now: Progress) -> None:
        count = self._count(now)
        self._bar.update(count - self._bar.n if not self._bar.disable else 0)
        step = (self._total or 0) / 10
        seconds = time.monotonic() - self._told
        if self._lines and seconds >= _SECONDS and count - self._last >= step:
            self._told, self._last = time.monotonic(), count
            print(self._line(count, now.num_tokens), file=sys.stderr, flush=True)

    def close(self) -> None:
        self._bar.close()

    def _count(self, now: Progress) -> int:
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


def warn_of_disk_space(now: Progress, size: int | None, itemsize: int, free: int) -> bool:
    """Whether the tokens to come will not fit the disk, going by those so far; warns if so.

    Args:
        size: bytes of the source's files, where known.
        itemsize: bytes of a token.
        free: bytes free where they are written.
    """
    if not size or now.num_bytes < 1 << 24:
        return False
    need = now.num_tokens * itemsize * max(0, size - now.num_bytes) / now.num_bytes
    if need <= free:
        return False
    warnings.warn(
        f"some {need / 1e9:,.0f} GB of tokens are still to be written, and {free / 1e9:,.0f} GB "
        "are free: set SKIPWISE_CACHE to a folder with room, or make room while it works",
        stacklevel=2,
    )
    return True
