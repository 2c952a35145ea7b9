"""What this process and this machine are: rank, versions, CPU, memory. No torch."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any


def world_size() -> int:
    """The number of processes that train together, as a launcher says."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes the run folder: of those that train together the first does."""
    return int(os.environ.get("RANK", "0")) == 0


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("skipwise", "torch", "transformers", "accelerate", "peft", "tokenizers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU, cores and memory of this machine; the GPU's name is added where torch is loaded."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        if sys.platform == "darwin":
            asked = ["sysctl", "-n", "machdep.cpu.brand_string"]
            cpu = subprocess.run(asked, capture_output=True, text=True).stdout.strip() or cpu
    metadata: dict[str, Any] = {"cpu": cpu, "num_cpus": os.cpu_count(), "system": platform.system()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        metadata["memory_gib"] = round(pages / 2**30, 1)
    return metadata


def process_memory(key: str) -> int:
    """VmRSS (resident) or VmHWM (its peak) of this process, in bytes.

    Not getrusage's ru_maxrss, where there is a choice: that begins at the peak of the process that
    started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
    except (OSError, StopIteration):  # no Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)
