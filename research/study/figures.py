"""Write the study's tables and plots, from the newest results, into README.md and figures/.

python research/study/figures.py [--check]

A table replaces the text between `<!-- NAME -->` and `<!-- end -->`. With --check the plots are
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
from tables import tables

HERE = Path(__file__).parent
PAGE = HERE / "README.md"


def filled(text: str) -> str:
    """The page with every table's block filled again; a table without a block is an error."""
    for name, new in tables().items():
        block = re.compile(rf"<!-- {name} -->\n((?!<!-- ).*\n)*<!-- end -->")
        text, count = block.subn(f"<!-- {name} -->\n\n{new}\n\n<!-- end -->", text)
        assert count == 1, f"{count} blocks for {name}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = PAGE.read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        sys.exit(", ".join(outdated(old, new)) or 0)
    PAGE.write_text(new, encoding="utf-8")
    write_plots(Rows(), HERE / "figures")


def outdated(old: str, new: str) -> list[str]:
    """What does not show the newest results: of a plot, that it is missing or was left behind."""
    found = [] if old == new else [f"{PAGE.name} does not show the newest results"]
    with tempfile.TemporaryDirectory() as scratch:
        write_plots(Rows(), Path(scratch))
        drawn = {path.name for path in Path(scratch).iterdir()}
    shown = {path.name for path in (HERE / "figures").iterdir()}
    return found + [f"figures/{name} is not what plots.py draws" for name in sorted(drawn ^ shown)]


if __name__ == "__main__":
    main()
