"""Records of JSON documents, CSV, Parquet and Arrow files one after the other, and their text.

A record is what the file holds, mostly an object with fields; `text_in` finds the text in it, and
chat_records.py a conversation. A
file that cannot be read, or not any further, raises one of `BROKEN_FILE`.

Memory: one record, and 256 rows of Parquet or Arrow.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from skipwise.data.chat_records import FIELDS, has_conversation, has_pair
from skipwise.data.files import (
    LARGEST,
    Kind,
    Unreadable,
    open_stream,
    recognize,
    suffix_of,
    too_large,
)

_ROWS = 256  # rows of a table that are converted at once
_BLOCK = 1 << 16  # characters of a JSON document that are read at once
_SHOWN, _NAME = 10, 40  # most fields of a record in an error, and characters of a name
_GAP, _GAP_IN_ARRAY = re.compile(r"\s*"), re.compile(r"[\s,]*")


# Where the record is, the record, and the bytes of the file that are read so far. The record is an
# `Unreadable` where it is broken while the next can be read.
Located = tuple[str, Any, int]


def read_structured(path: Path, kind: Kind, text_field: str, skip: int) -> Iterator[Located]:
    """The records of a JSON document, CSV, Parquet or Arrow file.

    Args:
        text_field: of Parquet and Arrow, only its column is read, and those of a conversation. A
            file without them gives a single record with all fields, of which the error tells.
        skip: number of records to skip.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError: the file cannot be read.
        SkipwiseError: a record that does not fit in memory.
    """
    read = {"json": _read_json, "csv": _read_csv}.get(kind, _read_table)
    return read(path, text_field, skip)


def text_in(record: Any, text_field: str) -> str:
    """The text in a field; paragraphs of a list are joined by blank lines.

    Args:
        record: an object with fields, or a string, which is the text itself.
        text_field: name, or path such as `meta.text`, which also leads through lists of objects.

    Raises:
        ValueError: there is no text; says what was found, and which field holds a text.
    """
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise ValueError(f"{_describe(record)}, not an object with a {text_field!r} field")
    try:
        value = _find(record, text_field)
    except KeyError:
        what = f"no field {text_field!r}, only {_names(record)}{_hint(record, text_field)}"
        raise ValueError(what) from None
    parts = [_decoded(part) for part in _flat(value) if part is not None]
    if not all(isinstance(part, str) for part in parts) or (not parts and value != []):
        hint = _hint(record, text_field)
        raise ValueError(f"{text_field!r} holds {_describe(value)}, not text{hint}")
    return "\n\n".join(parts)


def needed_columns(names: Iterable[str], text_field: str) -> list[str]:
    """The columns that hold the text or a conversation; empty if there are none."""
    names = list(names)
    own = _text_column(names, text_field)
    if own is None and not has_conversation(names):
        return []
    return [name for name in names if name == own or name in FIELDS]


def _text_column(names: Iterable[str], text_field: str) -> str | None:
    names = list(names)
    return next((name for name in (text_field, text_field.split(".")[0]) if name in names), None)


def _read_json(path: Path, text_field: str, skip: int) -> Iterator[Located]:
    with open_stream(path) as (file, raw):
        number = 0
        for value in _json_values(io.TextIOWrapper(file, "utf-8"), path):
            for record in _unwrapped(value, text_field):
                if number >= skip:
                    yield f"{path}[{number}]", record, raw.tell()
                number += 1


def _json_values(file: Any, path: Path) -> Iterator[Any]:
    """JSON values one after the other; of an array, its elements."""
    decode = json.JSONDecoder().raw_decode
    buffer, at, count, is_open, ended = "", 0, 0, False, False
    while True:
        match = (_GAP_IN_ARRAY if is_open else _GAP).match(buffer, at)
        at = match.end() if match else at
        value, end = None, len(buffer)
        if at < len(buffer) and buffer[at] == ("]" if is_open else "["):
            is_open, at = not is_open, at + 1
            continue
        if at < len(buffer):
            try:
                value, end = decode(buffer, at)
            except json.JSONDecodeError as error:
                # Text that is cut off fails at its end, or in a string that does not end.
                is_cut = error.pos > len(buffer) - 16 or "Unterminated" in error.msg
                if ended or not is_cut:
                    raise Unreadable(f"not JSON after {count:,} records ({error.msg})") from error
            except RecursionError as error:
                raise Unreadable(f"nested too deep after {count:,} records") from error
        elif ended:
            if is_open:
                raise Unreadable(f"it ends in a JSON array, after {count:,} records")
            return
        if end == len(buffer) and not ended:  # a value that may go on
            if len(buffer) - at > LARGEST:
                raise too_large(path)
            block = file.read(max(_BLOCK, len(buffer) - at))
            buffer, at, ended = buffer[at:] + block, 0, not block
            continue
        yield value
        at, count = end, count + 1


def _unwrapped(value: Any, text_field: str) -> list[Any]:
    """The records of `{"version": 1, "data": [...]}`, the only list of objects; else the value."""
    if not isinstance(value, dict) or _text_column(value, text_field) or has_pair(value):
        return [value]
    lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
    is_one = len(lists) == 1 and lists[0][0].keys().isdisjoint(("role", "from"))  # not a chat
    return lists[0] if is_one else [value]


def _read_csv(path: Path, text_field: str, skip: int) -> Iterator[Located]:
    csv.field_size_limit(LARGEST)
    with open_stream(path) as (file, raw):
        lines = io.TextIOWrapper(file, "utf-8", newline="")
        first = lines.readline(LARGEST)
        usual = "," if suffix_of(path) == ".csv" else "\t"
        if named := re.fullmatch(r"sep=(.)\s*", first):  # for Excel
            usual, first = named[1], lines.readline(LARGEST)
        others, unquoted = (usual, ",", ";", "\t", "|"), re.sub('"[^"]*"', "", first)
        delimiter = usual if usual in unquoted else max(others, key=unquoted.count)
        rows = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
        except csv.Error as error:
            raise Unreadable(f"its header is not CSV ({error})") from error
        is_missing = not needed_columns(header, text_field)
        number = 0
        while True:
            line, cells = rows.line_num + 1, []
            try:
                cells = next(rows, None)
                if cells is None:
                    return
                if not cells:  # a blank line
                    continue
                record: Any = dict(zip(header, cells, strict=True))
            except csv.Error as error:
                record = Unreadable(f"not CSV ({error})")
            except ValueError:
                record = Unreadable(f"{len(cells or ())} cells, where the header has {len(header)}")
            if number >= skip:
                where = f"{path}:1 (the header)" if is_missing else f"{path}:{line}"
                yield where, record, raw.tell()
            if is_missing:
                return
            number += 1


def _read_table(path: Path, text_field: str, skip: int) -> Iterator[Located]:
    import pyarrow

    size = path.stat().st_size
    batches = _parquet_batches if recognize(path).kind == "parquet" else _arrow_batches
    try:
        for first, batch, share in batches(path, text_field, skip):
            is_missing = not needed_columns(batch.schema.names, text_field)
            for begin in range(max(0, skip - first), batch.num_rows, _ROWS):
                rows = batch.slice(begin, _ROWS).to_pylist()
                for number, record in enumerate(rows, first + begin):
                    yield f"{path}:{number}", record, int(size * share)
                    if is_missing:
                        return
    except pyarrow.ArrowException as error:
        raise Unreadable(f"not readable as Parquet or Arrow ({error})") from error


def _parquet_batches(path: Path, text_field: str, skip: int) -> Iterator[tuple[int, Any, float]]:
    """(number of its first row, a batch of rows, share of the file up to its end)."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        columns = needed_columns(file.schema_arrow.names, text_field) or None
        number, groups = 0, list(range(file.num_row_groups))
        while groups and number + file.metadata.row_group(groups[0]).num_rows <= skip:
            number += file.metadata.row_group(groups.pop(0)).num_rows
        batches = file.iter_batches(_ROWS, row_groups=groups, columns=columns)
        for batch in batches if groups else ():
            yield number, batch, (number + batch.num_rows) / file.metadata.num_rows
            number += batch.num_rows


