"""Read documents from files, or from a hub dataset.

A reader yields an `Outcome` per record: the document's text (empty for a blank line), its
conversation, or a `BadRecord` with file and line. `data.on_bad_record` decides whether bad records
are skipped or stop the run. files.py finds files and their formats, records.py finds records and
their text, and chat_records.py finds conversations. shards.py decides which process reads what, and
where reading resumes.
"""

from __future__ import annotations

import codecs
import dataclasses
import importlib.util
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipwise.data.chat_records import Conversation, find_conversation
from skipwise.data.files import (
    LARGEST,
    Kind,
    Unreadable,
    list_folder,
    open_stream,
    recognize,
    too_large,
)
from skipwise.data.records import read_structured, text_in
from skipwise.errors import SkipwiseError, install
from skipwise.models.hf_config import unreachable_hub

_SHOWN = 5  # most names of files that are left out
_parse = json.JSONDecoder().raw_decode
_READING = 4  # raise it when a file gives other documents than before: caches are then made again


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of text."""

    path: str  # file, folder, or name of a hub dataset
    weight: float | None = None  # share of the examples, relative to the other sources
    text_field: str = "text"
    max_tokens: int | None = None  # use the first documents up to this many tokens
    split: str = "train"  # of a hub dataset, or of a folder of DatasetDict.save_to_disk
    config: str | None = None  # this and the next: hub only
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.path).expanduser().exists()


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that could not be read."""

    where: str  # its name, or the file's name if `line` is given
    why: str
    line: int | None = None  # from 1, counted from byte `start` of the file
    start: int = 0

    def __str__(self) -> str:
        if self.line is None:
            return f"{self.where}: {self.why}"
        # Lines before a span are counted only here, for the few records that are printed.
        number = _lines_before(self.where, self.start) + self.line
        return f"{self.where}:{number}: {self.why}"


Outcome = str | Conversation | BadRecord


@dataclass
class BadRecords:
    """Records that could not be read: their number, and descriptions of the first few."""

    policy: Literal["skip", "stop"] = "skip"
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, record: BadRecord) -> None:
        if self.policy == "stop":
            raise SkipwiseError(f"{record}\nfix the record, or set data.on_bad_record=skip")
        self.count += 1
        if len(self.first) < 5:
            self.first.append(str(record))


def parse_sources(values: Iterable[Any], text_field: str = "text") -> list[Source]:
    """Sources from the recipe: paths, hub names, or mappings with the keys of `Source`.

    Raises:
        SkipwiseError: a local path that does not exist, an unknown key, a weight below 0,
            max_tokens below 1, a hub dataset while `datasets` is not installed.
    """
    keys = [f.name for f in dataclasses.fields(Source)]
    sources = []
    for value in values:
        entry: dict[str, Any] = dict(value) if isinstance(value, dict) else {"path": str(value)}
        unknown = [key for key in entry if key not in keys]
        if unknown or "path" not in entry:
            what = f"has an unknown key {unknown[0]}" if unknown else "has no path"
            raise SkipwiseError(f"the data source {value!r} {what}: choose from {', '.join(keys)}")
        source = Source(**{"text_field": text_field, **entry})
        for key, given in dataclasses.asdict(source).items():
            text = isinstance(given, str) or given is None
            if not text and key not in ("weight", "max_tokens"):
                raise SkipwiseError(f"{key} of the data source {value!r} is no text")
        weight = source.weight
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if weight is not None and not (number and 0 <= weight < math.inf):
            raise SkipwiseError(f"the weight of {source.path} is {weight!r}: give 0 or more")
        if source.max_tokens is not None:
            limit = _positive_integer(source.max_tokens)
            if limit is None:
                raise SkipwiseError(
                    f"max_tokens of {source.path} is {source.max_tokens!r}: give a whole number "
                    "of 1 or more, such as 2000000000 or 2e9"
                )
            source = dataclasses.replace(source, max_tokens=limit)
        if os.path.islink(source.path) and not source.is_local:
            target = os.readlink(source.path)
            raise SkipwiseError(f"{source.path} is a broken link: {target} does not exist")
        local = Path(source.path).expanduser()
        if source.is_local and not (local.is_file() or local.is_dir()):
            raise SkipwiseError(
                f"{source.path} is a pipe or a device, and text is read several times\n"
                "write it to a file first"
            )
        if not source.is_local and not _is_hub_name(source.path):
            raise SkipwiseError(
                f"{source.path}: no such file or folder\n"
                "give a file or folder of text (docs/data.md), or the name of a hub dataset"
            )
        if not source.is_local and importlib.util.find_spec("datasets") is None:
            fix = f"to read hub datasets: {install('hub')}"
            raise SkipwiseError(f"{source.path} is not a local file or folder\n{fix}")
        sources.append(source)
    if sources and all(source.weight == 0 for source in sources):
        raise SkipwiseError("every data source has the weight 0: give one of them more")
    return sources


