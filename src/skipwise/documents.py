"""Text sources to documents: files, folders, JSON lines, Parquet, or a `datasets` name on the hub.

A record that cannot be read is named by file and line, counted, and skipped or fatal, as asked.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from skipwise.errors import SkipwiseError

_LINES = {".jsonl", ".ndjson"}


@dataclass(frozen=True, kw_only=True)
class Source:
    """One place that text comes from."""

    path: str  # file, folder, or name of a data set on the hub
    weight: float | None = None  # share of the examples, in proportion to the others'
    text_field: str = "text"
    split: str = "train"  # hub only, as the next two
    config: str | None = None
    revision: str | None = None

    @property
    def is_local(self) -> bool:
        return Path(self.path).expanduser().exists()


@dataclass
class BadRecords:
    """What could not be read: how much, and the first few by name."""

    policy: Literal["skip", "stop"] = "skip"
    count: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, where: str, why: str) -> None:
        if self.policy == "stop":
            raise SkipwiseError(f"{where}: {why}\nmend the record, or type data.on_bad_record=skip")
        self.count += 1
        if len(self.first) < 5:
            self.first.append(f"{where}: {why}")


def parse_sources(values: Iterable[Any], text_field: str = "text") -> list[Source]:
    """Sources from the recipe: a path or name, or a mapping with more than that.

    Raises:
        SkipwiseError: a local path that does not exist, an unknown key, a weight below 0.
    """
    keys = [f.name for f in dataclasses.fields(Source)]
    sources = []
    for value in values:
        entry: dict[str, Any] = dict(value) if isinstance(value, dict) else {"path": str(value)}
        unknown = [key for key in entry if key not in keys]
        if unknown or "path" not in entry:
            what = f"has an unknown key {unknown[0]}" if unknown else "lacks path"
            raise SkipwiseError(f"the data source {value!r} {what}: choose from {', '.join(keys)}")
        source = Source(**{"text_field": text_field, **entry})
        weight = source.weight
        if weight is not None and (not isinstance(weight, int | float) or weight < 0):
            raise SkipwiseError(
                f"the weight of {source.path} is {weight!r}: give a number from 0 up"
            )
        if not source.is_local and not _is_hub_name(source.path):
            raise SkipwiseError(
                f"{source.path}: no such file or folder\n"
                "give a file or folder of text, JSON lines or Parquet, or a data set's hub name"
            )
        sources.append(source)
    return sources


def read_documents(source: Source, bad: BadRecords) -> Iterator[tuple[str, str]]:
    """(where, text) of every document: a text file is one, JSON lines and Parquet one a record."""
    if not source.is_local:
        yield from _read_hub(source, bad)
        return
    for path in list_files(source):
        name = path.name.removesuffix(".gz")
        suffix = Path(name).suffix.lower()
        try:
            if suffix == ".parquet":
                yield from _read_parquet(path, source.text_field, bad)
            elif suffix in _LINES or suffix == ".json":
                yield from _read_json(path, suffix, source.text_field, bad)
            else:
                with _open(path) as file:
                    yield str(path), file.read().decode("utf-8")
        except (OSError, EOFError) as error:
            bad.add(str(path), str(error) or type(error).__name__)
        except UnicodeDecodeError:
            bad.add(str(path), "not UTF-8 text")


def list_files(source: Source) -> list[Path]:
    """The files of a local source in a fixed order; hidden ones are left out."""
    root = Path(source.path).expanduser()
    if root.is_file():
        return [root]
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file() and not any(p.startswith(".") for p in path.relative_to(root).parts)
    ]
    if not files:
        raise SkipwiseError(f"{root} is empty: it should hold text, JSON lines or Parquet files")
    return files


def describe(source: Source) -> list[Any]:
    """What decides a source's documents, for a fingerprint: files, sizes and times, or the name."""
    if not source.is_local:
        return ["hub", source.path, source.config, source.split, source.revision, source.text_field]
    files = [(str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns) for p in list_files(source)]
    return ["local", files, source.text_field]


def _read_json(
    path: Path, suffix: str, text_field: str, bad: BadRecords
) -> Iterator[tuple[str, str]]:
    with _open(path) as file:
        if suffix == ".json" and file.read(64).lstrip()[:1] == b"[":
            file.seek(0)
            try:
                records = json.load(file)
            except ValueError as error:
                bad.add(str(path), f"not JSON ({error})")
                return
            for number, record in enumerate(records):
                yield from _record(f"{path}[{number}]", record, text_field, bad)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                bad.add(f"{path}:{number}", f"not JSON ({error})")
                continue
            yield from _record(f"{path}:{number}", record, text_field, bad)


def _record(where: str, record: Any, text_field: str, bad: BadRecords) -> Iterator[tuple[str, str]]:
    text = record.get(text_field) if isinstance(record, dict) else None
    if isinstance(text, str):
        yield where, text
    elif isinstance(record, dict):
        bad.add(where, f"no text in {text_field!r}; its fields are {', '.join(map(str, record))}")
    else:
        bad.add(where, f"a {type(record).__name__}, not an object with a {text_field!r} field")


def _read_parquet(path: Path, text_field: str, bad: BadRecords) -> Iterator[tuple[str, str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if text_field not in names:
            bad.add(str(path), f"no column {text_field!r}; its columns are {', '.join(names)}")
            return
        number = 0
        for batch in file.iter_batches(batch_size=256, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                yield from _record(f"{path}:{number}", {text_field: text}, text_field, bad)
                number += 1
    except pyarrow.ArrowException as error:
        bad.add(str(path), f"not Parquet ({error})")


def _read_hub(source: Source, bad: BadRecords) -> Iterator[tuple[str, str]]:
    try:
        import datasets
    except ImportError as error:
        raise SkipwiseError(
            f"{source.path} is neither a file nor a folder here\n"
            "for a data set of the hub: pip install 'skipwise[hub]'"
        ) from error
    try:
        records = datasets.load_dataset(
            source.path,
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        for number, record in enumerate(records):
            yield from _record(f"{source.path}[{number}]", record, source.text_field, bad)
    except SkipwiseError:
        raise
    except Exception as error:  # datasets raises many kinds; the user needs its sentence
        raise SkipwiseError(
            f"{source.path}: no file or folder here, and no readable data set of the hub\n{error}"
        ) from error


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _is_hub_name(name: str) -> bool:
    parts = name.split("/")
    return (
        len(parts) <= 2
        and all(parts)
        and not name.startswith((".", "/", "~"))
        and (len(parts) == 2 or "." not in name)
    )
