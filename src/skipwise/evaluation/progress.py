"""Progress of an evaluation: a bar with the time left, or a line every 30 s in a log file."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

_EVERY = 30  # seconds between log lines, if there is no bar


class Progress:
    """Counts the tokens of all units; a context manager."""

    def __init__(self, label: str, total: int, shown: bool) -> None:
        self.label, self.total, self.shown = label, max(1, total), shown
        self.done, self.end = 0, 0
        self.started = self.printed = time.monotonic()
        off = None if shown else True  # None: off if stderr is not a terminal
        self.bar = tqdm(desc=label, total=total, unit=" tokens", unit_scale=True, disable=off)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def begin(self, name: str, tokens: int) -> None:
        """Start a unit of this many tokens."""
        self.name, self.end = name, self.end + tokens
        self.bar.set_postfix_str(name)

    def tick(self, tokens: int) -> None:
        """Count tokens as done."""
        more = min(tokens, self.end - self.done)
        self.done += more
        self.bar.update(more)

    def finish(self) -> None:
        """End the unit, whatever it took."""
        self.tick(self.end - self.done)
        if not self.shown or not self.bar.disable or time.monotonic() - self.printed < _EVERY:
            return
        self.printed = time.monotonic()
        share = self.done / self.total
        minutes = (self.printed - self.started) * (1 - share) / max(share, 1e-6) / 60
        line = f"{self.label}: {self.name} done, {share:.0%}, about {minutes:.0f} min left"
        print(line, file=sys.stderr, flush=True)
