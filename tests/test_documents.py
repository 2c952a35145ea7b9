"""Text sources: what is read, and how a broken record is named."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from skipwise.documents import BadRecords, parse_sources, read_documents
from skipwise.errors import SkipwiseError


def read(path, policy="skip", **source):
    bad = BadRecords(policy=policy)
    (parsed,) = parse_sources([{"path": str(path), **source}])
    return [text for _, text in read_documents(parsed, bad)], bad


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
    (tmp_path / "a.bin").write_bytes(b"\xff\xfe\x00\x80")
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
    assert "its columns are content" in bad.first[1]


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
        ({"weight": 2}, "lacks path"),
        ({"path": ".", "weight": -1}, "from 0 up"),
    ],
)
def test_a_wrong_source_is_an_error_that_says_what_is_wrong(value, word):
    with pytest.raises(SkipwiseError, match=word):
        parse_sources([value])
