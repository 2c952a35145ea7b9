"""Text sources: what is read, and how a broken record is named."""

import gzip
import io
import json
import math
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from skipwise.data.readers import BadRecord, BadRecords, parse_sources
from skipwise.data.shards import read_documents, read_shards
from skipwise.errors import SkipwiseError


def read(path, policy="skip", **source):
    bad = BadRecords(policy=policy)
    (parsed,) = parse_sources([{"path": str(path), **source}])
    return list(read_documents(parsed, bad)), bad


def test_text_json_lines_json_parquet_and_gzip_in_one_folder_are_read_in_order(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n\n{"text": "three"}\n')
    (tmp_path / "c.json").write_text(json.dumps([{"text": "four"}]))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five", "six"]}), tmp_path / "d.parquet")
    with gzip.open(tmp_path / "e.jsonl.gz", "wt") as file:
        file.write('{"text": "seven"}\n')
    (tmp_path / ".hidden").write_text("no")
    texts, bad = read(tmp_path)
    assert texts == ["one", "two", "three", "four", "five", "six", "seven"]
    assert bad.count == 0


def test_a_broken_line_is_named_by_file_and_line_counted_and_skipped(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n{"body": "b"}\n[1]\n{"text": "c"}\n')
    texts, bad = read(file)
    assert texts == ["a", "c"]
    assert bad.count == 3
    assert [line.split(": ")[0] for line in bad.first] == [f"{file}:{n}" for n in (2, 3, 4)]
    assert "body" in bad.first[1]


def test_stop_names_the_first_broken_record(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"text": "a"}\nnonsense\n')
    with pytest.raises(SkipwiseError, match=r"x\.jsonl:2"):
        read(file, "stop")


def test_binary_truncated_gzip_and_false_parquet_are_bad_records_not_crashes(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"\x89\xfe\x00\x80")
    whole = gzip.compress(b'{"text": "long enough to be cut"}\n' * 50)
    (tmp_path / "b.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.parquet").write_bytes(b"PAR1 not really")
    texts, bad = read(tmp_path)
    assert bad.count == 3
    assert not [t for t in texts if "long" not in t]


def test_another_text_field_is_read_from_lines_and_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"content": ["two"]}), tmp_path / "b.parquet")
    assert read(tmp_path, text_field="content")[0] == ["one", "two"]
    _, bad = read(tmp_path)
    assert bad.count == 2
    assert all("only content: type data.text_field=content" in line for line in bad.first)


@pytest.mark.extended
def test_a_hub_data_set_is_streamed_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = {}

    def load_dataset(path, config, **options):
        asked.update(path=path, config=config, **options)
        return iter([{"text": "one"}, {"other": 1}, {"text": "two"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts, bad = read("someone/books", split="validation", config="en")
    assert texts == ["one", "two"] and bad.first[0].startswith("someone/books[1]")
    assert asked["split"] == "validation" and asked["config"] == "en" and asked["streaming"]
    assert "trust_remote_code" not in asked


@pytest.mark.parametrize(
    ("value", "word"),
    [
        ("./no/such/folder", "no such file or folder"),
        ({"path": "x", "waight": 2}, "unknown key waight"),
        ({"weight": 2}, "has no path"),
        ({"path": ".", "weight": -1}, "give 0 or more"),
        ({"path": ".", "weight": math.inf}, "give 0 or more"),
        ({"path": ".", "weight": 0}, "every data source has the weight 0"),
        ({"path": ".", "weight": True}, "give 0 or more"),
        ({"path": 5}, "path of the data source {'path': 5} is no text"),
        ({"path": ".", "split": ["a"]}, "split of the data source .* is no text"),
        ({"path": ".", "max_tokens": 0}, "whole number of 1 or more"),
        ({"path": ".", "max_tokens": 1.5}, "whole number of 1 or more"),
        ({"path": ".", "max_tokens": "many"}, "whole number of 1 or more"),
    ],
)
def test_a_wrong_source_is_an_error_that_says_what_is_wrong(value, word):
    with pytest.raises(SkipwiseError, match=word):
        parse_sources([value])


def test_max_tokens_may_be_written_as_yaml_reads_2e9():
    sources = parse_sources(
        [{"path": ".", "max_tokens": value} for value in (2e9, "2e9", 2 * 10**9)]
    )
    assert {source.max_tokens for source in sources} == {2 * 10**9}


@pytest.mark.parametrize("end", ["", "\n"])
def test_spans_of_any_size_read_every_line_once_and_name_it_by_its_number(
    tmp_path, monkeypatch, end
):
    lines = ["", '{"text": "a"}', "no", '{"text": "' + "b" * 300 + '"}', " ", "{", '{"text": "c"}']
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(lines) + end)
    whole = file.stat().st_size
    for size in (*range(1, 40), 300, 301, whole - 1, whole, whole + 1):
        monkeypatch.setattr("skipwise.data.shards._SHARD", size)
        texts, bad = read(file)
        assert texts == ["a", "b" * 300, "c"]
        assert [line.split(": ")[0] for line in bad.first] == [f"{file}:{n}" for n in (3, 6)]


def test_a_line_over_many_spans_is_read_once_not_once_a_span(tmp_path, monkeypatch):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"text": "b" * 100_000}) + "\n" + '{"text": "c"}\n')
    monkeypatch.setattr("skipwise.data.shards._SHARD", 100)
    num_read = 0

    class Counting(io.BufferedReader):
        def readline(self, size=-1):
            nonlocal num_read
            line = super().readline(size)
            num_read += len(line)
            return line

    monkeypatch.setattr(Path, "open", lambda path, mode: Counting(io.FileIO(path)))
    assert read(file)[0] == ["b" * 100_000, "c"]
    assert num_read < 4 * file.stat().st_size  # once to recognize it


