"""docs/combinations.md is what the code answers today."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tools"))


@pytest.mark.extended
def test_the_page_of_combinations_is_that_of_the_code():
    pytest.importorskip("bitsandbytes")
    import make_combinations

    page = (ROOT / "docs/combinations.md").read_text(encoding="utf-8")
    assert page == make_combinations.page(), "run make reference"