def _arrow_batches(path: Path, text_field: str, skip: int) -> Iterator[tuple[int, Any, float]]:
    """As above, of an Arrow IPC file or stream."""
    import pyarrow.ipc

    with open_stream(path) as (stream, raw):
        is_file = raw.peek(6)[:6] == b"ARROW1"
        source = pyarrow.memory_map(str(path)) if stream is raw else stream
        reader = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
        columns = needed_columns(reader.schema.names, text_field) or reader.schema.names
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        size, number = path.stat().st_size, 0
        for i, batch in enumerate(batches, 1):
            at = raw.tell() if stream is not raw else source.tell()
            share = i / reader.num_record_batches if is_file else at / size
            if number + batch.num_rows > skip:
                yield number, batch.select(columns), share
            number += batch.num_rows


def _find(value: Any, path: str) -> Any:
    """The value at a dotted path, of each element of a list. Raises KeyError if there is none."""
    if isinstance(value, list):
        return [_find(one, path) for one in value]
    head, _, rest = path.partition(".")
    if isinstance(value, dict) and path in value:
        return value[path]
    if isinstance(value, dict) and rest and head in value:
        return _find(value[head], rest)
    raise KeyError(path)


def _flat(value: Any) -> list[Any]:
    return [part for one in value for part in _flat(one)] if isinstance(value, list) else [value]


def _decoded(value: Any) -> Any:
    """Bytes as the UTF-8 text that they are, if they are: some writers of Parquet leave them so."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value


def _describe(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bytes):
        return "bytes that are not UTF-8"
    if isinstance(value, dict):
        return f"an object with the fields {_names(value)}"
    if isinstance(value, list):
        others = (_describe(p) for p in map(_decoded, _flat(value)) if not isinstance(p, str))
        return f"a list with {next(others, 'texts')}"
    return {bool: "true or false", int: "a number", float: "a number"}.get(type(value), "no text")


def _names(record: dict[Any, Any]) -> str:
    shown = [str(name)[:_NAME] for name in list(record)[:_SHOWN]]
    return ", ".join(shown) + ", ..." * (len(record) > _SHOWN)


def _hint(record: dict[Any, Any], text_field: str) -> str:
    """What to type where another field holds text: the longest one."""
    texts = [(n, path) for n, path in _texts(record, "") if len(path) <= _NAME]
    texts = [(n, path) for n, path in texts if path not in ("", text_field)]
    return f": type data.text_field={max(texts)[1]}" if texts else ""


def _texts(value: Any, path: str) -> Iterator[tuple[int, str]]:
    """(characters, dotted path) of the texts in a record."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list):
        for inner in value[:1]:
            yield from _texts(inner, path)
    elif isinstance(value, str) and path.isprintable():
        yield len(value), path
