"""Which files of a source are read, in which format, and their bytes.

A file's format follows from its first bytes, then from the suffix of its name. docs/data.md lists
the formats, and which files of a folder are left out.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import lzma
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipwise.errors import SkipwiseError

LARGEST = 1 << 30  # bytes of a text file, line or record, each of which must fit in memory
BROKEN_FILE = (OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError)  # cannot be read

Kind = Literal["text", "lines", "json", "csv", "parquet", "arrow"]

_COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x50\x2a\x4d\x18": "zstd",  # a skippable frame first, as pzstd writes it
    b"\x04\x22\x4d\x18": "lz4",
}
_COMPRESSED_SUFFIXES = (".gz", ".gzip", ".bz2", ".xz", ".zst", ".zstd", ".lz4")
_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark starts with that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_WHY = {  # files that are not read, by their first bytes
    b"PK\x03\x04": "a zip archive (.docx, .xlsx and .epub are zip, too): unzip it first",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    b"Rar!\x1a": "a rar archive: unpack it first",
    b"%PDF-": "a PDF: write its text to a .txt file first, for example with pdftotext",
    b"WARC/": "a WARC file: write the text of its pages to JSON lines first",
    b"SQLite format 3\0": "a SQLite database: write its texts to JSON lines first",
    b"Obj\x01": "an Avro file: write it as Parquet or JSON lines first",
    b"FEA1": "a Feather file of version 1: write it as Parquet first",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: type git lfs pull",
    b"ustar": "a tar archive: unpack it first with tar -xf",
}
_UNREADABLE = re.compile(b"|".join(map(re.escape, _WHY)))
_HEAD = 1024  # bytes that tell the format
_FEW = 10  # scripts and pages beside texts are left out up to this number; more are a corpus
_SCRIPT = re.compile(r".(sh|bash|bat|ps1|py|ipynb|js|css|html?|xml|ya?ml|toml|cfg|ini|lock)")
_RECORDS = re.compile(r".(jsonl?|ndjson|jl|csv|tsv|tab|parquet|arrow|feather)")
_TEXT = re.compile(r".(txt|text|md)|" + _RECORDS.pattern)
_ABOUT = re.compile(  # what describes the folder
    r"(readme|licen[cs]e|copying|citation|changelog|contributing|code_of_conduct)([._-].*)?"
    r"|notice(\.\w+)?|dataset_infos?\.json|dataset_dict\.json|state\.json|package(-lock)?\.json"
    r"|_success|_(common_)?metadata|requirements.*\.txt|cmakelists\.txt|robots\.txt"
    r"|.*\.(md5|sha1|sha256|crc)|(md5|sha1|sha256)sums?(\.txt)?",
    re.IGNORECASE,
)


class Unreadable(OSError):
    """The file is of a kind that is not read, or is broken; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How to read a file."""

    kind: Kind
    is_plain: bool  # UTF-8 and not compressed, so that any byte span can be read


@dataclass(kw_only=True)
class Listing:
    """The files of a folder."""

    files: list[Path] = field(default_factory=list)
    left_out: list[Path] = field(default_factory=list)  # not texts, by their names


def list_folder(root: Path, split: str = "train") -> Listing:
    """The files to read, in a fixed order. Links are followed; each file is listed once.

    Args:
        split: which split of a folder of `DatasetDict.save_to_disk`.

    Raises:
        SkipwiseError: a folder that cannot be opened, or without that split.
    """
    listing = Listing()
    try:
        _walk(root, split, set(), listing)
    except OSError as error:
        where = error.filename or root
        raise SkipwiseError(f"{where} cannot be opened: {error.strerror}") from error
    plain = {p: suffix_of(p) for p in listing.files if not _ABOUT.fullmatch(p.name)}
    scripts = [path for path, suffix in plain.items() if _SCRIPT.fullmatch(suffix)]
    if len(scripts) <= _FEW and any(map(_TEXT.fullmatch, plain.values())):
        for path in scripts:
            del plain[path]
    if plain:
        listing.left_out += [path for path in listing.files if path not in plain]
        listing.files = list(plain)
    return listing


def suffix_of(path: Path) -> str:
    """The suffix of a file's name, in lower case, before that of a compression."""
    stem, suffix = os.path.splitext(path.name.lower())
    return os.path.splitext(stem)[1] if suffix in _COMPRESSED_SUFFIXES else suffix


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there are none to read, as behind a broken link."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def has_records(path: Path) -> bool:
    """Whether the suffix is that of a format with records, so that it is not a single text."""
    return bool(_RECORDS.fullmatch(suffix_of(path)))


