"""Split a source into shards of a few megabytes; reading can resume after any shard.

Text files and plain JSON lines become byte spans, which the tokenizing process reads. Formats that
can only be read from the start (compressed files, CSV, Parquet, Arrow, JSON arrays, the hub) are
read here, fast enough for about 40 tokenizer processes. The end of each shard depends only on the
source.

Memory: one shard, or one text file or record if that is larger.
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipwise.data import readers
from skipwise.data.chat_records import Conversation
from skipwise.data.files import BROKEN_FILE, LARGEST, has_records, recognize, size_of, too_large
from skipwise.data.readers import BadRecord, BadRecords, Outcome, Source

_SHARD = 1 << 22  # bytes: hundreds to thousands of documents, a second of work
_OF_THE_FILE = (  # None: it is broken
    *(None, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENOTDIR, errno.EISDIR),
    errno.ENXIO,
)
_RECORD = 64  # bytes that each record counts beside its text, to limit empty records


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """A position between two documents of a source."""

    file: int = 0  # index of the source's file
    at: int = 0  # byte offset in plain JSON lines, record number otherwise
    state: Any = None  # state of a hub stream, from which `datasets` resumes


@dataclass(frozen=True, kw_only=True)
class Span:
    """A byte range of a file to read later: a full file, or the JSON lines that start in it."""

    path: Path
    is_text: bool  # read at once
    start: int
    stop: int

    def read(self, text_field: str) -> Iterator[Outcome]:
        try:
            if self.is_text:
                yield from readers.read_file(self.path, text_field)
                return
            with self.path.open("rb") as file:
                if self._seek(file):
                    span = {"start": file.tell(), "stop": self.stop}
                    yield from readers.read_json_lines(file, self.path, text_field, **span)
        except BROKEN_FILE as error:
            yield _broken(self.path, error)

    def _seek(self, file: Any) -> bool:
        """Go to the first line that starts in the span; False if there is none."""
        if self.start == 0:
            return True
        file.seek(self.start - 1)
        return file.readline(self.stop - self.start + 1).endswith(b"\n")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """Consecutive documents of a source."""

    items: list[Span | Outcome]
    text_field: str
    end: Cursor  # where the next shard starts
    size: int  # approximate bytes in memory once it is read
    done: int  # bytes of the source's files up to its end, for the progress bar

    def read(self) -> Iterator[Outcome]:
        for item in self.items:
            if isinstance(item, Span):
                yield from item.read(self.text_field)
            else:
                yield item


def read_shards(source: Source, start: Cursor | None = None) -> Iterator[Shard]:
    """The shards of a source, from the end of an earlier shard or from the start.

    Raises:
        SkipwiseError: an empty source, a file too large for memory, an unknown hub dataset.
    """
    start = start or Cursor()
    return (_file_shards if source.is_local else _hub_shards)(source, start)


def read_documents(source: Source, bad: BadRecords) -> Iterator[str | Conversation]:
    """Every document or conversation: one per text file, JSON line or Parquet row."""
    for shard in read_shards(source):
        for outcome in shard.read():
            if isinstance(outcome, BadRecord):
                bad.add(outcome)
            elif isinstance(outcome, Conversation) or outcome.strip():
                yield outcome


@dataclass
class _ShardBuilder:
    """Collects items for the next shard."""

    text_field: str
    items: list[Span | Outcome] = field(default_factory=list)
    size: int = 0

    def add(self, item: Span | Outcome, size: int) -> bool:
        """Add an item; return whether the shard is full."""
        self.items.append(item)
        self.size += size + _RECORD
        return self.size >= _SHARD

    def take(self, end: Cursor, done: int) -> Shard:
        items, size = self.items, self.size
        self.items, self.size = [], 0
        return Shard(items=items, text_field=self.text_field, end=end, size=size, done=done)


def _file_shards(source: Source, start: Cursor) -> Iterator[Shard]:
    files = readers.list_files(source)
    sizes = [size_of(path) for path in files]
    for path, size in zip(files, sizes, strict=True):  # early
        if size > LARGEST and recognize(path).kind == "text":
            raise too_large(path)
    before = sum(sizes[: start.file])
    builder = _ShardBuilder(source.text_field)
    for i in range(start.file, len(files)):
        at = start.at if i == start.file else 0
        for item, size, stop, done in _file_items(files[i], sizes[i], at, source.text_field):
            end = Cursor(file=i + 1) if math.isinf(stop) else Cursor(file=i, at=int(stop))
            if builder.add(item, size):
                yield builder.take(end, before + done)
        before += sizes[i]
    if builder.items:
        yield builder.take(Cursor(file=len(files)), before)


def _file_items(
    path: Path, size: int, at: int, text_field: str
) -> Iterator[tuple[Span | Outcome, int, float, int]]:
    """(item, its size, where the next starts, bytes done); the third is inf after the last item.

    A broken file ends with its bad record, so that reading does not find it again after a resume.
    """
    try:
        # Most files of a folder of texts are small: they are opened once, where they are read.
        found = recognize(path) if size > _SHARD or has_records(path) else None
        if found is None or found.kind == "text":
            span = Span(path=path, is_text=True, start=0, stop=size)
            yield span, size * (4 if found and not found.is_plain else 1), math.inf, size
        elif found.kind == "lines" and found.is_plain:
            for begin in range(at, size, _SHARD):
                stop = min(begin + _SHARD, size)
                span = Span(path=path, is_text=False, start=begin, stop=stop)
                yield span, stop - begin, stop if stop < size else math.inf, stop
        else:
            records = readers.read_records(path, found.kind, text_field, skip=at)
            for number, (outcome, done) in enumerate(records, at + 1):
                yield outcome, _size(outcome), number, done
    except BROKEN_FILE as error:
        yield _broken(path, error), 0, math.inf, size


def _hub_shards(source: Source, start: Cursor) -> Iterator[Shard]:
    builder = _ShardBuilder(source.text_field)
    number = start.at
    with readers.hub_errors(source):
        records = readers.open_hub(source)
        for record in _resume(records, start):
            outcome = readers.read_record(f"{source.path}[{number}]", record, source.text_field)
            number += 1
            if builder.add(outcome, _size(outcome)):
                yield builder.take(Cursor(at=number, state=_state_of(records)), 0)
        if builder.items:
            yield builder.take(Cursor(at=number), 0)


def _resume(records: Any, start: Cursor) -> Iterator[Any]:
    """Records from a position on; `datasets` skips complete files and row groups if it can."""
    if start.state is not None and hasattr(records, "load_state_dict"):
        records.load_state_dict(start.state)
        return iter(records)
    return itertools.islice(records, start.at, None)


def _state_of(records: Any) -> Any:
    """The stream's state if it can be saved as JSON, else None."""
    try:
        return json.loads(json.dumps(records.state_dict()))
    except (AttributeError, TypeError, ValueError):
        return None


def _size(outcome: Outcome) -> int:
    if isinstance(outcome, Conversation):
        return outcome.size
    return len(outcome) if isinstance(outcome, str) else 0


def _broken(path: Path, error: BaseException) -> BadRecord:
    """The record of a file that cannot be read; raises where that may be so for now only."""
    if isinstance(error, OSError) and error.errno not in _OF_THE_FILE:
        raise error
    why = str(error) or type(error).__name__
    if isinstance(error, UnicodeError):
        why = "not UTF-8 text: if it is text in another encoding, type iconv -f ENCODING -t UTF-8"
    elif isinstance(error, FileNotFoundError) and path.is_symlink():
        target = os.readlink(path)
        why = f"a broken link to {target}" + ": type git annex get" * (".git/annex" in target)
    return BadRecord(where=str(path), why=why)
