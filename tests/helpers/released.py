"""The rows of tests/released/models_*.jsonl, and the line of docs/families.md that counts them."""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[1] / "released"
COUNTED = "**Released models.** "


def read_rows() -> list[dict[str, Any]]:
    return [
        json.loads(line)
        for file in sorted(FOLDER.glob("models_*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a config.json."""
    return config.get("text_config") or config


def count_line() -> str:
    """One line of docs/families.md."""
    rows = read_rows()
    families = {text_part(row["config"])["model_type"] for row in rows}
    expected = [row["expect"] for row in rows]
    asked = sum(e["extendable"] == "question" for e in expected)
    taken = sum(e["extendable"] is True or e.get("text_only") is True for e in expected)
    return (
        f"{COUNTED}`tests/test_released.py` reads the configs of {len(rows)} released models of "
        f"{len(families)} families: {taken} can be extended as they are, {asked} once their length "
        f"is given, and {len(rows) - taken - asked} are refused with the reason."
    )
