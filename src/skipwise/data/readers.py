"""Read documents from text files, JSON lines, JSON arrays, Parquet, or a hub dataset.

A reader yields an `Outcome` per record: the document's text (empty for a blank line), its
conversation, or a `BadRecord` with file and line. `data.on_bad_record` decides whether bad records
are skipped or stop the run. shards.py decides which process reads what, and where reading resumes.
"""

from __future__ import annotations

import dataclasses
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipwise.data.chat_records import FIELDS, Conversation, find_conversation
from skipwise.errors import SkipwiseError

LARGEST = 1 << 30  # bytes of a text file, line or JSON array, each of which must fit in memory
BROKEN_FILE = (OSError, EOFError, zlib.error)  # raised by files that cannot be read

Kind = Literal["text", "lines", "array", "parquet"]


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source of text."""

    path: str  # file, folder, or name of a hub dataset
    weight: float | None = None  # share of the examples, relative to the other sources
    text_field: str = "text"
    max_tokens: int | None = None  # use the first documents up to this many tokens
    split: str = "train"  # this and the next two: hub only
    config: str | None = None
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
            max_tokens below 1.
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
        weight = source.weight
        if weight is not None and (not isinstance(weight, int | float) or weight < 0):
            raise SkipwiseError(f"the weight of {source.path} is {weight!r}: give 0 or more")
        if source.max_tokens is not None:
            limit = _positive_integer(source.max_tokens)
            if limit is None:
                raise SkipwiseError(
                    f"max_tokens of {source.path} is {source.max_tokens!r}: give a whole number "
                    "of 1 or more, such as 2000000000 or 2e9"
                )
            source = dataclasses.replace(source, max_tokens=limit)
        if not source.is_local and not _is_hub_name(source.path):
            raise SkipwiseError(
                f"{source.path}: no such file or folder\n"
                "give a file or folder of text, JSON lines or Parquet, or the name of a hub dataset"
            )
        sources.append(source)
    return sources


def list_files(source: Source) -> list[Path]:
    """The files of a local source in a fixed order, without hidden files."""
    root = Path(source.path).expanduser()
    if root.is_file():
        return [root]
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    ]
    if not files:
        raise SkipwiseError(f"{root} is empty: it must contain text, JSON lines or Parquet files")
    return files


def fingerprint_fields(source: Source) -> list[Any]:
    """Everything that decides a source's documents: files, sizes and times, or the hub name."""
    common = [source.text_field, source.max_tokens]
    if not source.is_local:
        return ["hub", source.path, source.config, source.split, source.revision, *common]
    stats = [(p.resolve(), p.stat()) for p in list_files(source)]
    return ["local", [(str(p), s.st_size, s.st_mtime_ns) for p, s in stats], *common]


def check_sizes(files: list[Path], sizes: list[int]) -> None:
    """Raise a SkipwiseError early for a text file or JSON array of more than 1 GiB."""
    for path, size in zip(files, sizes, strict=True):
        if size > LARGEST and file_kind(path) in ("text", "array"):
            raise _too_large(path)


def file_kind(path: Path) -> Kind:
    """How to read a file, from its name; for .json from its first character.

    Raises:
        OSError, EOFError, zlib.error: the file cannot be read.
    """
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix == ".parquet":
        return "parquet"
    if suffix in (".jsonl", ".ndjson"):
        return "lines"
    if suffix != ".json":
        return "text"
    with open_file(path) as file:
        return "array" if file.read(64).lstrip()[:1] == b"[" else "lines"


def read_text(path: Path) -> Outcome:
    """Read a text file as one document.

    Raises:
        SkipwiseError: it does not fit in memory.
        OSError, EOFError, zlib.error: the file cannot be read.
    """
    try:
        return _read_all(path).decode("utf-8")
    except UnicodeDecodeError:
        return BadRecord(where=str(path), why="not UTF-8 text")


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
                text, why = _text_of(json.loads(line), text_field)
            except ValueError as error:
                text, why = None, f"not JSON ({error})"
        yield _outcome(text, BadRecord(where=str(path), why=why, line=number, start=start))


def read_records(
    path: Path, kind: Kind, text_field: str, skip: int = 0
) -> Iterator[tuple[Outcome, int]]:
    """Outcomes of a file that can only be read from its start, each with the bytes read so far.

    Args:
        skip: number of records to skip.

    Raises:
        SkipwiseError: a JSON array that does not fit in memory.
        OSError, EOFError, zlib.error: the file cannot be read.
    """
    if kind == "parquet":
        yield from _read_parquet(path, text_field, skip)
    elif kind == "array":
        yield from _read_array(path, text_field, skip)
    else:
        with open_file(path) as file:
            raw = getattr(file, "fileobj", file)
            for outcome in read_json_lines(file, path, text_field, skip=skip):
                yield outcome, raw.tell()


