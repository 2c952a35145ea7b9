"""Run a script in a forked process (forked.py); the Python processes that it starts are forks too.

Such a child begins with the imports done, which are most of its time. All else is its own: process
group, arguments, environment and output.
"""

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

_run, _popen = subprocess.run, subprocess.Popen


class Process:
    """What tests and scripts use of `subprocess.Popen`; a subclass asks for the exit code."""

    def __init__(self, pid):
        self.pid, self.returncode = pid, None

    def exit_code(self, options):
        """Of the process, or None while it runs; `options` are those of os.waitpid."""
        raise NotImplementedError

    def poll(self, options=os.WNOHANG):
        if self.returncode is None:
            self.returncode = self.exit_code(options)
        return self.returncode

    def wait(self):
        return self.poll(0)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


class Child(Process):
    """A fork of this process that runs a command."""

    def __init__(self, command, stdout=None, stderr=None, env=None, **_):
        self.args = command
        super().__init__(os.fork())
        if not self.pid:
            os._exit(_python(command, (stdout, stderr), env))

    def exit_code(self, options):
        pid, status = os.waitpid(self.pid, options)
        return os.waitstatus_to_exitcode(status) if pid else None


def _python(command, outputs, env):
    """The exit code of `[python, "-c", "-m" or a script, ...]`, in this process."""
    os.setsid()
    os.environ.update(env or {})
    for number, file in zip((1, 2), outputs, strict=True):
        if file is not None:
            null = file == subprocess.DEVNULL
            os.dup2(os.open(os.devnull, os.O_WRONLY) if null else file.fileno(), number)
    kind, *sys.argv = command[1:]
    if kind == "-m":
        return _exit_code(lambda: runpy.run_module(sys.argv[0], run_name="__main__"))
    if kind == "-c":
        program, sys.argv[0] = sys.argv[0], "-c"
        return _exit_code(lambda: exec(program, {"__name__": "__main__"}))
    sys.argv.insert(0, kind)
    return _exit_code(lambda: runpy.run_path(kind, run_name="__main__"))


def _exit_code(work):
    """That of a process which does this work; what it prints goes out."""
    code = 0
    try:
        work()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def _forked_run(command, **options):
    if command[0] != sys.executable:
        return _run(command, **options)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        code = Child(command, out, err, options.get("env")).wait()
        texts = [file.seek(0) or file.read() for file in (out, err)]
    return subprocess.CompletedProcess(command, code, *texts)


def _forked_popen(command, *args, **options):
    mine = command[0] == sys.executable
    return Child(command, **options) if mine else _popen(command, *args, **options)


def run(path):
    """Run the script as `python path ARGUMENTS` does, with the arguments in sys.argv."""
    subprocess.run, subprocess.Popen = _forked_run, _forked_popen
    sys.path.insert(0, str(Path(path).parent))
    sys.exit(_exit_code(lambda: runpy.run_path(path, run_name="__main__")))