def list_files(source: Source) -> list[Path]:
    """The files of a local source in a fixed order, without those that are not texts."""
    root = Path(source.path).expanduser()
    if root.is_file():
        return [root]
    files = list_folder(root, source.split).files
    if not files:
        raise SkipwiseError(f"{root} is empty: it must contain files of text")
    return files


def left_out_files(sources: list[Source]) -> list[Path]:
    """The files of the sources' folders that are not read."""
    roots = [(Path(s.path).expanduser(), s.split) for s in sources if s.is_local]
    return [p for root, split in roots if root.is_dir() for p in list_folder(root, split).left_out]


def describe_left_out(sources: list[Source]) -> str:
    """How many files of the sources' folders are not read, and which; empty if all are."""
    paths = left_out_files(sources)
    if not paths:
        return ""
    shown = [path.name + "/" * path.is_dir() for path in paths[:_SHOWN]]
    names = ", ".join(shown) + ", ..." * (len(paths) > _SHOWN)
    what = "files that are not texts" if len(paths) > 1 else "file that is no text"
    return f"{len(paths):,} {what}: {names}"


def fingerprint_fields(source: Source) -> list[Any]:
    """Everything that decides a source's documents: files, sizes and times, or the hub name."""
    common = [_READING, source.text_field, source.max_tokens]
    if not source.is_local:
        return ["hub", source.path, source.config, source.split, source.revision, *common]
    folders: dict[str, str] = {}  # each is resolved once, not with every file in it
    return ["local", [_identity(str(p), folders) for p in list_files(source)], *common]


def _identity(path: str, folders: dict[str, str]) -> tuple[str, int, int]:
    """(path without links, bytes, time of change) of a file, or of a link to nothing."""
    try:
        found = os.stat(path)
    except OSError:
        found = os.lstat(path)
    folder, name = os.path.split(path)
    if folder not in folders:
        folders[folder] = os.path.realpath(folder)
    where = os.path.realpath(path) if os.path.islink(path) else os.path.join(folders[folder], name)
    return where, found.st_size, found.st_mtime_ns


