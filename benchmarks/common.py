"""What every benchmark writes: a dated JSON with machine, versions, commit and command."""

import json
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from skipwise.run import machine, versions

RESULTS = Path(__file__).with_name("results")


def write_result(name: str, figures: dict[str, Any]) -> Path:
    """Write and print the figures of one benchmark."""
    now = datetime.now(timezone.utc)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    file = RESULTS / f"{name}_{now:%Y-%m-%d}.json"
    result = {
        "benchmark": name,
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": machine(),
        "versions": versions(),
        **figures,
    }
    RESULTS.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=1))
    return file