def recognize(path: Path, head: bytes | None = None) -> Format:
    """The format of a file, from its first bytes and the suffix of its name.

    Args:
        head: its first 1,024 bytes, if they are read already.

    Raises:
        Unreadable: it is of a kind that is not read.
        OSError, EOFError, zlib.error, lzma.LZMAError, UnicodeError: the file cannot be read.
    """
    if head is None:
        with path.open("rb") as opened:
            head = opened.read(_HEAD)
    compression = _compression(head)
    is_plain = compression is None and _encoding(head) is None
    if not is_plain:
        with open_stream(path) as (file, _):
            head = bytes(file.read(_HEAD))
    if (found := _UNREADABLE.match(head)) or head[257:262] == b"ustar":
        raise Unreadable(_WHY[found.group() if found else b"ustar"])
    suffix = suffix_of(path)
    if compression and (head.startswith((b"PAR1", b"ARROW1")) or _compression(head)):
        inner = _compression(head) or "Parquet or Arrow"
        raise Unreadable(f"{inner} inside {compression}: decompress it first")
    if head.startswith(b"PAR1"):
        kind = "parquet"
    elif head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        kind = "arrow"
    elif suffix in (".parquet", ".arrow", ".feather"):
        raise Unreadable(f"not a {suffix[1:]} file, or cut off: its first bytes are others")
    elif suffix in (".csv", ".tsv", ".tab"):
        kind = "csv"
    elif suffix in (".json", ".jsonl", ".ndjson", ".jl"):
        kind = _json_kind(path, suffix == ".json")
    elif suffix in (".txt", "") and head.startswith(b'{"') and _starts_with_object(path):
        kind = "lines"
    else:
        kind = "text"
        is_page = head.removeprefix(codecs.BOM_UTF8).lstrip()[:14].lower()
        if is_page.startswith((b"<!doctype html", b"<html")) and suffix[:4] != ".htm":
            raise Unreadable(
                "an HTML page: write its text to it, or name it .html to keep the tags"
            )
    return Format(kind=kind, is_plain=is_plain)


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[Any, Any]]:
    """(the file decompressed, as UTF-8 without a byte order mark; the file as it is on disk)."""
    with path.open("rb") as raw:
        stream = _decompressed(raw)
        head = stream.peek(4)[:4]
        encoding = _encoding(head)
        if encoding is not None:
            stream = io.BufferedReader(_Recoded(stream, encoding), 1 << 16)
        elif head.startswith(codecs.BOM_UTF8):
            stream.read(3)
        yield stream, raw


def too_large(path: Path) -> SkipwiseError:
    return SkipwiseError(
        f"{path} is larger than {LARGEST >> 30} GiB, and text files and records must fit in "
        "memory\nwrite it as JSON lines with one document per line, or remove it from the folder"
    )


class _Recoded(io.RawIOBase):
    """A stream of UTF-16 or UTF-32 as UTF-8 bytes, without its byte order mark."""

    def __init__(self, stream: Any, encoding: str) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder(encoding)()
        self._ready = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = b"more"
        while block and not self._ready:
            block = self._stream.read(1 << 16)
            self._ready = self._decoder.decode(block, final=not block).encode()
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def _walk(folder: Path, split: str, seen: set[str], listing: Listing) -> None:
    real = os.path.realpath(folder)
    if real in seen:  # a link that leads back, or a second one to the same folder
        return
    seen.add(real)
    saved = _saved_files(folder, split)
    if saved is not None:
        listing.files += saved
        return
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        is_link = entry.is_symlink()
        path = Path(entry.path)
        is_special = path.exists() and not path.is_file() and not path.is_dir()  # a pipe, ...
        if entry.name.startswith(".") or is_special:
            listing.left_out.append(path)
        elif path.is_dir() if is_link else entry.is_dir():
            _walk(path, split, seen, listing)
        else:
            target = os.path.realpath(path) if is_link else os.path.join(real, entry.name)
            if target not in seen:
                listing.files.append(path)
            seen.add(target)


def _saved_files(folder: Path, split: str) -> list[Path] | None:
    """The files of a folder of `datasets.save_to_disk` in order; None for other folders."""
    splits = _json_object(folder / "dataset_dict.json").get("splits")
    if isinstance(splits, list):
        if split not in splits:
            raise SkipwiseError(
                f"{folder} has no split {split!r}: it has {', '.join(map(str, splits))}\n"
                f"type 'data.sources=[{{path: {folder}, split: {(splits or ['NAME'])[0]}}}]'"
            )
        return _saved_files(folder / split, split)
    state = _json_object(folder / "state.json")
    if not isinstance(state.get("_data_files"), list):
        return None
    if state.get("_indices_data_files"):
        raise SkipwiseError(
            f"{folder} was saved with a selection of rows by an old version of datasets\n"
            "load it with datasets.load_from_disk and save it again with to_parquet"
        )
    names = [str(entry["filename"]) for entry in state["_data_files"]]
    if outside := [name for name in names if Path(name).name != name]:
        raise SkipwiseError(f"{folder / 'state.json'} names {outside[0][:80]!r}, no file beside it")
    return [folder / name for name in names]


def _json_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _compression(head: bytes) -> str | None:
    name = next((name for magic, name in _COMPRESSIONS.items() if head.startswith(magic)), None)
    return None if name == "bz2" and head[4:10] != b"1AY&SY" else name


def _encoding(head: bytes) -> str | None:
    """UTF-16 or UTF-32 by its byte order mark, else None."""
    marks = _BYTE_ORDER_MARKS.items()
    return next((name for mark, name in marks if head.startswith(mark)), None)


def _decompressed(raw: Any) -> Any:
    compression = _compression(raw.peek(16)[:16])
    if compression == "gzip":
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 16)  # type: ignore[arg-type]
    if compression == "xz":
        return io.BufferedReader(lzma.LZMAFile(raw), 1 << 16)  # type: ignore[arg-type]
    if compression is None:
        return raw
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, compression), 1 << 16)


def _json_kind(path: Path, may_be_one: bool) -> Kind:
    """JSON lines, or a JSON array or object over several lines.

    Args:
        may_be_one: whether a single line may be the full array or object.
    """
    with open_stream(path) as (file, _):
        lines = iter(lambda: file.readline(1 << 20), b"")
        line = next((line for line in lines if line.strip()), b"{}\n")
        first, is_whole = line.strip(), line.endswith(b"\n")
        if may_be_one:
            is_first_of_many = first[:1] != b"[" and first[-1:] == b"}" and is_whole
            return "lines" if is_first_of_many and file.read(4096).strip() else "json"
    return "json" if is_whole and first.endswith((b"{", b"[", b",")) else "lines"


def _starts_with_object(path: Path) -> bool:
    """Whether the first line is a JSON object."""
    with open_stream(path) as (file, _):
        try:
            return isinstance(json.loads(file.readline(1 << 20)), dict)
        except (ValueError, RecursionError):
            return False
