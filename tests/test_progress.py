"""Progress of long work: bars on a terminal, lines at most 30 seconds apart in a log file."""

import io
import threading

import pytest

from skipwise.config import progress
from skipwise.config.progress import Progress


class Clock:
    now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(progress, "time", made)
    return made


def test_a_log_file_gets_a_line_every_30_seconds(clock, capsys):
    with Progress("train", 240) as bar:
        for _ in range(240):
            clock.now += 1.0
            bar.advance(1, f"loss {bar.done / 100:.2f}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "train: 12%, loss 0.29, about 4 min left"  # 30 of 240 at 1 s each
    assert lines[-1] == "train: 100%, loss 2.39, about 0 s left" and len(lines) == 8


def test_a_resumed_count_is_timed_from_where_it_began(clock, capsys):
    bar = Progress("train", 100, done=50)
    clock.now = 40.0
    bar.advance(10)
    assert capsys.readouterr().err == "train: 60%, about 3 min left\n"  # 40 steps at 4 s


def test_without_a_total_the_detail_is_said(clock, capsys):
    bar = Progress("search", None)
    clock.now = 31.0
    bar.advance(0, "temperature 1.1")
    assert capsys.readouterr().err == "search: temperature 1.1\n"


def test_nothing_is_said_where_it_is_not_shown_and_a_terminal_gets_a_bar(clock, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    quiet = Progress("quiet", 2, shown=False)
    quiet.advance(2, "done")
    assert screen.getvalue() == ""
    bar = Progress("loud", 2)
    assert not bar.bar.disable and not bar.lines
    clock.now = 100.0
    bar.advance(2, "done")
    assert "loud: 100%, done" not in screen.getvalue()


def test_a_part_that_took_less_counts_whole(clock):
    bar = Progress("evaluate", 30, shown=False)
    bar.begin("passkey", 20)
    bar.tick(5)
    bar.finish()
    assert bar.done == 20
    bar.begin("needle", 10)
    bar.tick(50)
    assert bar.done == 30


def test_a_call_that_takes_long_does_not_stay_silent(monkeypatch, capsys):
    monkeypatch.setattr(progress, "SECONDS", 0.1)
    with Progress("load", None), Progress("probe a batch", None):
        threading.Event().wait(0.6)
    lines = capsys.readouterr().err.splitlines()
    assert 2 <= len(lines) <= 6  # of both together
    assert all(line.endswith(("0 s so far", "1 s so far")) for line in lines)
    threading.Event().wait(0.3)
    assert capsys.readouterr().err == ""  # closed
    forgotten = Progress("forgotten", None)
    del forgotten
    threading.Event().wait(0.3)
    assert capsys.readouterr().err == ""