def test_what_cannot_be_held_in_memory_is_an_error_that_names_json_lines(tmp_path, monkeypatch):
    for module in ("readers", "records", "files"):
        monkeypatch.setattr(f"skipwise.data.{module}.LARGEST", 1000)
    monkeypatch.setattr("skipwise.data.records._BLOCK", 100)
    for name, content in (
        ("a.txt", b"x" * 1001),
        ("b.json", json.dumps([{"text": "x" * 4001}]).encode()),
        ("c.txt.gz", gzip.compress(b"x" * 1001)),
        ("d.json.gz", gzip.compress(json.dumps([{"text": "x" * 4001}]).encode())),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SkipwiseError, match=rf"{name} is larger.*\n.*JSON lines"):
            read(tmp_path / name)
    (tmp_path / "e.txt").write_bytes(b"x" * 1000)
    assert read(tmp_path / "e.txt")[0] == ["x" * 1000]


def test_a_line_too_long_to_hold_is_a_bad_record_and_the_next_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("skipwise.data.readers.LARGEST", 100)
    content = '{"text": "' + "b" * 1000 + '"}\n{"text": "c"}\n'
    (tmp_path / "x.jsonl").write_text(content)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("x.jsonl", "y.jsonl.gz"):
        texts, bad = read(tmp_path / name)
        assert texts == ["c"] and bad.count == 1 and bad.first[0].startswith(f"{tmp_path / name}:1")


def test_half_a_surrogate_pair_is_a_bad_record(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a \\ud800 b"}\n{"text": "\\ud83d\\ude00"}\n')
    texts, bad = read(tmp_path)
    assert texts == ["\N{GRINNING FACE}"] and "surrogate" in bad.first[0]


def test_a_file_that_cannot_be_opened_is_one_bad_record_however_large(tmp_path, monkeypatch):
    monkeypatch.setattr("skipwise.data.shards._SHARD", 10)
    (tmp_path / "x.jsonl").write_text('{"text": "abcdefghijkl"}\n' * 10)
    opened = Path.open

    def denied(self, *args, **options):
        if self.name == "x.jsonl":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    assert read(tmp_path)[1].count == 1


def test_reading_goes_on_from_the_end_of_any_chunk(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text("".join(f'{{"text": "b{i}"}}\n' for i in range(9)))
    whole = gzip.compress(b"".join(b'{"text": "c%d"}\n' % i for i in range(600)))
    (tmp_path / "c.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    table = pyarrow.table({"text": [f"d{i}" for i in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=7)
    (tmp_path / "e.json").write_text(json.dumps([{"text": f"e{i}"} for i in range(9)]))
    monkeypatch.setattr("skipwise.data.shards._SHARD", 1)
    (source,) = parse_sources([str(tmp_path)])
    shards = list(read_shards(source))
    outcomes = [[o for o in shard.read() if o] for shard in shards]
    assert sum(isinstance(o, BadRecord) for some in outcomes for o in some) == 1
    assert [c.done for c in shards] == sorted(c.done for c in shards)
    for i in range(len(shards)):
        again = [[o for o in shard.read() if o] for shard in read_shards(source, shards[i].end)]
        assert again == outcomes[i + 1 :]
