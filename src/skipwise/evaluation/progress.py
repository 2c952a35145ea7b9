"""How far an evaluation is: a bar with the time left, or a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

_EVERY = 30  # seconds between lines, where no bar is drawn


class Progress:
    """Counts the tokens of units of work; a context manager around all of them."""

    def __init__(self, label: str, total: int, shown: bool) -> None:
        self.label, self.total, self.shown = label, max(1, total), shown
        self.done, self.end = 0, 0
        self.started = self.said = time.monotonic()
        self.bar = tqdm(
            desc=label,
            total=total,
            unit=" tokens",
            unit_scale=True,
            disable=None if shown else True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()

    def begin(self, name: str, tokens: int) -> None:
        """The next unit, of so many tokens."""
        self.name, self.end = name, self.end + tokens
        self.bar.set_postfix_str(name)

    def tick(self, tokens: int) -> None:
        """So many of its tokens are done."""
        more = min(tokens, self.end - self.done)
        self.done += more
        self.bar.update(more)

    def finish(self) -> None:
        """The unit is done, whatever it took."""
        self.tick(self.end - self.done)
        if not self.shown or not self.bar.disable or time.monotonic() - self.said < _EVERY:
            return
        self.said = time.monotonic()
        share = self.done / self.total
        minutes = (self.said - self.started) * (1 - share) / max(share, 1e-6) / 60
        print(
            f"{self.label}: {self.name} done, {share:.0%}, about {minutes:.0f} min left",
            file=sys.stderr,
            flush=True,
        )
