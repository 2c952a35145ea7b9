"""The study's tables and plots, from the newest results, into docs/study.md and docs/study/.

python benchmarks/study/figures.py [--check]

Tables replace what stands between `<!-- NAME -->` and `<!-- end -->`; with --check nothing is
written, and what would change is an error.
"""

from __future__ import annotations

import argparse
import re
import sys

from rows import ROOT, Rows
from tables import tables

DOCS = ROOT / "docs"


def filled(text: str) -> str:
    """The page with every table's block filled anew; a table without a block is an error."""
    for name, new in tables().items():
        block = re.compile(rf"<!-- {name} -->\n((?!<!-- ).*\n)*<!-- end -->")
        text, count = block.subn(f"<!-- {name} -->\n\n{new}\n\n<!-- end -->", text)
        assert count == 1, f"{count} blocks for {name}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    page = DOCS / "study.md"
    old = page.read_text(encoding="utf-8")
    new = filled(old)
    if args.check:
        sys.exit(0 if old == new else f"{page.name} does not show the newest results")
    page.write_text(new, encoding="utf-8")
    from plots import write_plots

    write_plots(Rows(), DOCS / "study")


if __name__ == "__main__":
    main()
