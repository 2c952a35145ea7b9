"""Write the study's table and plots, from the newest results, into README.md and figures/.

python research/study/figures.py [--check]

The table replaces the text between `<!-- table -->` and `<!-- end -->`. With --check the plots are
drawn in a scratch folder, and a page that would change or a plot too many or too few is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

from plots import write_plots
from rows import Rows
from settings import DISTILLED, FULL, NONE, OURS, PAPER, TARGETS, L, Setting, at, made

HERE = Path(__file__).parent
PAGE = HERE / "README.md"
NOT_MEASURED = "not measured"
BLOCK = re.compile(r"<!-- table -->\n((?!<!-- ).*\n)*<!-- end -->")
HEAD = (
    "| f | paper, YaRN | at its best rate | and with temperature | without distillation | defaults "
    "| full length | defaults over paper at its best | over it with temperature "
    "| behind full length | passkeys: paper, best rate, with temperature, defaults, full "
    "| at 256: base, defaults |",
    "|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
)


def filled(text: str, table: str) -> str:
    """The page with its table filled again; a page without the block is an error."""
    text, count = BLOCK.subn(f"<!-- table -->\n\n{table}\n\n<!-- end -->", text)
    assert count == 1, f"{count} blocks for the table"
    return text


def main_table(rows: Rows) -> str:
    """By f: the published settings, the defaults and full length at equal tokens."""
    return "\n".join([*HEAD, *(_line(rows, T) for T in TARGETS)])


def _line(rows: Rows, T: int) -> str:
    ours, defaults, full = ((at(s, T), s is not FULL) for s in (OURS, DISTILLED, FULL))
    paper = [(at(PAPER, T), False), *((_best_rate(rows, T, t), t) for t in (False, True))]
    cells, values = [f"{T // L}"], []
    for setting, tempered in (*paper, ours, defaults, full):
        values.append(rows.mean(setting, T, tempered=tempered))
        count = len(rows.of(setting))
        cells.append(f"{_cell(rows, setting, 'perplexity', T, tempered)} ({count})")
    for other in (values[1], values[2], values[5]):
        both = values[4] and other
        cells.append(f"{100 * (values[4] / other - 1):+.1f} %" if both else NOT_MEASURED)
    keys = [_cell(rows, s, "passkey", T, t) for s, t in (*paper, defaults, full)]
    base = at(made(NONE, rope_off=True), T), False
    short = [_cell(rows, s, "perplexity", L, t) for s, t in (base, defaults)]
    return "| " + " | ".join([*cells, " / ".join(keys), " / ".join(short)]) + " |"


def _cell(rows: Rows, setting: Setting, task: str, length: int, tempered: bool) -> str:
    value = rows.mean(setting, length, task=task, tempered=tempered)
    if value is None:
        return NOT_MEASURED
    return f"{value:.2f}" if task == "perplexity" else f"{100 * value:.0f}"


def _best_rate(rows: Rows, T: int, tempered: bool) -> Setting:
    """The published settings at the learning rate, of those tried, with the lowest perplexity.

    Args:
        tempered: at the attention temperature that was searched, as for our settings.
    """
    rates = {r["setting"]["learning_rate"] for r in rows.rows if r["setting"]["target"] == T}
    tried = [at(PAPER, T, learning_rate=rate) for rate in sorted(rates)]
    means = {s: mean for s in tried if (mean := rows.mean(s, T, tempered=tempered)) is not None}
    return min(means, key=means.__getitem__, default=at(PAPER, T))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    rows, old = Rows(), PAGE.read_text(encoding="utf-8")
    new = filled(old, main_table(rows))
    if args.check:
        sys.exit(", ".join(outdated(rows, old, new)) or 0)
    PAGE.write_text(new, encoding="utf-8")
    write_plots(rows, HERE / "figures")


def outdated(rows: Rows, old: str, new: str) -> list[str]:
    """What does not show the newest results: of a plot, that it is missing or was left behind."""
    found = [] if old == new else [f"{PAGE.name} does not show the newest results"]
    with tempfile.TemporaryDirectory() as scratch:
        write_plots(rows, Path(scratch))
        drawn = {path.name for path in Path(scratch).iterdir()}
    shown = {path.name for path in (HERE / "figures").iterdir()}
    return found + [f"figures/{name} is not what plots.py draws" for name in sorted(drawn ^ shown)]


if __name__ == "__main__":
    main()
