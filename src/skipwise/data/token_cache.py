"""Tokens on disk: whole stores, which are mapped, and unfinished ones, to be gone on with.

tokens/FINGERPRINT/         tokens.bin, offsets.npy, meta.json: moved here when it is whole
tokens/FINGERPRINT.part/    tokens.bin, lengths.bin and progress.json, which says how far they hold
tokens/FINGERPRINT.lock     held by the process that writes the part; the others wait

A kill loses what came after the last progress.json, some seconds. Parts that nobody went on with
for two weeks are removed.

Memory: 8 bytes a document (its offset), mapped as well; twice that while a store is finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from skipwise.config.machine import is_main_process
from skipwise.config.run_folder import write_json
from skipwise.data.shards import Cursor

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_BLOCK, _BLOCKS = 1 << 14, 1 << 12  # tokens, and how often as many, that a digest reads at most
_ABANDONED = 14 * 24 * 3600  # seconds after which an unfinished store is removed


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """Tokens of all documents, one after another."""

    tokens: np.ndarray  # (sum L_x,) uint16 or uint32
    offsets: np.ndarray  # (num_documents + 1,) int64
    num_bad_records: int = 0
    bad_records: list[str] = field(default_factory=list)  # the first few, by name
    folder: Path | None = None  # where it is mapped from

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) tokens; a view."""
        return self.tokens[start:stop]

    def take(self, places: np.ndarray) -> np.ndarray:
        """Tokens at places of any shape; a copy, through a mapping of its own."""
        return self.mapped_anew()[places]

    def digest(self) -> str:
        """Tells texts apart: by all tokens up to 64 million, by as many spread ones above."""
        tokens = self.mapped_anew()
        seen = hashlib.sha256(f"{self.num_documents} of {len(tokens)}".encode())
        begins = np.arange(0, len(tokens), _BLOCK)
        if len(begins) > _BLOCKS:
            begins = np.linspace(0, len(tokens) - _BLOCK, _BLOCKS, dtype=int)
        for begin in begins:
            seen.update(tokens[begin : begin + _BLOCK].tobytes())
        return seen.hexdigest()[:16]

    def mapped_anew(self) -> np.ndarray:
        """The tokens in a mapping of its own, for a pass over the corpus.

        The pages it touches leave the process with it, where they would add up to the corpus.
        """
        if self.folder is None or not len(self.tokens):
            return self.tokens
        return np.memmap(self.folder / "tokens.bin", self.tokens.dtype, "r")

    def __getstate__(self) -> dict[str, Any]:
        # A process that reads along maps the files: a pickled memmap would be the whole corpus.
        return dict(self.__dict__) if self.folder is None else {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state if "tokens" in state else open_store(state["folder"]).__dict__)


def open_store(folder: Path) -> TokenStore:
    """Map a whole store."""
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    dtype = np.dtype(meta["dtype"])
    empty = np.zeros(0, dtype)
    return TokenStore(
        tokens=np.memmap(folder / "tokens.bin", dtype, "r") if offsets[-1] else empty,
        offsets=offsets,
        num_bad_records=meta["num_bad_records"],
        bad_records=meta["bad_records"],
        folder=folder.absolute(),
    )


def is_complete(folder: Path) -> bool:
    return (folder / "meta.json").exists()


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far an unfinished store holds."""

    position: Cursor = field(default_factory=Cursor)
    is_complete: bool = False
    num_tokens: int = 0
    num_documents: int = 0
    num_bad_records: int = 0
    bad_records: list[str] = field(default_factory=list)
    num_bytes: int = 0  # of the source's files, read


class TokenWriter:
    """Appends documents to an unfinished store, from where an earlier process left it."""

    def __init__(self, part: Path, dtype: np.dtype) -> None:
        self.part, self.dtype = part, dtype
        part.mkdir(exist_ok=True)
        os.utime(part)  # not abandoned
        self.progress = self._read_progress()
        self._tokens = _open_at(part / "tokens.bin", self.progress.num_tokens * dtype.itemsize)
        self._lengths = _open_at(part / "lengths.bin", self.progress.num_documents * 4)

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in (self._tokens, self._lengths):
            with suppress(OSError):  # a full disk was told already
                file.close()

    def append(self, tokens: np.ndarray, lengths: np.ndarray) -> None:
        """Add documents: their (sum L_x,) tokens and (n,) lengths."""
        self._tokens.write(tokens.astype(self.dtype, copy=False).tobytes())
        self._lengths.write(lengths.astype(np.uint32).tobytes())

    def save(self, progress: Progress) -> None:
        """What was appended is all that `progress` tells of, and stays."""
        for file in (self._tokens, self._lengths):
            file.flush()
            os.fsync(file.fileno())
        write_json(self.part / "progress.json", dataclasses.asdict(progress))
        self.progress = progress

    def finish(self, folder: Path, source: str) -> None:
        """Make it a whole store and move it to its place; may be killed and called again."""
        self.__exit__()
        lengths = np.fromfile(self.part / "lengths.bin", np.uint32)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        np.save(self.part / "offsets.npy", offsets)
        meta = {
            "dtype": self.dtype.name,
            "num_bad_records": self.progress.num_bad_records,
            "bad_records": self.progress.bad_records,
            "source": source,
        }
        write_json(self.part / "meta.json", meta)
        if folder.exists():  # a broken one
            shutil.rmtree(folder)
        os.replace(self.part, folder)
        for name in ("lengths.bin", "progress.json"):
            (folder / name).unlink()

    def _read_progress(self) -> Progress:
        """The state to go on from; the beginning where files do not hold what it tells."""
        try:
            tree = json.loads((self.part / "progress.json").read_text(encoding="utf-8"))
            progress = Progress(**{**tree, "position": Cursor(**tree["position"])})
            sizes = [(self.part / f"{n}.bin").stat().st_size for n in ("tokens", "lengths")]
        except (OSError, ValueError, TypeError, KeyError):
            return Progress()
        told = (progress.num_tokens * self.dtype.itemsize, progress.num_documents * 4)
        return progress if sizes[0] >= told[0] and sizes[1] >= told[1] else Progress()


@contextmanager
def part_of(folder: Path) -> Iterator[Path]:
    """The unfinished store's folder, for one process at a time; the others wait.

    Where files cannot be locked, each process has one of its own, and starts over after a kill.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = folder.with_name(f"{folder.name}.lock")
    with lock.open("a") as file:
        if not _locked(file):
            part = folder.with_name(f"{folder.name}.part{os.getpid()}")
            try:
                yield part
            finally:
                shutil.rmtree(part, ignore_errors=True)
            return
        yield folder.with_name(f"{folder.name}.part")
        if is_complete(folder):  # whoever comes now sees that and needs no lock
            lock.unlink(missing_ok=True)


def remove_abandoned(parent: Path) -> None:
    """Remove unfinished stores that nobody went on with: their texts or tokenizers have changed."""
    for part in parent.glob("*.part*"):
        files = [part, *part.glob("*")]
        with suppress(OSError):
            if time.time() - max(file.stat().st_mtime for file in files) > _ABANDONED:
                shutil.rmtree(part)
                part.with_suffix(".lock").unlink(missing_ok=True)


def _locked(file: Any) -> bool:
    if fcntl is None:
        return False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if is_main_process():
                print("another process tokenizes this text: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True


def _open_at(path: Path, size: int) -> Any:
    """Open to write on after the first `size` bytes; what an earlier process wrote later goes."""
    file = path.open("ab")
    file.truncate(size)
    return file
