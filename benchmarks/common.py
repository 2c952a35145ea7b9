"""What every benchmark writes: a dated JSON with machine, versions, commit and command.

It goes to results/, or to the folder in OUT where that is set. COMMIT stands in for git's answer
where only a copy of the tree is (a lent machine).
"""

import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from skipwise.config.machine import machine, versions

RESULTS = Path(os.environ.get("OUT") or Path(__file__).with_name("results"))


def write_result(name: str, figures: dict[str, Any], *, show: bool = True) -> Path:
    """Write the figures of one benchmark, and print them unless `show` is false."""
    now = datetime.now(timezone.utc)
    commit = os.environ.get("COMMIT", "")
    if not commit and shutil.which("git"):
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
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if show:
        print(json.dumps(figures, indent=1))
    return file
