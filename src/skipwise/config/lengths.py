"""Lengths in tokens, as people type them: `32768`, `32k`, `1m`, `4k..32k`."""

from __future__ import annotations

from skipwise.errors import SkipwiseError


def parse_length(value: str | int) -> int:
    """Tokens from `32768`, `32_768`, `32k` or `1m`; k = 1,024, m = 1,024 x 1,024."""
    text = str(value).strip().lower().replace(",", "").replace("_", "")
    scale = {"k": 1024, "m": 1024 * 1024}.get(text[-1:], 1)
    try:
        tokens = float(text[:-1] if scale > 1 else text) * scale
        if tokens == int(tokens) and tokens > 0:
            return int(tokens)
    except (ValueError, OverflowError):
        pass
    raise SkipwiseError(f"{value!r} is not a length in tokens: type 32768 or 32k")


def parse_lengths(text: str) -> list[int]:
    """The lengths of `4k,8k,20k`; `4k..32k` means 4k, every doubling below 32k, and 32k."""
    lengths: list[int] = []
    for part in text.split(","):
        first, dots, last = part.partition("..")
        length, end = parse_length(first), parse_length(last if dots else first)
        if end < length:
            raise SkipwiseError(f"{part!r}: the second length is smaller than the first")
        while length < end:
            lengths.append(length)
            length *= 2
        lengths.append(end)
    return sorted(set(lengths))


def format_length(tokens: int) -> str:
    """`32k` for multiples of 1,024, otherwise the number."""
    return f"{tokens // 1024}k" if tokens % 1024 == 0 and tokens >= 1024 else str(tokens)
