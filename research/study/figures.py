"""Write the study's tables and plots, from the newest results, into README.md and figures/.

python research/study/figures.py [--check]

A table replaces the text between `<!-- NAME -->` and `<!-- end -->`. With --check nothing is
written, and a page that would change is an error.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

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
        sys.exit(0 if old == new else f"{PAGE.name} does not show the newest results")
    PAGE.write_text(new, encoding="utf-8")
    from plots import write_plots

    write_plots(Rows(), HERE / "figures")


if __name__ == "__main__":
    main()
