"""Progress of long work, on stderr: a bar on a terminal, elsewhere a line every 30 seconds.

Every phase of a run uses it, so that a log file or a notebook never stays silent for long. A thread
writes the line where a single call, such as a forward pass, takes longer.
"""

from __future__ import annotations

import sys
import threading
import time
import weakref

from tqdm import tqdm

SECONDS = 30.0  # minimum time between two lines, where there is no bar


class Progress:
    """Counts what is done of a total; a context manager.

    Work in parts (`begin`, `tick`, `finish`) may take less than was announced: `finish` counts a
    part as done.
    """

    last_line = 0.0  # when any of them printed one

    def __init__(
        self, label: str, total: int | None, *, unit: str = "", done: int = 0, shown: bool = True
    ) -> None:
        self.label, self.total, self.done, self.first, self.end = label, total, done, done, done
        self.detail = ""
        self.started = self.printed = time.monotonic()
        off = None if shown else True  # None: off if stderr is not a terminal
        self.bar = tqdm(
            desc=label, total=total, initial=done, unit=unit, unit_scale=True, disable=off, delay=1
        )
        self.lines = shown and self.bar.disable
        self._closed = threading.Event()
        if self.lines and SECONDS:  # 0: only what is done prints, and always
            arguments = (weakref.ref(self), self._closed)
            threading.Thread(target=_print_lines, args=arguments, daemon=True).start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        self._closed.set()
        self.bar.close()

    def begin(self, detail: str, amount: int) -> None:
        """Start a part of this amount."""
        self.detail, self.end = detail, self.end + amount
        if not self.bar.disable:
            self.bar.set_postfix_str(detail)

    def tick(self, amount: int) -> None:
        """Count some of the part as done."""
        self.advance(min(amount, self.end - self.done), self.detail)

    def finish(self) -> None:
        """End the part, whatever it took."""
        self.advance(self.end - self.done, f"{self.detail} done")

    def advance(self, amount: int, detail: str = "") -> None:
        """Count an amount as done; `detail` is the rest of the line."""
        self.done += amount
        self.detail = detail or self.detail
        if not self.bar.disable:
            self.bar.update(amount)
            if detail:
                self.bar.set_postfix_str(detail, refresh=False)
        else:
            self.print_if_due(detail)

    def print_if_due(self, detail: str) -> None:
        """Print the line, unless the last one is less than 30 seconds old."""
        if self.lines and time.monotonic() - self.printed >= SECONDS:
            self.printed = Progress.last_line = time.monotonic()
            print(self.line(detail), file=sys.stderr, flush=True)

    def line(self, detail: str) -> str:
        """`train: 17%, loss 1.234, about 3 min left`."""
        parts = [detail] if detail else []
        if self.total:
            parts.insert(0, f"{self.done / self.total:.0%}")
            if self.done > self.first:
                rate = (self.done - self.first) / (time.monotonic() - self.started)
                parts.append(f"about {format_time(max(0, self.total - self.done) / rate)} left")
        parts = parts or [f"{format_time(time.monotonic() - self.started)} so far"]
        return f"{self.label}: {', '.join(parts)}"


def _print_lines(progress: weakref.ref[Progress], closed: threading.Event) -> None:
    """Print a line when it is due, until the work is done."""
    while not closed.wait(SECONDS / 10) and (found := progress()) is not None:
        if time.monotonic() - Progress.last_line >= SECONDS:
            found.print_if_due(found.detail)
        del found


def format_time(seconds: float) -> str:
    """`45 s`, `12 min`, `2.2 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
