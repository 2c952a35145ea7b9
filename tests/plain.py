"""Processes that know nothing of Skipwise, forked from one that has imported transformers.

An export is loaded again by a fresh process; most of its seconds go into imports.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SERVER = """
import json, os, sys, traceback
import numpy, peft, torch, transformers
torch.set_num_threads(1)

def run(task):
    os.environ.clear()
    os.environ.update(task["env"])
    for number, name in enumerate(task["files"], 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-c", *task["arguments"]]
    try:
        exec(task["program"], {"__name__": "__main__"})
        assert not any(name.split(".")[0] == "skipwise" for name in sys.modules)
        return 0
    except BaseException:
        traceback.print_exc()
        return 1

for line in sys.stdin:
    child = os.fork()
    if not child:
        code = run(json.loads(line))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class PlainProcesses:
    """`subprocess.run` of `[python, "-c", program, ...]`, without its imports."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def run(self, command, *, capture_output, text, env):
        assert command[:2] == [sys.executable, "-c"] and capture_output and text
        if self.server is None:
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            start = [sys.executable, "-c", SERVER]
            self.server = subprocess.Popen(start, **pipes, stderr=subprocess.DEVNULL, text=True)
        with tempfile.TemporaryDirectory() as scratch:
            files = [Path(scratch) / name for name in ("stdout", "stderr")]
            task = {"program": command[2], "arguments": command[3:], "env": dict(env)}
            self.server.stdin.write(json.dumps({**task, "files": [*map(str, files)]}) + "\n")
            self.server.stdin.flush()
            code = int(self.server.stdout.readline())
            out, err = (file.read_text() if file.exists() else "" for file in files)
        return subprocess.CompletedProcess(command, code, out, err)

    def close(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()
