"""The token cache on disk: complete stores, which are memory-mapped, and unfinished ones.

tokens/FINGERPRINT/         tokens.bin, offsets.npy, meta.json: a complete store
                            masked.bin, markers.bin: the same of conversations, as spans
tokens/FINGERPRINT.part/    the .bin files, lengths.bin, and progress.json with valid lengths
tokens/FINGERPRINT.lock     locked by the process that writes FINGERPRINT.part; others wait

A kill loses only the work after the last progress.json, a few seconds. Unfinished stores that have
not changed for two weeks are removed. meta.json has the sizes and digests of the other files: a
store that differs from them is made again.

Memory: 8 bytes per document (its offset), memory-mapped; twice that while a store is completed.
        About 50 bytes on disk per turn of a conversation.
"""

from __future__ import annotations

import dataclasses
import functools
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
from skipwise.data.chat import ChatSpans
from skipwise.data.shards import Cursor
from skipwise.errors import SkipwiseError
from skipwise.models.identity import digests, known_digests

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_BLOCK, _BLOCKS = 1 << 14, 1 << 12  # tokens per block, and most blocks, that a digest reads
_FILES = ("tokens.bin", "offsets.npy", "masked.bin", "markers.bin")
_ABANDONED = 14 * 24 * 3600  # seconds without changes before an unfinished store is removed


@dataclass(frozen=True, kw_only=True)
class TokenStore:
    """The tokens of all documents, concatenated."""

    tokens: np.ndarray  # (sum L_x,) uint16 or uint32
    offsets: np.ndarray  # (num_documents + 1,) int64
    num_bad_records: int = 0
    bad_records: list[str] = field(default_factory=list)  # descriptions of the first few
    chat: ChatSpans = field(default_factory=ChatSpans)
    num_special: int = 0  # control tokens that the texts spell
    folder: Path | None = None  # the memory-mapped files

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    def document(self, i: int) -> np.ndarray:
        return self.read(int(self.offsets[i]), int(self.offsets[i + 1]))

    def read(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) tokens; a view. `ChatTokens` if the store has conversations."""
        tokens = self.tokens[start:stop]
        return self.chat.attach(tokens, np.arange(start, stop)) if self.chat else tokens

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Tokens at indices of any shape; a copy, through a separate memory map."""
        return self.fresh_memmap()[indices]

    def digest(self) -> str:
        """A hash of the text: of all tokens up to 64 million, of evenly spaced blocks above."""
        tokens = self.fresh_memmap()
        seen = hashlib.sha256(f"{self.num_documents} of {len(tokens)}".encode())
        begins = np.arange(0, len(tokens), _BLOCK)
        if len(begins) > _BLOCKS:
            begins = np.linspace(0, len(tokens) - _BLOCK, _BLOCKS, dtype=int)
        for begin in begins:
            seen.update(tokens[begin : begin + _BLOCK].tobytes())
        seen.update(self.chat.masked.tobytes())
        return seen.hexdigest()[:16]

    def fresh_memmap(self) -> np.ndarray:
        """The tokens in a new memory map, for a pass over the corpus.

        When it is deleted, the process releases its pages, which could add up to the full corpus.
        """
        if self.folder is None or not len(self.tokens):
            return self.tokens
        return np.memmap(self.folder / "tokens.bin", self.tokens.dtype, "r")

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes map the files themselves: a pickled memmap would copy the corpus.
        return dict(self.__dict__) if self.folder is None else {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state if "tokens" in state else open_store(state["folder"]).__dict__)


