"""Several processes on this machine: what `--gpus N` starts, one process for each GPU.

Each gets the environment that torchrun would give it, so the code in them is the same under
`accelerate launch` and torchrun. Those are for several machines; on one machine this is simpler to
stop: a signal goes to every process, which then save what they have for as long as it takes (an
elastic launcher kills them after 30 seconds), and exit codes come through.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from skipwise.errors import RunStopped, SkipwiseError

STOPPED = 75  # EX_TEMPFAIL, try again later: the exit code of a run that was stopped and saved
FAILED = 2  # of a failure that was told in words
_GRACE = 5.0  # seconds for the others to fail by themselves, with their own words


def launched() -> bool:
    """Whether a launcher started this process; accelerate's for one process sets no WORLD_SIZE."""
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def launch(arguments: list[str], num_processes: int) -> None:
    """Run `skipwise ARGUMENTS` in several processes, until the last one has ended.

    Raises:
        RunStopped: all of them were stopped and have saved.
        SkipwiseError: one of them failed; its last words are on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="skipwise-") as logs, ExitStack() as files:
        processes = []
        for rank, environment in enumerate(_environments(num_processes)):
            log: Any = None
            if rank:  # the first one speaks; of the others only what ends them is of interest
                log = files.enter_context((Path(logs) / f"{rank}.log").open("wb"))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "skipwise", *arguments],
                    env=environment,
                    stdout=log or subprocess.DEVNULL,  # results are the caller's to print
                    stderr=log,
                    start_new_session=True,  # Ctrl-C in the terminal comes to this process alone
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                )
            )
        with _passed_on(processes) as signals:
            failed = _wait(processes, signals)
        if failed is None:
            if signals or any(process.returncode == STOPPED for process in processes):
                raise RunStopped("stopped and saved; type the same command again to go on")
            return
        if processes[failed].returncode == processes[0].returncode == FAILED:
            failed = 0  # it has spoken, and the others say the same
        code = processes[failed].returncode
        log = Path(logs) / f"{failed}.log"
        if log.exists():
            text = log.read_text(encoding="utf-8", errors="replace")
            print("\n".join(text.strip().splitlines()[-20:]), file=sys.stderr)
        if code == FAILED:
            raise SkipwiseError(f"process {failed} of {num_processes} failed, for the reason above")
        if code == -signal.SIGKILL:
            raise SkipwiseError(
                f"process {failed} of {num_processes} was killed (signal 9), most often because "
                "this machine's memory is full\ntype fewer --gpus, or see skipwise plan RECIPE"
            )
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise SkipwiseError(f"process {failed} of {num_processes} failed: {what}")


def num_gpus() -> int:
    """GPUs of this machine that may be used, without loading torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([device for device in visible.split(",") if device.strip() not in ("", "-1")])
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True)
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines())


def _environments(num_processes: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": os.environ.get("MASTER_PORT", str(port)),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)),
    }
    return [{**shared, "RANK": str(i), "LOCAL_RANK": str(i)} for i in range(num_processes)]


def _wait(processes: list[Any], signals: list[int]) -> int | None:
    """The number of the process that failed first, when all have ended; None: none did."""
    failed, since = None, None
    while any(process.poll() is None for process in processes):
        if failed is None:
            failed = _first_failure(processes, signals)
        gone = failed is not None or any(process.poll() == STOPPED for process in processes)
        since = since or (time.monotonic() if gone else None)
        if since is not None and time.monotonic() - since > (_GRACE if failed is not None else 60):
            for process in processes:  # they wait for the one that is gone
                process.kill()
        time.sleep(0.05)
    return _first_failure(processes, signals) if failed is None else failed


def _first_failure(processes: list[Any], signals: list[int]) -> int | None:
    """A process that was ended by the signal handed on to it has not failed."""
    fine = (None, 0, STOPPED, *(-number for number in signals))
    codes = [process.poll() for process in processes]
    failed = [i for i, code in enumerate(codes) if code not in fine]
    # one that was killed is the cause of those that fail in words at the same moment
    return min(failed, key=lambda i: ((codes[i] or 0) >= 0, i), default=None)


@contextmanager
def _passed_on(processes: list[Any]) -> Iterator[list[int]]:
    """Hand on SIGINT and SIGTERM to every process, as often as they come; gives those that came."""
    came: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        came.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    old = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        for process in processes:
            if process.poll() is None:
                process.kill()


def _die_with_parent() -> None:
    """A launcher that is killed takes its processes with it (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