def open_hub(source: Source) -> Any:
    """Stream a hub dataset: an iterable of records.

    Raises:
        SkipwiseError: `datasets` is not installed, or does not find the dataset.
    """
    try:
        import datasets
    except ImportError as error:
        fix = "to read hub datasets: pip install 'skipwise[hub]'"
        raise SkipwiseError(f"{source.path} is not a local file or folder\n{fix}") from error
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
    text, why = _text_of(record, text_field)
    return _outcome(text, BadRecord(where=where, why=why))


def open_file(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _read_array(path: Path, text_field: str, skip: int) -> Iterator[tuple[Outcome, int]]:
    size = path.stat().st_size
    try:
        records = json.loads(_read_all(path))
    except ValueError as error:
        yield BadRecord(where=str(path), why=f"not JSON ({error})"), size
        return
    for number in range(skip, len(records)):
        outcome = read_record(f"{path}[{number}]", records[number], text_field)
        yield outcome, size * (number + 1) // len(records)


def _read_parquet(path: Path, text_field: str, skip: int) -> Iterator[tuple[Outcome, int]]:
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [text_field]
            if text_field not in names or _is_list(file.schema_arrow.field(text_field)):
                columns = [name for name in names if name == text_field or name in FIELDS]
            if not columns:
                why = f"no column {text_field!r}; its columns are {', '.join(names)}"
                yield BadRecord(where=str(path), why=why), size
                return
            number, groups = 0, list(range(file.num_row_groups))
            while groups and number + file.metadata.row_group(groups[0]).num_rows <= skip:
                number += file.metadata.row_group(groups.pop(0)).num_rows
            batches = file.iter_batches(256, row_groups=groups, columns=columns)
            for batch in batches if groups else ():
                for record in batch.to_pylist():
                    if number >= skip:
                        outcome = read_record(f"{path}:{number}", record, text_field)
                        yield outcome, size * (number + 1) // file.metadata.num_rows
                    number += 1
    except pyarrow.ArrowException as error:
        yield BadRecord(where=str(path), why=f"not Parquet ({error})"), size


def _is_list(column: Any) -> bool:
    return str(column.type).startswith(("list", "large_list"))


def _outcome(found: str | Conversation | None, place: BadRecord) -> Outcome:
    if isinstance(found, Conversation):
        return dataclasses.replace(found, place=place)
    return place if found is None else found


def _text_of(record: Any, text_field: str) -> tuple[str | Conversation | None, str]:
    """(text or conversation, "") of a record, or (None, why it has none)."""
    text = record.get(text_field) if isinstance(record, dict) else None
    if isinstance(text, str):
        try:
            if not text.isascii():
                text.encode()
        except UnicodeEncodeError:  # it would crash the tokenizer
            return None, f"{text_field!r} contains half of a surrogate pair, which is not text"
        return text, ""
    conversation = find_conversation(record)
    if conversation is not None:
        is_reason = isinstance(conversation, str)
        return (None, conversation) if is_reason else (conversation, "")
    if isinstance(record, dict):
        return None, f"no text in {text_field!r}; its fields are {', '.join(map(str, record))}"
    return None, f"a {type(record).__name__}, not an object with a {text_field!r} field"


def _lines(file: Any, stop: int | None) -> Iterator[bytes | None]:
    """Lines that start before `stop`; None for a line that does not fit in memory."""
    while (stop is None or file.tell() < stop) and (line := file.readline(LARGEST)):
        if len(line) < LARGEST or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(LARGEST)
        yield None


def _lines_before(path: str, stop: int) -> int:
    count = 0
    with open(path, "rb") as file:
        while stop > 0 and (block := file.read(min(stop, 1 << 24))):
            count += block.count(b"\n")
            stop -= len(block)
    return count


def _read_all(path: Path) -> bytes:
    with open_file(path) as file:
        data = file.read(LARGEST + 1)
    if len(data) > LARGEST:
        raise _too_large(path)
    return data


def _too_large(path: Path) -> SkipwiseError:
    return SkipwiseError(
        f"{path} is larger than {LARGEST >> 30} GiB, and text files and JSON arrays must fit in "
        "memory\nwrite it as JSON lines with one document per line (for an array: jq -c '.[]'), "
        "or remove it from the folder"
    )


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
