"""Faults at the n-th file operation of a Python process, for tests and `make torture`.

`SKIPWISE_FAULT` is `KIND:N:FOLDER[:FOLDER...]`: the N-th operation on a file below one of the
folders meets the fault. `SKIPWISE_FAULT_LOG` names a file that gets the number of operations and
what was hit. Operations are what CPython audits (open, rename, remove, mkdir, rmdir, link, symlink,
truncate, chmod, utime), `os.fsync`, and the beginning and end of `safetensors` and `torch.save`.

    count     nothing; only count
    kill      SIGKILL
    stage     SIGKILL at the first operation after standard output, a file, has the line "[N/"
    full      this and every later operation that writes gets ENOSPC
    readonly  the same with EROFS
    damage    a byte in the middle of the file is flipped before it is opened to be read
    cut       the second half of the file is gone before it is opened to be read
"""

import atexit
import errno
import os
import shutil
import signal
import sys
import threading

_MOVES = {"os.rename": 2, "os.link": 2, "os.symlink": 2}
_CHANGES = ("os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.utime")
_IGNORED = (".lock", ".pyc")


class Injector:
    """Counts operations, and meets one with a fault."""

    def __init__(self, kind, number, folders, log=None):
        self.kind, self.number, self.log = kind, number, log
        self.folders = tuple(os.path.realpath(folder) + os.sep for folder in folders)
        self.count, self.busy, self.owner = 0, threading.local(), os.getpid()
        self.hit = ""

    def install(self):
        shutil._use_fd_functions = False  # rmtree names whole paths
        sys.addaudithook(self.hook)
        sync = os.fsync

        def fsync(descriptor):
            number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            name = f"/proc/self/fd/{number}"
            self.meet("fsync", os.readlink(name) if os.path.exists(name) else "", writes=True)
            return sync(descriptor)

        os.fsync = fsync
        atexit.register(self.note)

    def wrap_savers(self):
        """Wrap what writes files without Python's knowledge; for after the imports."""
        import safetensors.torch
        import torch
        import transformers.modeling_utils as modeling

        def around(saver, place):
            def save(*arguments, **options):
                name = arguments[place] if len(arguments) > place else options.get("filename", "")
                self.meet("save", name, writes=True)
                result = saver(*arguments, **options)
                self.meet("saved", name, writes=True)
                return result

            return save

        wrapped = around(safetensors.torch.save_file, 1)
        safetensors.torch.save_file = wrapped
        if hasattr(modeling, "safe_save_file"):
            modeling.safe_save_file = wrapped
        torch.save = around(torch.save, 1)

    def hook(self, event, arguments):
        if event == "open":
            path, _, flags = arguments
            writes = bool((flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            self.meet("write" if writes else "read", path, writes)
        elif event in _MOVES:
            self.meet(event, arguments[1], writes=True)
        elif event in _CHANGES:
            self.meet(event, arguments[0], writes=True)

    def meet(self, what, path, writes):
        if getattr(self.busy, "yes", False) or not isinstance(path, str | bytes | os.PathLike):
            return
        name = os.path.abspath(os.fsdecode(path))
        inside = name.startswith(self.folders) and not name.endswith(_IGNORED)
        if not inside or os.getpid() != self.owner:
            return
        if self.kind in ("damage", "cut") and (writes or not os.path.isfile(name)):
            return
        self.count += 1
        stays = self.kind in ("full", "readonly")
        refused = stays and writes and self.count >= self.number
        if not refused and (stays or not self.is_due()):
            return
        self.busy.yes = True
        try:
            if not self.hit:
                self.hit = f"{what} {name}"
                self.note()
            self.act(name, refused)
        finally:
            self.busy.yes = False

    def is_due(self):
        if self.kind != "stage":
            return self.count == self.number
        with open("/proc/self/fd/1", "rb") as output:
            return b"\n[%d/" % self.number in b"\n" + output.read()

    def act(self, name, refused):
        if self.kind in ("kill", "stage"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif refused:
            number = errno.ENOSPC if self.kind == "full" else errno.EROFS
            raise OSError(number, os.strerror(number), name)
        elif self.kind == "cut":
            os.truncate(name, os.path.getsize(name) // 2)
        elif self.kind == "damage" and os.path.getsize(name):
            with open(name, "r+b") as file:
                middle = os.path.getsize(name) // 2
                file.seek(middle)
                byte = file.read(1)
                file.seek(middle)
                file.write(bytes([byte[0] ^ 1]))

    def note(self):
        if self.log and os.getpid() == self.owner:
            self.busy.yes = True
            with open(self.log, "w") as file:
                file.write(f"{self.count}\n{self.hit}\n")
            self.busy.yes = False


def install():
    """Install what the environment says; None if it says nothing."""
    given = os.environ.get("SKIPWISE_FAULT")
    if not given:
        return None
    kind, number, *folders = given.split(":")
    injector = Injector(kind, int(number), folders, os.environ.get("SKIPWISE_FAULT_LOG"))
    injector.install()
    return injector
