"""Processes forked from one that has its imports done: of a short command they are most.

Each begins like a fresh one otherwise: own environment, arguments, output files and session.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from forked_script import Process

SERVER = """
import json, os, sys, traceback
PRELOAD
import torch
torch.set_num_threads(1)

def run(task):
    os.setsid()
    os.environ.clear()
    os.environ.update(task["env"])
    for number, name in enumerate(task["files"]):
        if name:
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), number)
    sys.argv = task["argv"]
    try:
        exec(task["program"], {"__name__": "__main__"})
    except SystemExit as ended:
        return ended.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    task = json.loads(line)
    if "wait" in task:
        pid, status = os.waitpid(task["wait"], task["options"])
        answer = os.waitstatus_to_exitcode(status) if pid else None
    elif not (answer := os.fork()):
        code = run(task)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(json.dumps(answer), flush=True)
"""


SCRIPT = "import sys; sys.path.insert(0, {!r}); import forked_script; forked_script.run({!r})"


class Server:
    """Replaces `subprocess` where commands are `[python, "-c", "-m" or a script, ...]`."""

    DEVNULL = subprocess.DEVNULL

    def __init__(self, preload: str) -> None:
        self.program = SERVER.replace("PRELOAD", preload)
        self.process: subprocess.Popen[str] | None = None

    def ask(self, task):
        if self.process is None:
            self.process = subprocess.Popen(
                [sys.executable, "-c", self.program],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            atexit.register(self.process.kill)
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def Popen(self, command, *, env, stdout=None, stderr=None, **_):
        files = [os.devnull, *(getattr(f, "name", f) for f in (stdout, stderr))]
        files = [os.devnull if name == subprocess.DEVNULL else name for name in files]
        if command[1] == "-c":
            program, argv = command[2], ["-c", *command[3:]]
        elif command[1].endswith(".py"):
            program, argv = SCRIPT.format(str(Path(__file__).parent), command[1]), command[1:]
        else:
            program = f"import runpy; runpy.run_module({command[2]!r}, run_name='__main__')"
            argv = [command[2], *command[3:]]
        task = {"program": program, "argv": argv, "env": dict(env), "files": files}
        return Forked(self, self.ask(task))

    def run(self, command, *, env, **_):
        with tempfile.TemporaryDirectory() as scratch:
            files = [str(Path(scratch) / name) for name in ("stdout", "stderr")]
            process = self.Popen(command, env=env, stdout=files[0], stderr=files[1])
            code = process.wait()
            out, err = (Path(file).read_text() for file in files)
        return subprocess.CompletedProcess(command, code, out, err)


class Forked(Process):
    """A fork of the server, which alone can wait for it."""

    def __init__(self, server: Server, pid: int) -> None:
        super().__init__(pid)
        self.server = server

    def exit_code(self, options):
        return self.server.ask({"wait": self.pid, "options": options})


plain = Server("import numpy, peft, transformers")  # knows nothing of Skipwise
training = Server("import skipwise.cli, skipwise.training.setup")