def open_store(folder: Path) -> TokenStore:
    """Memory-map a complete store."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    except ValueError as error:  # since it was compared
        raise SkipwiseError(f"{folder} is damaged: type the same command again") from error
    dtype = np.dtype(meta["dtype"])
    return TokenStore(
        tokens=np.memmap(folder / "tokens.bin", dtype, "r") if offsets[-1] else np.zeros(0, dtype),
        offsets=offsets,
        num_bad_records=meta["num_bad_records"],
        bad_records=meta["bad_records"],
        chat=ChatSpans(
            masked=_spans(folder / "masked.bin"),
            markers=_spans(folder / "markers.bin"),
            num_conversations=meta["num_conversations"],
            num_tokens=meta["num_chat_tokens"],
        ),
        num_special=meta["num_special"],
        folder=folder.absolute(),
    )


def _digest(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _spans(path: Path) -> np.ndarray:
    return np.memmap(path, np.int64, "r") if path.stat().st_size else np.zeros(0, np.int64)


@functools.lru_cache
def _tell_damaged(folder: Path) -> None:
    if is_main_process():
        print(f"{folder} is damaged, and is made again", file=sys.stderr, flush=True)


def is_complete(folder: Path) -> bool:
    """Whether a store is there, and is what was written. Says so where it is not."""
    if not (folder / "meta.json").exists():
        return False
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        same = meta.pop("digest") == _digest(meta)
        same = same and known_digests({name: folder / name for name in _FILES}) == meta["files"]
    except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        same = False
    if not same:
        _tell_damaged(folder)
    return same


@dataclass(frozen=True, kw_only=True)
class StoreProgress:
    """How far an unfinished store is valid."""

    position: Cursor = field(default_factory=Cursor)
    is_complete: bool = False
    num_tokens: int = 0
    num_documents: int = 0
    num_bad_records: int = 0
    bad_records: list[str] = field(default_factory=list)
    num_special: int = 0
    num_bytes: int = 0  # read from the source's files
    num_conversations: int = 0
    num_chat_tokens: int = 0
    num_masked: int = 0  # numbers in masked.bin, two for each span
    num_markers: int = 0

    def sizes(self, dtype: np.dtype) -> dict[str, int]:
        """Valid bytes of each file."""
        return {
            "tokens": self.num_tokens * dtype.itemsize,
            "lengths": self.num_documents * 4,
            "masked": self.num_masked * 8,
            "markers": self.num_markers * 8,
        }


class TokenWriter:
    """Appends documents to an unfinished store, from where an earlier process stopped."""

    def __init__(self, part: Path, dtype: np.dtype) -> None:
        self.part, self.dtype = part, dtype
        part.mkdir(exist_ok=True)
        os.utime(part)  # not abandoned
        self.progress = self._read_progress()
        sizes = self.progress.sizes(dtype)
        self._files = {name: _open_at(part / f"{name}.bin", n) for name, n in sizes.items()}

    def __enter__(self) -> TokenWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            with suppress(OSError):  # a full disk was reported already
                file.close()

    def append(self, tokens: np.ndarray, lengths: np.ndarray, chat: ChatSpans) -> None:
        """Add documents: their (sum L_x,) tokens, (n,) lengths, and spans in the whole store."""
        columns = {"tokens": (tokens, self.dtype), "lengths": (lengths, np.uint32)}
        columns |= {"masked": (chat.masked, np.int64), "markers": (chat.markers, np.int64)}
        for name, (values, dtype) in columns.items():
            self._files[name].write(values.astype(dtype, copy=False).tobytes())

    def save(self, progress: StoreProgress) -> None:
        """Flush what was appended, and record it as valid."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        write_json(self.part / "progress.json", dataclasses.asdict(progress))
        self.progress = progress

    def finish(self, folder: Path, source: str) -> None:
        """Complete the store and move it to its final folder; safe to repeat after a kill."""
        self.__exit__()
        lengths = np.fromfile(self.part / "lengths.bin", np.uint32)
        offsets = np.zeros(len(lengths) + 1, np.int64)
        np.cumsum(lengths, out=offsets[1:])
        np.save(self.part / "offsets.npy", offsets)
        for part in self.part.glob("*.part"):  # of a process that was killed
            part.unlink()
        files = digests({name: self.part / name for name in _FILES})
        meta = {
            "dtype": self.dtype.name,
            "num_bad_records": self.progress.num_bad_records,
            "bad_records": self.progress.bad_records,
            "num_conversations": self.progress.num_conversations,
            "num_chat_tokens": self.progress.num_chat_tokens,
            "num_special": self.progress.num_special,
            "source": source,
            "files": files,
        }
        write_json(self.part / "meta.json", {**meta, "digest": _digest(meta)})
        if is_complete(folder):  # by another process, on a file system without locks
            shutil.rmtree(self.part)
            return
        if folder.exists():  # a damaged one
            shutil.rmtree(folder)
        os.replace(self.part, folder)
        for name in ("lengths.bin", "progress.json"):
            (folder / name).unlink(missing_ok=True)

    def _read_progress(self) -> StoreProgress:
        """The saved progress, or none if the files are shorter than it says."""
        try:
            tree = json.loads((self.part / "progress.json").read_text(encoding="utf-8"))
            progress = StoreProgress(**{**tree, "position": Cursor(**tree["position"])})
            needed = progress.sizes(self.dtype).items()
            whole = all((self.part / f"{name}.bin").stat().st_size >= n for name, n in needed)
        except (OSError, ValueError, TypeError, KeyError):
            return StoreProgress()
        return progress if whole else StoreProgress()


@contextmanager
def lock_unfinished(folder: Path) -> Iterator[Path]:
    """The folder of the unfinished store, for one process at a time; the others wait.

    Without file locks each process has a folder of its own and starts over after a kill.
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
        if is_complete(folder):  # later processes see that and need no lock
            lock.unlink(missing_ok=True)


def remove_abandoned(parent: Path) -> None:
    """Remove unfinished stores whose text or tokenizer has changed since, judging by their age."""
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
                print("another process is tokenizing this text: waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # a file system without locks
        return False
    return True


def _open_at(path: Path, size: int) -> Any:
    """Open for appending after the first `size` bytes; drop anything behind them."""
    file = path.open("ab")
    file.truncate(size)
    return file