def read_file(path: Path, text_field: str) -> Iterator[Outcome]:
    """Read a file at once: a text as one document, or its records if it holds records.

    Raises:
        SkipwiseError: a text or record that does not fit in memory.
        OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError: the file cannot be read.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST + 1)
    found = recognize(path, data[:1024])
    if found.kind != "text":
        yield from (outcome for outcome, _ in read_records(path, found.kind, text_field))
        return
    if not found.is_plain:
        with open_stream(path) as (file, _):
            data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise too_large(path)
    text = data.decode("utf-8-sig" if data.startswith(codecs.BOM_UTF8) else "utf-8")
    is_text = "\0" not in text
    why = "it has NUL bytes, so it is not text in UTF-8"
    yield text if is_text else BadRecord(where=str(path), why=why)


def read_json_lines(
    file: Any,
    path: Path,
    text_field: str,
    *,
    skip: int = 0,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Outcome]:
    """Read JSON lines from the current position of an open file.

    Args:
        skip: number of lines to skip.
        start: byte offset from which lines are counted. Defaults to the start of the file.
        stop: byte offset; lines that start at or after it are not read.
    """
    lines = enumerate(_lines(file, stop), 1)
    for number, line in itertools.islice(lines, skip, None):
        if line is None:
            text, why = None, f"longer than {LARGEST >> 30} GiB"
        elif not line.strip():
            text, why = "", ""
        else:
            try:
                text, why = _text_of(_parsed(line), text_field)
            except (ValueError, RecursionError) as error:
                text, why = None, f"not JSON ({error})"
        if isinstance(text, str):  # without the cost of a place, which it does not need
            yield text
        else:
            yield _outcome(text, BadRecord(where=str(path), why=why, line=number, start=start))


def _parsed(line: bytes) -> Any:
    """`json.loads`, faster for a plain object; it finds the encoding of others, and says errors."""
    if line[:1] == b"{" and line[1:2] != b"\0":
        text = line.decode()
        record, end = _parse(text)
        if not text[end:].strip():
            return record
        return json.loads(text)
    return json.loads(line)


def read_records(
    path: Path, kind: Kind, text_field: str, skip: int = 0
) -> Iterator[tuple[Outcome, int]]:
    """Outcomes of a file that can only be read from its start, each with the bytes read so far.

    Args:
        skip: number of records to skip.

    Raises:
        SkipwiseError: a record that does not fit in memory.
        OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError: the file cannot be read.
    """
    if kind == "lines":
        with open_stream(path) as (file, raw):
            for outcome in read_json_lines(file, path, text_field, skip=skip):
                yield outcome, raw.tell()
        return
    for where, record, done in read_structured(path, kind, text_field, skip):
        yield read_record(where, record, text_field), done


def open_hub(source: Source) -> Any:
    """Stream a hub dataset: an iterable of records.

    Raises:
        SkipwiseError: `datasets` does not find the dataset.
    """
    import datasets

    unreachable_hub()
    with hub_errors(source):
        return datasets.load_dataset(
            source.path, source.config, split=source.split, revision=source.revision, streaming=True
        )


@contextmanager
def hub_errors(source: Source) -> Iterator[None]:
    """Turn errors of `datasets`, which raises many types, into a SkipwiseError."""
    try:
        yield
    except SkipwiseError:
        raise
    except Exception as error:
        what = "no local file or folder, and no readable hub dataset"
        raise SkipwiseError(f"{source.path}: {what}\n{error}") from error


def read_record(where: str, record: Any, text_field: str) -> Outcome:
    if isinstance(record, Unreadable):
        return BadRecord(where=where, why=str(record))
    try:
        text, why = _text_of(record, text_field)
    except RecursionError:
        text, why = None, "nested too deep"
    return _outcome(text, BadRecord(where=where, why=why))


def _outcome(found: str | Conversation | None, place: BadRecord) -> Outcome:
    if isinstance(found, Conversation):
        return dataclasses.replace(found, place=place)
    return place if found is None else found


def _text_of(record: Any, text_field: str) -> tuple[str | Conversation | None, str]:
    """(text or conversation, "") of a record, or (None, why it has none)."""
    value = record.get(text_field) if isinstance(record, dict) else record
    if not isinstance(value, str):
        try:
            value = text_in(record, text_field)
        except ValueError as error:
            found = find_conversation(record)
            if isinstance(found, Conversation):
                return found, ""
            return None, found or str(error)
    try:
        if not value.isascii():
            value.encode()
    except UnicodeEncodeError:  # it would crash the tokenizer
        return None, f"{text_field!r} contains half of a surrogate pair, which is not text"
    return value, ""


def _lines(file: Any, stop: int | None) -> Iterator[bytes | None]:
    """Lines that start before `stop`; None for a line that does not fit in memory."""
    at = 0 if stop is None else file.tell()
    while (stop is None or at < stop) and (line := file.readline(LARGEST)):
        at += len(line)
        if len(line) < LARGEST or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LARGEST)
            at += len(line)
        yield None


def _lines_before(path: str, stop: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, 1 << 24))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _positive_integer(value: Any) -> int | None:
    try:
        number = int(float(value))
        return number if number == float(value) and number >= 1 and value is not True else None
    except (TypeError, ValueError, OverflowError):
        return None


def _is_hub_name(name: str) -> bool:
    parts = name.split("/")
    is_path = name.startswith((".", "/", "~")) or (len(parts) == 1 and "." in name)
    return len(parts) <= 2 and all(parts) and not is_path
