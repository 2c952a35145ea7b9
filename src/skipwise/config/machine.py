"""This process and this machine: rank, versions, CPU, memory, disks, signals. No torch."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from skipwise.errors import SkipwiseError

_HANGUP = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none


def world_size() -> int:
    """Number of training processes, as set by the launcher."""
    return of_launcher("WORLD_SIZE", 1)


def is_main_process() -> bool:
    """Whether this is rank 0, the only process that writes the run folder."""
    return of_launcher("RANK", 0) == 0


def of_launcher(name: str, default: int) -> int:
    """A number that a launcher sets in the environment; SkipwiseError if it is none."""
    value = os.environ.get(name, str(default))
    alone = name == "RANK" and value != "0" and "WORLD_SIZE" not in os.environ
    if not value.isdecimal() or alone or int(value) < name.endswith("WORLD_SIZE"):
        fix = f"unset {name}" + ", or export WORLD_SIZE as well" * alone
        raise SkipwiseError(f"{name}={value} in the environment is not what launchers set\n{fix}")
    return int(value)


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("skipwise", "torch", "transformers", "accelerate", "peft", "tokenizers", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """CPU, cores and memory of this machine; code that loads torch adds the GPU's name."""
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            cpu = subprocess.run(command, capture_output=True, text=True).stdout.strip() or cpu
    found: dict[str, Any] = {"cpu": cpu, "num_cpus": os.cpu_count(), "system": platform.system()}
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found["memory_gib"] = round(memory / 2**30, 1)
    return found


def num_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory() -> int:
    """Bytes of memory that new work can take: what is free, within the limit of a container."""
    found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        line = next(line for line in lines if line.startswith("MemAvailable"))
        found = int(line.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            stat = (group / "memory.stat").read_text(encoding="utf-8")
            found = min(found, max(0, int(limit) - int(stat.split("anon ", 1)[1].split()[0])))
    except (OSError, StopIteration, ValueError, IndexError):
        pass  # not Linux, or no container
    return found


def cache_folder() -> Path:
    """Where tokens, unpacked models and the quickstart's text are kept."""
    given = os.environ.get("SKIPWISE_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipwise"


def cpu_has_bf16() -> bool:
    """Whether the CPU computes in bf16: `load.dtype: auto` trains and plans in it then."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in text or "amx_tile" in text


def process_memory(key: str) -> int:
    """VmRSS (resident) or VmHWM (its peak) of this process, in bytes.

    getrusage's ru_maxrss is only the fallback: it starts at the parent process's peak.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024
    except (OSError, StopIteration):  # not Linux
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024)


def check_disk_space(path: Path, num_bytes: float, what: str, fix: str = "") -> None:
    """Ask for free disk space before a large write.

    Args:
        path: where it is written, or will be.
        what: it is, for the message.
        fix: what to type. Defaults to freeing space.

    Raises:
        SkipwiseError: there is too little; says how much is free and how much is needed.
    """
    path = path.absolute()
    while not path.exists():
        path = path.parent
    free = shutil.disk_usage(path).free
    if free < num_bytes:
        unit, size = ("GiB", 2**30) if num_bytes >= 2**29 else ("MiB", 2**20)
        fix = fix or "free some space, and type the same command again; finished work is kept"
        raise SkipwiseError(
            f"the disk of {path} has {free / size:.1f} {unit} left, and {what} takes "
            f"{num_bytes / size:.1f}\n{fix}"
        )


def give_umask_mode(folder: Path) -> None:
    """Let the umask decide who reads the files of a folder; safetensors writes them for one."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in folder.rglob("*") if os.name == "posix" else ():
        if file.is_file() and not file.is_symlink() and file.stat().st_mode & 0o777 == 0o600:
            file.chmod(0o666 & ~mask)


@contextmanager
def on_signals(handler: Callable[[int], None], *numbers: int) -> Iterator[None]:
    """Call the handler on these signals, and on SIGHUP unless nohup has it ignored.

    Nothing can be written to a terminal that was closed, so that stdout and stderr lead nowhere
    from then on. Outside of the main thread, which alone gets signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    terminals = [number for number in (1, 2) if os.isatty(number)]

    def handle(number: int, frame: Any) -> None:
        if number == _HANGUP:  # a shell sends it again
            signal.signal(number, signal.SIG_IGN)
        for terminal in terminals if number == _HANGUP else ():
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, terminal)
            os.close(nowhere)
        handler(number)

    if _HANGUP is not None and signal.getsignal(_HANGUP) != signal.SIG_IGN:
        numbers = (*numbers, _HANGUP)
    old = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, before in old.items():
            signal.signal(number, before)
