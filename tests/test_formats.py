"""Formats of text files: each is recognized by its content, and read to the right documents."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest

from skipwise.data.files import list_folder, recognize
from skipwise.data.readers import BadRecord, BadRecords, left_out_files, parse_sources
from skipwise.data.shards import read_documents, read_shards
from skipwise.errors import SkipwiseError

TEXTS = ['one, "two"\nthree é ∑ 😀', "four; five\tsix\n\n" * 300, "seven\u2028eight"]


def read(path, **source):
    bad = BadRecords()
    (parsed,) = parse_sources([{"path": str(path), **source}])
    return list(read_documents(parsed, bad)), bad.first


def json_lines(texts=TEXTS):
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)


def zstd(data, codec="zstd"):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
    "lz4": lambda data: zstd(data, "lz4"),
}


def csv_of(rows, **options):
    out = io.StringIO()
    csv.writer(out, **options).writerows(rows)
    return out.getvalue()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32", "utf-32-be"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_text_of_any_unicode_encoding_with_a_byte_order_mark_is_read(tmp_path, encoding, name):
    content = {
        "a.txt": TEXTS[0],
        "a.jsonl": json_lines(),
        "a.csv": csv_of([["text"], *([text] for text in TEXTS)]),
        "a.json": json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False),
    }[name]
    mark = "\ufeff" if encoding.endswith("be") else ""
    (tmp_path / name).write_bytes((mark + content).encode(encoding))
    assert read(tmp_path / name) == (TEXTS[:1] if name == "a.txt" else TEXTS, [])


def test_text_that_is_not_unicode_is_named_with_what_to_type(tmp_path):
    (tmp_path / "latin.txt").write_bytes("é".encode("latin1"))
    (tmp_path / "no-mark.txt").write_bytes("no mark".encode("utf-16-le"))
    texts, bad = read(tmp_path)
    assert not texts and "iconv" in bad[0] and "NUL bytes" in bad[1]


@pytest.mark.parametrize("compression", COMPRESS)
def test_compressed_files_are_read_whatever_their_suffix_says(tmp_path, compression):
    compress, data = COMPRESS[compression], json_lines().encode()
    (tmp_path / f"a.jsonl.{compression}").write_bytes(compress(data))
    (tmp_path / "b.jsonl").write_bytes(compress(data) + compress(data))  # two members
    (tmp_path / f"c.JSONL.{compression.upper()}").write_bytes(compress(data))
    (tmp_path / f"d.txt.{compression}").write_bytes(compress(TEXTS[0].encode()))
    (tmp_path / "e.txt").write_bytes(compress(TEXTS[0].encode("utf-16")))
    (tmp_path / f"f.tsv.{compression}").write_bytes(compress(b"id\ttext\n1\tx\n"))
    assert read(tmp_path) == ([*TEXTS * 4, TEXTS[0], TEXTS[0], "x"], [])


@pytest.mark.parametrize("compression", COMPRESS)
def test_a_cut_compressed_file_is_a_bad_record_after_those_before(tmp_path, compression):
    lines = json_lines([str(i) * 50 + os.urandom(100).hex() for i in range(5000)]).encode()
    whole = COMPRESS[compression](lines)
    (tmp_path / "a.jsonl").write_bytes(whole[: len(whole) // 2])
    texts, bad = read(tmp_path / "a.jsonl")
    assert 0 < len(texts) < 5000 and len(bad) == 1
    assert all(texts[i].startswith(str(i) * 50) for i in range(len(texts)))


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{"text": text} for text in TEXTS]),
        json.dumps([{"text": text} for text in TEXTS], indent=2),
        json.dumps({"version": 1, "data": [{"text": text} for text in TEXTS]}),
        json.dumps({"version": "1.1", "data": [{"text": text} for text in TEXTS]}, indent=4),
        "\n".join(json.dumps({"id": 1, "text": text}, indent=1) for text in TEXTS),
        json_lines(),
        json.dumps(TEXTS),
        "\n\n" + json_lines().replace("\n", "\r\n"),
    ],
    ids=["array", "array of lines", "data", "data over lines", "objects", "lines", "texts", "crlf"],
)
@pytest.mark.parametrize("block", [1, 7, 1 << 16])
def test_json_is_read_as_array_object_or_lines(tmp_path, monkeypatch, content, block):
    monkeypatch.setattr("skipwise.data.records._BLOCK", block)
    (tmp_path / "a.json").write_text(content)
    assert read(tmp_path / "a.json") == (TEXTS, [])
    if "\n" in content.strip():  # pretty-printed, under the name of lines
        (tmp_path / "b.jsonl").write_text(content)
        assert read(tmp_path / "b.jsonl") == (TEXTS, [])


def test_one_json_object_over_many_lines_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"id": 3, "text": TEXTS[0]}, indent=2))
    assert read(tmp_path / "a.json") == (TEXTS[:1], [])


def test_broken_json_is_one_bad_record_after_those_before(tmp_path):
    for end in ('{"text": nonsense}]', '{"text": "cut', "", '{"text": "three"}'):
        (tmp_path / "a.json").write_text('[{"text": "one"},\n{"text": "two"},\n' + end)
        texts, bad = read(tmp_path / "a.json")
        assert texts[:2] == ["one", "two"] and len(bad) == 1
        assert f"after {len(texts)} records" in bad[0]


def test_a_json_array_larger_than_memory_is_read_record_by_record(tmp_path, monkeypatch):
    for module in ("files", "records", "readers"):
        monkeypatch.setattr(f"skipwise.data.{module}.LARGEST", 3000)
    monkeypatch.setattr("skipwise.data.records._BLOCK", 100)
    (tmp_path / "a.json").write_text(json.dumps([{"text": f"{i}" * 50} for i in range(100)]))
    assert len(read(tmp_path / "a.json")[0]) == 100


def test_json_lines_without_a_suffix_or_in_txt_are_not_trained_on_as_prose(tmp_path):
    (tmp_path / "a").write_text(json_lines())
    (tmp_path / "b.txt").write_text(json_lines())
    (tmp_path / "c.txt").write_text('{"a": not JSON}')
    assert read(tmp_path) == ([*TEXTS, *TEXTS, '{"a": not JSON}'], [])


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.csv", {}),
        ("a.csv", {"delimiter": ";"}),
        ("a.csv", {"quoting": csv.QUOTE_ALL, "lineterminator": "\n"}),
        ("a.tsv", {"delimiter": "\t"}),
        ("a.tab", {"delimiter": "\t"}),
        ("a.csv", {"delimiter": "\t"}),
        ("a.csv", {"delimiter": "|"}),
    ],
)
def test_csv_is_read_by_its_column(tmp_path, name, options):
    large = "x," * 100_000  # beyond the csv module's own limit
    rows = [["id", "text", "note"], *([str(i), t, "y"] for i, t in enumerate([*TEXTS, large]))]
    (tmp_path / name).write_text(csv_of(rows, **options), newline="")
    assert read(tmp_path / name) == ([*TEXTS, large], [])
    assert read(tmp_path / name, text_field="note")[0] == ["y"] * 4


def test_csv_with_a_single_column_may_have_commas_in_quotes_only(tmp_path):
    (tmp_path / "a.csv").write_text('text\n"a, b"\nc\n\nd, e\n')
    (tmp_path / "b.tsv").write_text("text\na, b\n")
    texts, bad = read(tmp_path)
    assert texts == ["a, b", "c", "a, b"]
    assert bad == [f"{tmp_path}/a.csv:5: 2 cells, where the header has 1"]


def test_csv_without_the_column_is_an_error_that_names_the_columns(tmp_path):
    (tmp_path / "a.csv").write_text("id,body\n1,some text\n2,more\n")
    (tmp_path / "b.csv").write_text("1,some text\n2,more\n")
    texts, bad = read(tmp_path)
    assert not texts and len(bad) == 2
    assert (
        "a.csv:1 (the header): no field 'text', only id, body: type data.text_field=body" in bad[0]
    )
    assert "b.csv:1 (the header): no field 'text', only 1, some text" in bad[1]


def test_broken_quotes_and_missing_cells_of_csv_are_bad_records_and_the_next_is_read(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\n1,"a" b\n2\n3,c\n4,"open')
    texts, bad = read(tmp_path / "a.csv")
    assert texts == ["c"]
    assert [line.split(": ")[0][-7:] for line in bad] == ["a.csv:2", "a.csv:3", "a.csv:5"]


def test_arrow_files_and_streams_and_feather_are_read(tmp_path):
    table = pyarrow.table({"id": range(600), "text": [f"t{i}" for i in range(600)]})
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    pyarrow.feather.write_feather(table, tmp_path / "c.feather")
    (tmp_path / "d.arrow.gz").write_bytes(gzip.compress((tmp_path / "b.arrow").read_bytes()))
    (tmp_path / "e.txt").write_bytes((tmp_path / "a.arrow").read_bytes())
    assert read(tmp_path) == ([f"t{i}" for i in range(600)] * 5, [])
    (tmp_path / "a.arrow").write_bytes((tmp_path / "b.arrow").read_bytes()[:4000])
    texts, bad = read(tmp_path / "a.arrow")
    assert not texts and "Expected to be able to read" in bad[0]


def test_parquet_is_read_whatever_its_suffix_says(tmp_path):
    table = pyarrow.table({"id": [1, 2, 3], "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    pyarrow.parquet.write_table(table, tmp_path / "b.txt")
    (tmp_path / "c.parquet.gz").write_bytes(gzip.compress((tmp_path / "b.txt").read_bytes()))
    (tmp_path / "d.parquet").write_text("no")
    texts, bad = read(tmp_path)
    assert texts == TEXTS * 2
    assert "Parquet or Arrow inside gzip: decompress it first" in bad[0]
    assert "not a parquet file" in bad[1]


@pytest.mark.extended
def test_a_folder_of_save_to_disk_is_read_in_the_order_of_its_shards(tmp_path):
    datasets = pytest.importorskip("datasets")
    texts = [f"text {i}" for i in range(25)]
    dataset = datasets.Dataset.from_dict({"text": texts, "id": list(range(25))})
    dataset.save_to_disk(tmp_path / "one", num_shards=3)
    assert len(list((tmp_path / "one").glob("*.arrow"))) == 3
    assert read(tmp_path / "one") == (texts, [])
    state = json.loads((tmp_path / "one/state.json").read_text())
    state["_data_files"].reverse()  # 9 + 8 + 8 rows
    (tmp_path / "one/state.json").write_text(json.dumps(state))
    assert read(tmp_path / "one")[0] == texts[17:] + texts[9:17] + texts[:9]
    splits = dataset.train_test_split(test_size=5, shuffle=False)
    splits.save_to_disk(tmp_path / "two")
    assert read(tmp_path / "two") == (texts[:20], [])
    assert read(tmp_path / "two", split="test") == (texts[20:], [])
    with pytest.raises(SkipwiseError, match=r"no split 'none': it has train, test\n.*split: tr"):
        read(tmp_path / "two", split="none")
    dataset.select(range(3, 9)).save_to_disk(tmp_path / "three")
    assert read(tmp_path / "three") == (texts[3:9], [])


@pytest.mark.extended
def test_loaders_of_datasets_and_their_nested_fields_are_read(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    records = [{"meta": {"text": text}} for text in TEXTS]
    dataset = datasets.Dataset.from_list(records).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: dataset)
    assert read("someone/books", text_field="meta.text") == (TEXTS, [])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "json"])
def test_nested_fields_and_lists_of_paragraphs_are_read(tmp_path, kind):
    def written(value):
        file = tmp_path / f"a.{kind}"
        rows = [{"id": 1, "meta": value}]
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
        else:
            file.write_text(json.dumps(rows if kind == "json" else rows[0]))
        return file

    assert read(written({"text": "a"}), text_field="meta.text") == (["a"], [])
    assert read(written(["a", "b"]), text_field="meta") == (["a\n\nb"], [])
    sections = [{"text": ["a", "b"]}, {"text": ["c"]}]
    assert read(written(sections), text_field="meta.text") == (["a\n\nb\n\nc"], [])
    _, bad = read(written({"other": {"text": "a"}}), text_field="meta.text")
    assert "no field 'meta.text', only " in bad[0] and "data.text_field=meta.other.text" in bad[0]


def test_a_field_whose_name_has_a_dot_comes_before_a_path(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"a.b": "one", "a": {"b": "two"}}))
    assert read(tmp_path / "a.jsonl", text_field="a.b")[0] == ["one"]


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, "'text' holds null, not text: type data.text_field=title"),
        (7, "'text' holds a number"),
        (True, "'text' holds true or false"),
        ({"a": 1}, "'text' holds an object with the fields a"),
        (["a", 1], "'text' holds a list with a number"),
    ],
)
def test_what_a_field_without_text_holds_is_said(tmp_path, value, found):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value, "title": "a title", "n": 1}))
    texts, bad = read(tmp_path / "a.jsonl")
    assert not texts and found in bad[0] and "data.text_field=title" in bad[0]


def test_bytes_of_parquet_are_read_as_utf8_and_named_where_they_are_not(tmp_path):
    column = pyarrow.array(["é".encode(), b"\xff", None], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    texts, bad = read(tmp_path / "a.parquet")
    assert texts == ["é"]
    assert "a.parquet:1: 'text' holds bytes that are not UTF-8" in bad[0]
    assert "a.parquet:2: 'text' holds null" in bad[1]


def test_archives_and_other_formats_are_named_with_what_to_do(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", "text")
    (tmp_path / "b.docx").write_bytes((tmp_path / "a.zip").read_bytes())
    for name, mode in (("c.tar", "w"), ("d.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(tmp_path / "a.zip", "a.txt")
    (tmp_path / "e.pdf").write_bytes(b"%PDF-1.7 ...")
    (tmp_path / "f.parquet").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    )
    (tmp_path / "g.jsonl").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    words = ["unzip", "unzip", "tar -xf", "tar -xf", "pdftotext", "git lfs pull", "git lfs pull"]
    for path, word in zip(sorted(tmp_path.iterdir()), words, strict=True):
        texts, bad = read(path)
        assert not texts and word in bad[0] and str(path) in bad[0]


def test_linked_folders_are_read_once_and_broken_links_are_named(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    for folder, names in ((corpus, "D"), (elsewhere, "ABC")):
        folder.mkdir()
        for name in names:
            (folder / f"{name}.txt").write_text(name)
    (corpus / "link").symlink_to(elsewhere)
    assert read(corpus)[0] == ["D", "A", "B", "C"]
    (corpus / "again").symlink_to(elsewhere)  # the same folder
    (elsewhere / "back").symlink_to(corpus)  # a loop
    (corpus / "A.txt").symlink_to(elsewhere / "A.txt")  # the same file
    (corpus / "gone.txt").symlink_to("../nowhere.txt")
    (corpus / "self").symlink_to("self")
    texts, bad = read(corpus)
    assert sorted(texts) == ["A", "B", "C", "D"]
    assert f"{corpus}/gone.txt: a broken link to ../nowhere.txt" in bad and len(bad) == 2
    with pytest.raises(SkipwiseError, match=r"a broken link: \.\./nowhere.txt does not exist"):
        read(corpus / "gone.txt")
    (tmp_path / "only").mkdir()
    (tmp_path / "only/link").symlink_to(elsewhere)
    assert sorted(read(tmp_path / "only")[0]) == ["A", "B", "C", "D"]


def make(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"text": name}) if "json" in name else name)


def names(paths):
    return [path.name for path in paths]


def test_files_that_are_not_texts_are_left_out_of_a_folder_and_read_by_their_names(tmp_path):
    about = [
        "LICENSE",
        "README.md",
        "README_zh.md",
        "dataset_info.json",
        "download.sh",
        "page.html",
    ]
    hidden = [".git/config", ".gitattributes"]
    make(tmp_path / "mixed", "a.txt", "b.md", "c.jsonl", *about, *hidden)
    listing = list_folder(tmp_path / "mixed")
    assert names(listing.files) == ["a.txt", "b.md", "c.jsonl"]
    assert sorted(names(listing.left_out)) == sorted([".git", ".gitattributes", *about])
    (source,) = parse_sources([str(tmp_path / "mixed")])
    assert left_out_files([source]) == listing.left_out
    assert read(tmp_path / "mixed/README.md")[0] == ["README.md"]
    (source,) = parse_sources([str(tmp_path / "mixed/README.md")])
    assert left_out_files([source]) == []


@pytest.mark.parametrize(
    "corpus",
    [
        ["a.py", "b.py"],
        ["a.html", "b/c.html"],
        ["a.md", "b.md"],
        [f"{i:02}.py" for i in range(11)] + ["notes.txt"],
        ["README.md", "x/README.md"],
        ["LICENSE"],
    ],
)
def test_a_folder_of_code_pages_or_readmes_is_a_corpus(tmp_path, corpus):
    make(tmp_path, *corpus, ".hidden")
    assert sorted(read(tmp_path)[0]) == sorted(corpus)
    assert names(list_folder(tmp_path).left_out) == [".hidden"]


def test_reading_resumes_in_every_format_at_any_record(tmp_path, monkeypatch):
    lines = json_lines([f"{i}" for i in range(40)])
    table = pyarrow.table({"text": [f"{i}" for i in range(600)]})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    with pyarrow.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "c.csv").write_text(csv_of([["text"], *([t] for t in TEXTS * 5), [], ["a", "b"]]))
    (tmp_path / "d.json").write_text(lines.replace("}", "\n}"))
    (tmp_path / "e.jsonl").write_bytes(zstd(lines.encode()))
    (tmp_path / "f.txt").write_text("text")
    monkeypatch.setattr("skipwise.data.shards._SHARD", 2000)
    (source,) = parse_sources([str(tmp_path)])
    shards = list(read_shards(source))
    outcomes = [[o for o in shard.read() if o] for shard in shards]
    assert len(shards) > 30 and sum(map(len, outcomes)) == 1200 + 16 + 80 + 1
    assert sum(isinstance(o, BadRecord) for some in outcomes for o in some) == 1
    assert [shard.done for shard in shards] == sorted(shard.done for shard in shards)
    for i in range(len(shards)):
        again = [[o for o in shard.read() if o] for shard in read_shards(source, shards[i].end)]
        assert again == outcomes[i + 1 :]


def test_every_format_of_the_page_has_a_test_that_reads_it():
    page = (Path(__file__).parents[1] / "docs/data.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "`test_" in line]
    named = {row.split("`test_")[1].split("`")[0] for row in rows}
    assert len(rows) >= 10
    assert all(f"def test_{name}(" in Path(__file__).read_text() for name in named)


def test_the_format_follows_from_the_first_bytes_before_the_suffix(tmp_path):
    cases = {
        "a.py": (b"import os\n", "text", True),
        "b.csv": (b"text\n", "csv", True),
        "c.jsonl": (gzip.compress(b'{"text": "a"}\n'), "lines", False),
        "d.txt": (b"\xff\xfea\0", "text", False),
        "e.log": (b'{"not": "lines"}\n', "text", True),
    }
    for name, (content, kind, is_plain) in cases.items():
        (tmp_path / name).write_bytes(content)
        found = recognize(tmp_path / name)
        assert (found.kind, found.is_plain) == (kind, is_plain)
