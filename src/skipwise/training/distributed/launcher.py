"""The launcher behind `--gpus N`: one training process per GPU of this machine.

Each process gets torchrun's environment variables, so training is the same under torchrun and
`accelerate launch`, which also support several machines. This launcher is easier to stop: it
forwards a signal to every process and waits until all have saved. An elastic launcher kills them
after 30 seconds.
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

from skipwise.config.machine import num_cores, on_signals
from skipwise.errors import RunStopped, SkipwiseError

STOPPED = 75  # exit code of a run that was stopped and saved: EX_TEMPFAIL, try again later
FAILED = 2  # exit code of a failure with an error message
_GRACE = 5.0  # seconds for the other processes to fail with their own messages


def launched() -> bool:
    """Whether a launcher started this process. accelerate sets no WORLD_SIZE for one process."""
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def launch(arguments: list[str], num_processes: int) -> None:
    """Run `skipwise ARGUMENTS` in several processes and wait for all of them.

    Raises:
        RunStopped: all processes were stopped and have saved.
        SkipwiseError: a process failed. The end of its output is on stderr.
    """
    with tempfile.TemporaryDirectory(prefix="skipwise-") as logs, ExitStack() as files:
        processes = []
        for rank, environment in enumerate(_environments(num_processes)):
            log: Any = None
            if rank:  # stderr of rank 0 goes to the terminal, of the others to a log
                log = files.enter_context((Path(logs) / f"{rank}.log").open("wb"))
            processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "skipwise", *arguments],
                    env=environment,
                    stdout=log or subprocess.DEVNULL,  # the caller prints results
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches only this process
                    preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                )
            )
        with _forward_signals(processes) as signals:
            failed = _wait(processes, signals)
        if failed is None:
            if signals or any(process.returncode == STOPPED for process in processes):
                raise RunStopped("stopped and saved; run the same command again to continue")
            return
        if processes[failed].returncode == processes[0].returncode == FAILED:
            failed = 0  # its message is on stderr, and the others have the same
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
                "the machine is out of memory\nuse fewer --gpus, or see skipwise plan RECIPE"
            )
        what = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        raise SkipwiseError(f"process {failed} of {num_processes} failed: {what}")


def num_gpus() -> int:
    """The number of visible GPUs of this machine, without importing torch."""
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
    threads = max(1, num_cores() // num_processes)
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
    """Wait for all processes. The rank that failed first, or None."""
    failed, since, killed = None, None, False
    while any(process.poll() is None for process in processes):
        if failed is None:
            failed = _first_failure(processes, signals)
        ended = failed is not None or any(process.poll() == STOPPED for process in processes)
        since = since or (time.monotonic() if ended else None)
        if since is not None and time.monotonic() - since > (_GRACE if failed is not None else 60):
            for process in processes:  # they wait for the one that ended
                process.kill()
            killed = True  # by this launcher, which is no failure of theirs
        time.sleep(0.05)
    return failed if failed is not None or killed else _first_failure(processes, signals)


def _first_failure(processes: list[Any], signals: list[int]) -> int | None:
    """The rank that failed first, or None. A process ended by a forwarded signal has not failed."""
    fine = (None, 0, STOPPED, *(-number for number in signals))
    codes = [process.poll() for process in processes]
    failed = [i for i, code in enumerate(codes) if code not in fine]
    # a killed process is the cause of others that fail with a message at the same moment
    return min(failed, key=lambda i: ((codes[i] or 0) >= 0, i), default=None)


@contextmanager
def _forward_signals(processes: list[Any]) -> Iterator[list[int]]:
    """Forward SIGINT, SIGTERM and SIGHUP to every process. Yields the list of received signals."""
    received: list[int] = []

    def forward(number: int) -> None:
        received.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    try:
        with on_signals(forward, signal.SIGINT, signal.SIGTERM):
            yield received
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()


def _die_with_parent() -> None:
    """Kill this process when the launcher dies (Linux: PR_SET_PDEATHSIG)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
