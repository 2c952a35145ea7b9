"""What benchmarks and research scripts share: their result file, `--smoke`, and child processes.

A result is a dated JSON with machine, versions, commit and command. It goes to the results folder
of benchmarks/ or research/, or to the folder in the environment variable OUT. COMMIT replaces git's
answer where only a copy of the tree is (a rented machine).

Every script has a smallest setting, `--smoke`, which tests/test_scripts.py runs. Its figures mean
nothing, so they go to runs/smoke/.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from skipwise.config.machine import machine, versions

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks" / "results"
RESEARCH = ROOT / "research" / "results"
SMOKE = ROOT / "runs" / "smoke"


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the module's docstring as its help, and `--smoke`."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="the smallest setting, to test it")
    return parser


def write_result(
    name: str, figures: dict[str, Any], *, folder: Path = BENCHMARKS, show: bool = True
) -> Path:
    """Write the figures of one script.

    Args:
        folder: results folder; `SMOKE` for the smallest setting.
        show: also print the figures.
    """
    now = datetime.now(timezone.utc)
    commit = os.environ.get("COMMIT", "")
    if not commit and shutil.which("git"):
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
        ).stdout.strip()
    folder = Path(os.environ.get("OUT") or folder)
    file = folder / f"{name}_{now:%Y-%m-%d}.json"
    result = {
        "benchmark": name,
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit,
        "machine": machine(),
        "versions": versions(),
        **figures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if show:
        print(json.dumps(figures, indent=1))
    return file


def run_child(*arguments: object) -> dict[str, Any]:
    """Run this script once more in its own process; its last line of output is JSON."""
    command = [sys.executable, os.path.abspath(sys.argv[0]), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
